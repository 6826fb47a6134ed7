"""What goes wrong in practice: killed processes, full disks, exceptions in the middle, two at once, many in a row."""

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from headq_ao import HeadQCache, headq_config, quantize_
from tests.conftest import ROOT

FAST = {"warmup_tokens": 64, "residual_length": 32, "block_size": 16}
WORKER = Path(__file__).with_name("fault_worker.py")


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["kill_during_save", "kill_during_generation", "disk_full"])
def test_in_a_process_of_its_own(tmp_path, case):
    process = start(WORKER, case, tmp_path)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output[-3000:]


COMPILE = """
import sys, hashlib, warnings, torch
from tests.conftest import build_tiny
from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.ops.paged_attention import cpu_kernel
from headq_ao.ops.error_feedback import cpu_kernel as feedback_kernel
warnings.simplefilter("error")  # not before: other libraries warn as they are imported
model = build_tiny(head_dim=64)
quantize_(model, headq_config(warmup_tokens=64, residual_length=32, block_size=16))
ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
cache = HeadQCache(model)
print("ready", flush=True)
sys.stdin.readline()
with torch.no_grad():
    model(ids, cache=cache)
    logits = model(ids[:, :1], cache=cache).logits
assert cpu_kernel.library() is not None and feedback_kernel.library() is not None
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest(), flush=True)
"""


@pytest.mark.slow
def test_two_processes_compile_the_kernel_at_once(tmp_path):
    """Both start at a signal with an empty folder; both read the same numbers; each kernel is built once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HEADQ_CACHE_DIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", COMPILE]
    both = [subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environment) for _ in range(2)]
    try:
        for process in both:
            assert process.stdout.readline() == "ready\n"
        assert os.listdir(tmp_path) == []
        for process in both:
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0]) == 65
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"] * 3


def prepared(tiny, token_ids):
    model = tiny()
    quantize_(model, headq_config(**FAST))
    return model, token_ids(1, 150)


@pytest.mark.parametrize("error", ["save_file", "replace", "fsync"])
def test_a_save_that_fails_leaves_the_old_file(tiny, token_ids, tmp_path, monkeypatch, error):
    model, ids = prepared(tiny, token_ids)
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids, cache=cache)
    cache.save(tmp_path / "c")
    before = (tmp_path / "c").read_bytes()

    def full(*args, **kwargs):
        if error == "save_file":
            Path(args[1]).write_bytes(before[:1000])
            raise safetensors.SafetensorError("No space left on device (os error 28)")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch if error == "save_file" else os, error, full)
    with pytest.raises(OSError, match="No space left on device"):
        cache.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before
    assert os.listdir(tmp_path) == ["c"]


class StopAt(StoppingCriteria):
    """Raises at one step, as a server does whose client has gone."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def __call__(self, input_ids, scores, **kwargs):
        self.step -= 1
        if self.step == 0:
            raise self.error
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("error", [RuntimeError("gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_between_steps(tiny, token_ids, error):
    """The model generates as before, and the cache that was in use goes on where it was."""
    model, ids = prepared(tiny, token_ids)
    whole = model.generate(ids, max_new_tokens=30, do_sample=False)
    cache = HeadQCache(model)
    criteria = StoppingCriteriaList([StopAt(12, error)])
    with pytest.raises(type(error)):
        model.generate(ids, max_new_tokens=30, do_sample=False, stopping_criteria=criteria, cache=cache)
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), whole)
    held = cache.get_seq_length()
    assert 150 < held < 180
    going_on = model.generate(whole[:, : held + 1], max_new_tokens=180 - held - 1, do_sample=False, cache=cache)
    assert torch.equal(going_on, whole)


@pytest.mark.parametrize("where", ["before attention", "after attention"])
def test_an_exception_inside_a_layer(tiny, token_ids, where):
    """The model generates as before; the half-written cache is refused until it is reset."""
    model, ids = prepared(tiny, token_ids)
    whole = model.generate(ids, max_new_tokens=30, do_sample=False)
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("out of memory")

    layer = model.model.layers[1]
    hook = (layer if where == "before attention" else layer.mlp).register_forward_pre_hook(fail)
    cache = HeadQCache(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(ids, max_new_tokens=30, do_sample=False, cache=cache)
    hook.remove()
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), whole)
    if where == "before attention":
        with pytest.raises(RuntimeError, match=r"an earlier call failed part-way.*call reset\(\)"), torch.no_grad():
            model(ids[:, :1], cache=cache)
        with pytest.raises(ValueError, match="an earlier call failed part-way"):
            cache.save("nowhere")
    cache.reset()
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, cache=cache), whole)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def test_200_generations_do_not_grow(tiny, token_ids):
    """Live tensors stay the same in number, and the process does not grow by more than 4 MiB after a warm-up."""
    model, ids = prepared(tiny, token_ids)

    def generate(times):
        for _ in range(times):
            model.generate(ids, max_new_tokens=4, do_sample=False)

    generate(40)
    tensors, peak = tensors_alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generate(200)
    assert tensors_alive() == tensors
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4 * 1024  # KiB
