"""Quantized models on a GPU against the same models on the CPU. Skipped where there is none.

The kernels alone run there with ``python -m pytest tests/ops/paged_interpreted.py tests/ops/feedback_interpreted.py``.
"""

import copy

import pytest
import torch
from transformers import CompileConfig

from headq_ao import Calibration, HeadQCache, calibrate, headq_config, quantize_
from headq_ao.ops import dispatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PROMPT, STEPS = 90, 80  # the first tokens leave the default's sinks and window while decoding
AFFINE = {"key_codec": "affine", "value_codec": "affine"}


def relative(found, expected):
    """Relative error, computed on the CPU in fp64."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def run(model, tokens, chunks, **arguments):
    """Logits of calls of those lengths, and the cache."""
    cache, logits, at = HeadQCache(model), [], 0
    tokens = tokens.to(model.device)
    with torch.no_grad():
        for n in chunks:
            logits.append(model(tokens[:, at : at + n], cache=cache, **arguments).logits)
            at += n
    return torch.cat(logits, 1), cache


def compare(model, config, tokens, chunks, limit=5e-3):
    """The CPU's numbers on the GPU: tf32 is off, codes may differ where a level is a tie."""
    on_gpu = copy.deepcopy(model).cuda()
    for m in (model, on_gpu):
        quantize_(m, config)
    expected, cpu = run(model, tokens, chunks)
    found, gpu = run(on_gpu, tokens, chunks)
    assert gpu.rows_read == cpu.rows_read and gpu.packed_fraction > 0
    assert gpu.layers[0].pool.tensors[0].device.type == "cuda"
    assert relative(found, expected) <= limit


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3", "phi3", "gpt_neox", "gpt2"])
def test_families(tiny, token_ids, family):
    compare(tiny(family), headq_config(warmup_tokens=32), token_ids(2, PROMPT + STEPS), [PROMPT] + [1] * STEPS)


@pytest.mark.parametrize(
    "options",
    [
        {"k_bits": 3, "v_bits": 3},
        {"k_bits": 4, "v_bits": 2},
        {"k_bits": 1, "v_bits": 6},
        {"v_bits": None},
        {"k_bits": None},
        {"rank": 8},
        AFFINE,
        AFFINE | {"k_zero_point": True, "v_zero_point": True, "v_group_size": 16},
        {"error_feedback": False},
    ],
    ids=str,
)
def test_settings(tiny, token_ids, options):
    config = headq_config(warmup_tokens=32, **options)
    compare(tiny(head_dim=64), config, token_ids(2, PROMPT + STEPS), [PROMPT] + [1] * STEPS)


@pytest.mark.parametrize("mean_bits", [2.25, 3.0])
def test_calibrated(tiny, token_ids, tmp_path, mean_bits):
    """Calibrated on the GPU, and read back from the file."""
    model = tiny(head_dim=64)
    rows = list(token_ids(4, 192, seed=1).split(1))
    on_gpu, on_cpu = (calibrate(m, rows, progress=False) for m in (copy.deepcopy(model).cuda(), model))
    on_gpu.save(tmp_path / "calibration.safetensors")
    config = headq_config(calibration=str(tmp_path / "calibration.safetensors"), mean_bits=mean_bits)
    compare(model, config, token_ids(3, PROMPT + STEPS), [PROMPT] + [1] * STEPS)
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    assert loaded.meta == {**on_cpu.meta, **{k: loaded.meta[k] for k in loaded.meta if k not in on_cpu.meta}}


@pytest.mark.parametrize("chunk", [8, 40])
def test_chunks_on_history(tiny, token_ids, chunk):
    """A few queries at once go to the kernels, many to matrix products over unpacked pages."""
    compare(tiny(head_dim=64), headq_config(warmup_tokens=32), token_ids(2, 290), [130] + [chunk] * 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny, token_ids, dtype):
    """Near the fp32 model; 2-bit codes near a tie turn its rounding into whole levels."""
    model = tiny(head_dim=64).cuda()
    half = copy.deepcopy(model).to(dtype)
    for m in (model, half):
        quantize_(m, headq_config(warmup_tokens=32))
    tokens, chunks = token_ids(2, PROMPT + STEPS).cuda(), [PROMPT] + [1] * STEPS
    assert relative(run(half, tokens, chunks)[0], run(model, tokens, chunks)[0]) <= 0.1


def test_padded_batch_and_generate(tiny, token_ids):
    model = tiny()
    on_gpu = copy.deepcopy(model).cuda()
    tokens = token_ids(2, 150)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    out = []
    for m in (model, on_gpu):
        quantize_(m, headq_config(k_bits=8, v_bits=8, warmup_tokens=32))
        ids = {"input_ids": tokens.to(m.device), "attention_mask": mask.to(m.device)}
        out.append(m.generate(**ids, max_new_tokens=24, do_sample=False).cpu())
        out.append(m.generate(**ids, max_new_tokens=24, num_beams=3).cpu())
    assert torch.equal(out[0], out[2]) and torch.equal(out[1], out[3])


def test_kernels_are_used(tiny, token_ids, monkeypatch):
    """Where the kernels are taken away, the numbers change in their last digits."""
    model = tiny(head_dim=64).cuda()
    quantize_(model, headq_config(warmup_tokens=32))
    tokens = token_ids(2, PROMPT + STEPS)
    chunks = [PROMPT] + [1] * STEPS
    found, _ = run(model, tokens, chunks)
    assert all(dispatch.kernels(operator, "cuda") is not None for operator in dispatch.KERNELS)
    monkeypatch.setattr(dispatch, "KERNELS", {})
    expected, _ = run(model, tokens, chunks)
    assert not torch.equal(found, expected)
    assert relative(found, expected) <= 5e-3


def test_a_step_does_not_wait_for_the_gpu(tiny, token_ids):
    """Nothing of HeadQ's in a decoding step synchronizes, so launches run ahead of the GPU; each packs a token."""
    model = tiny(head_dim=64)
    calibration = calibrate(model, list(token_ids(4, 192, seed=1).split(1)), progress=False)
    model = model.cuda()
    quantize_(model, headq_config(calibration=calibration))
    tokens = token_ids(2, 200).cuda()
    _, cache = run(model, tokens, [130])
    with torch.no_grad():
        model(tokens[:, 130:131], cache=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(tokens[:, 131:132], cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_decoding(tiny, token_ids):
    """One graph, no recompilation, the eager tokens; through Inductor."""
    model = tiny().cuda()
    quantize_(model, headq_config(k_bits=8, v_bits=8, warmup_tokens=32))
    for seed in (0, 1):
        ids = token_ids(1, 120, seed=seed).cuda()
        eager = model.generate(ids, max_new_tokens=40, do_sample=False)
        with torch._dynamo.config.patch(error_on_recompile=seed == 1):
            compiled = model.generate(
                ids, max_new_tokens=40, do_sample=False, compile_config=CompileConfig(fullgraph=True)
            )
        assert torch.equal(eager, compiled)
