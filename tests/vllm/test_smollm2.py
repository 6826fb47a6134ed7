"""A real model: its text, and its perplexity and KL to vLLM's bf16 cache, in chunks, after a prefix hit, one by one."""

import gc
from pathlib import Path

import pytest

from headq_ao.evals.harness.texts import find_text, token_rows
from headq_ao.evals.models import smollm2
from headq_ao.evals.vllm import quality, server
from headq_ao.evals.vllm.engine import EngineSpec
from tests.vllm.engines import PLAIN, clean, greedy, headq_options, start, stop

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

FIRST, LENGTH = 256, 640
FOLDER = Path(__file__).parents[2] / "build" / "vllm"


@pytest.fixture(scope="module")
def model():
    """Checkpoint folder and calibration, made once for a checkout."""
    try:
        smollm2.package_folder()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    folder, calibration = server.smollm2(FOLDER)
    return str(folder), str(calibration)


@pytest.fixture(scope="module")
def rows():
    return token_rows(smollm2.load_tokenizer(), find_text("bundled", "report"), 1, LENGTH).tolist()


def score(model, rows, cache, reference, chunk=64, hit=False):
    """What :func:`quality.measure` says, in this process."""
    headq = {"calibration": model[1]} if cache == "headq" else {}
    spec = EngineSpec(
        model[0], cache, batched_tokens=chunk, sequences=1, prefix_caching=True, headq=headq, cache_bytes=256 << 20
    )
    try:
        return quality.measure(spec, rows, FIRST, hit, str(reference), lambda step: None)
    finally:
        gc.collect()
        clean()


def test_it_answers(model):
    llm = start(model[0], dtype="bfloat16", block_size=None, **headq_options(model[1]))
    try:
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        text = llm.chat(chat, greedy(30, ignore_eos=False), use_tqdm=False)[0].outputs[0].text
    finally:
        stop(llm)
    assert "Paris" in text


@pytest.mark.skipif(PLAIN, reason="a ratio to vLLM's own cache")
def test_perplexity_and_divergence_in_chunks_and_after_a_prefix_hit(model, rows, tmp_path):
    reference = tmp_path / "bf16.pt"
    exact = score(model, rows, "bf16", reference)
    packed = score(model, rows, "headq", reference)
    assert exact["kl"] is None and packed["perplexity"] / exact["perplexity"] < 1.02
    assert 0 < packed["kl"] < 0.02
    found = score(model, rows, "headq", reference, hit=True)
    assert found["cached_tokens"] == [FIRST] and found["kl"] == pytest.approx(packed["kl"], rel=0.02)
