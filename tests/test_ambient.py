"""PyTorch's ambient modes: whatever is on while a cache is filled and while it is used, the numbers are the same."""

import ast
import contextlib
import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from headq_ao import (
    Calibration,
    HeadQCache,
    calibrate,
    estimate_memory,
    headq_config,
    quantize_,
    restore_,
)

ROOT = Path(__file__).resolve().parents[1]
NEAR_EXACT = {"k_bits": 8, "v_bits": 8, "warmup_tokens": 32, "residual_length": 32, "block_size": 16}
FILLS = (60, 119)  # nothing is packed yet; blocks are packed, and the next one is nearly full


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def both(*modes):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,  # of a model whose parameters want none
    "autocast bf16": lambda: both(torch.no_grad(), torch.autocast("cpu", torch.bfloat16)),
    "autocast fp16": lambda: both(torch.no_grad(), torch.autocast("cpu", torch.float16)),
    "autocast bf16 inference": lambda: both(torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "device meta": lambda: both(torch.no_grad(), torch.device("meta")),
    "deterministic": deterministic,
}
ROUNDED = ("autocast bf16", "autocast fp16", "autocast bf16 inference")  # the model itself computes in 16 bits


def logits(model, ids, cache, fill, use, filled):
    """Prefill under one mode; a chunk, tokens, a crop and more tokens under the other."""
    with MODES[fill]():
        found = [model(ids[:, :filled], cache=cache).logits]
    with MODES[use]():
        for begin, end in ((0, 9), *((t, t + 1) for t in range(9, 14))):
            found.append(model(ids[:, filled + begin : filled + end], cache=cache).logits)
        cache.crop(-5)
        for t in range(9, 26):  # long enough to close a block
            found.append(model(ids[:, filled + t : filled + t + 1], cache=cache).logits)
        cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
        found.append(model(ids.flip(0)[:, filled + 26 : filled + 30], cache=cache).logits)
    return torch.cat([x.float() for x in found], 1)


def relative(a, b):
    return float((a - b).norm() / (b - b.mean((0, 1))).norm())


STATISTICS = {
    "sequence": {},
    "calibration": {"calibration": True},
    "exact values": {"v_bits": None},
}


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("fill", MODES)
def test_fill_in_one_mode_and_use_in_any(tiny, token_ids, statistics, fill):
    model = tiny().requires_grad_(False)
    ids, options = token_ids(2, 200), NEAR_EXACT | STATISTICS[statistics]
    if "calibration" in options:
        options["calibration"] = calibrate(model, [token_ids(2, 300, seed=9)], progress=False)
    quantize_(model, headq_config(**options))
    for filled in FILLS:
        plain = logits(model, ids, HeadQCache(model), "no_grad", "no_grad", filled)
        for use in MODES:
            cache = HeadQCache(model)
            found = logits(model, ids, cache, fill, use, filled)
            assert filled < 100 or cache.rows_read[0] > 0
            assert not any(t.is_inference() for t in cache.tensors())
            if fill in ROUNDED or use in ROUNDED:
                assert relative(found, plain) < 0.05, (fill, use, filled)
            else:
                assert torch.equal(found, plain), (fill, use, filled)


@pytest.mark.parametrize("mode", MODES)
def test_every_entry_point(tiny, tmp_path, mode):
    """calibrate, quantize_, generate, save, load, copies, reports and checkpoints give what they do without a mode."""

    text = torch.randint(3, 128, (2, 300), generator=torch.Generator("cpu").manual_seed(9), device="cpu")

    def run():
        model = tiny().requires_grad_(False)
        ids = torch.randint(3, 128, (1, 150), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        with context():
            calibration = calibrate(model, [text], progress=False)
            calibration.save(tmp_path / "calibration.safetensors")
            options = NEAR_EXACT | {"calibration": Calibration.load(tmp_path / "calibration.safetensors")}
            quantize_(model, headq_config(**options))
            cache = HeadQCache(model)
            first = model.generate(ids, cache=cache, max_new_tokens=8, do_sample=False)
            cache.save(tmp_path / "prompt.safetensors")
            copied = copy.deepcopy(cache)
            loaded = HeadQCache.load(tmp_path / "prompt.safetensors", model)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([1], device="cpu"))
            estimate = estimate_memory(model, model._headq.config, tokens=150)
            model.save_pretrained(tmp_path / "model")
            if mode != "device meta":  # where transformers refuses
                reloaded = type(model).from_pretrained(tmp_path / "model")
        if mode == "device meta":
            reloaded = type(model).from_pretrained(tmp_path / "model")
        with torch.no_grad():  # and outside
            more = [model.generate(first, cache=c, max_new_tokens=24, do_sample=False) for c in (cache, copied, loaded)]
            again = reloaded.generate(ids, max_new_tokens=8, do_sample=False)
        restore_(model)
        return first, again, *more, cache.bits_report().to_dict(), estimate.to_dict()

    context = torch.no_grad
    expected = run()
    context = MODES[mode]
    found = run()
    assert all(torch.equal(x, found[2]) for x in found[3:5])
    if mode not in ROUNDED:
        for a, b in zip(expected[:5], found[:5], strict=True):
            assert torch.equal(a, b)
        assert expected[5:] == found[5:]


def test_accelerator_with_mixed_precision(tiny, token_ids):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests may have made one
    ids, model = token_ids(1, 150), tiny()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with torch.no_grad():
        exact = prepared(ids).logits
    calibration = calibrate(prepared, [token_ids(2, 300, seed=9)], progress=False)
    quantize_(model, headq_config(**NEAR_EXACT, calibration=calibration))
    with torch.no_grad():
        cache = HeadQCache(model)
        found = torch.cat([prepared(part, cache=cache).logits for part in ids.split([100, 30, *[1] * 20], 1)], 1)
    assert relative(found, exact) < 0.05
    assert cache.rows_read[0] > 0


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
INTEGERS = {"arange", "tensor", "as_tensor", "full"}  # may take the dtype of their arguments


def unnamed(source):
    """Lines of the tensor factories in a module that leave the device, or a floating dtype, to what is set."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
            name = node.func.attr
            given = {k.arg for k in node.keywords}
            needed = {"device"} if name in INTEGERS else {"device", "dtype"}
            if name in FACTORIES and None not in given and not needed <= given:  # None: ``**options``
                yield node.lineno


def test_tensors_are_made_on_a_named_device_in_a_named_dtype():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("headq_ao", "ops")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "lm_eval" not in path.parts and path.name != "triton_kernel.py"
        for line in unnamed(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert list(unnamed("x = torch.zeros(2)\ny = torch.arange(3)\nz = torch.arange(3, device=d)")) == [1, 2]
