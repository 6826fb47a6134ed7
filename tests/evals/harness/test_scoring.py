"""Scores through a cache: against hand-computed values, and their refusals."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from headq_ao import headq_config, quantize_, restore_
from headq_ao.evals.harness.scoring import NothingPackedError, exact_logprobs, score

PREFILL, CHUNK = 64, 40


def test_exact_cache_scores_zero_kl(tiny, token_ids):
    model, rows = tiny(), token_ids(2, 150)
    exact = exact_logprobs(model, rows, PREFILL, progress=False)
    result = score(model, rows, exact, prefill=PREFILL, chunk=CHUNK, make_cache=DynamicCache, progress=False)
    assert abs(result.mean_kl) < 1e-6
    assert result.ppl_ratio == pytest.approx(1, abs=1e-5)
    assert result.perplexity == pytest.approx(result.exact_perplexity, rel=1e-5)
    assert result.flips == 0
    assert result.packed_fraction == 0
    assert result.tokens == 2 * (150 - PREFILL)


def test_exact_perplexity_is_the_models_loss(tiny, token_ids):
    """One row, compared with log-softmax over the plain logits, target by target."""
    model, rows = tiny(), token_ids(1, 100)
    exact = exact_logprobs(model, rows, PREFILL, progress=False)
    result = score(model, rows, exact, prefill=PREFILL, chunk=CHUNK, make_cache=DynamicCache, progress=False)
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits[0]
    nll = torch.nn.functional.cross_entropy(logits[PREFILL - 1 : -1], rows[0, PREFILL:])
    assert result.exact_perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.ppl_ratio_sem is None and result.mean_kl_sem is None


class TwoWords:
    """A stand-in model over two tokens that gives token 1 the probability ``p`` everywhere."""

    device = torch.device("cpu")

    def __init__(self, p):
        self.logits = torch.tensor([1 - p, p]).log()

    def __call__(self, ids, cache=None, use_cache=None, logits_to_keep=0):
        n = logits_to_keep or ids.shape[1]
        return SimpleNamespace(logits=self.logits.expand(1, n, 2))


def test_hand_computed():
    """Row 0 1 1 0 0, two tokens of prefill: targets 1 0 0, positions 2 3 4."""
    rows = torch.tensor([[0, 1, 1, 0, 0]])
    exact = exact_logprobs(TwoWords(0.5), rows, 2, progress=False)
    assert [tuple(e.shape) for e in exact] == [(4, 2)]
    result = score(TwoWords(0.8), rows, exact, prefill=2, chunk=2, make_cache=object, progress=False)
    nll = -(math.log(0.8) + 2 * math.log(0.2)) / 3
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.exact_perplexity == pytest.approx(2, rel=1e-6)
    assert result.ppl_ratio == pytest.approx(math.exp(nll) / 2, rel=1e-5)
    assert result.mean_kl == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), rel=1e-5)
    assert result.kl_by_row == [result.mean_kl]
    assert result.tokens == 3


def test_packed_cache(tiny, token_ids):
    model, rows = tiny(), token_ids(2, 200)
    exact = exact_logprobs(model, rows, PREFILL, progress=False)
    options = {"warmup_tokens": 32, "residual_length": 16, "block_size": 16}
    kl = []
    for bits in (8, 2):
        quantize_(model, headq_config(k_bits=bits, v_bits=bits, rank=0, **options))
        result = score(model, rows, exact, prefill=PREFILL, chunk=CHUNK, progress=False)
        assert 0.5 < result.packed_fraction < 1
        scales = (8 if bits == 2 else 16) + 16  # of keys, and of values without a calibration
        assert result.report["packed_bits_per_element"] == bits + scales / 2 / 32
        assert result.mean_kl == pytest.approx(sum(result.kl_by_row) / 2)
        assert result.mean_kl_sem > 0 and result.ppl_ratio_sem > 0
        kl.append(result.mean_kl)
        restore_(model)
    assert 0 < kl[0] < kl[1] / 20


def test_fails_when_nothing_was_packed(tiny, token_ids):
    model, rows = tiny(), token_ids(1, 100)
    exact = exact_logprobs(model, rows, PREFILL, progress=False)
    quantize_(model, headq_config())
    with pytest.raises(NothingPackedError, match="no packed token was read in 1 rows of 100 tokens"):
        score(model, rows, exact, prefill=PREFILL, chunk=CHUNK, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prefill": 100}, "prefill must lie between 1"), ({"prefill": 10, "chunk": 0}, "chunk must be at least 1")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        score(TwoWords(0.5), torch.zeros(1, 100, dtype=torch.long), [torch.zeros(1, 2)], progress=False, **options)
