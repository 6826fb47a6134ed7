"""What an evaluation scores: put on and taken off a model, and its bits."""

import pytest
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, headq_config
from headq_ao.evals.harness.subjects import Subject


@pytest.mark.parametrize(
    ("method", "options", "kind", "cache_type"),
    [
        ("headq", {}, "headq", None),
        ("kivi", {"k_bits": 2, "v_bits": 2, "k_group": 64, "v_group": 32}, "baseline", None),
        ("fp8", {}, "transformers", None),
        ("exact", {}, "exact", DynamicCache),
    ],
)
def test_on_and_off(tiny, method, options, kind, cache_type):
    model, subject = tiny(), Subject(method, options)
    assert subject.kind == kind and subject.batchable == (kind != "transformers")
    with subject.on(model) as make_cache:
        assert hasattr(model, "_headq") == (kind in ("headq", "baseline"))
        assert make_cache is None or cache_type is None or isinstance(make_cache(), cache_type)
    assert not hasattr(model, "_headq")


def test_off_after_a_failure(tiny):
    model, subject = tiny(), Subject("headq")

    def fail():
        with subject.on(model):
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fail()
    assert not hasattr(model, "_headq")


def test_pages_follow_the_method(tiny):
    options, model = {"k_bits": 2, "v_bits": 2, "k_group": 128, "v_group": 32}, tiny()
    with Subject("kivi", options).on(model):
        assert HeadQCache(model).batch.page_tokens == 128
    with Subject("turboquant", {"k_bits": 2, "v_bits": 2}).on(model):
        assert HeadQCache(model).batch.page_tokens == headq_config().block_size
    shared = Subject("kivi", options | {"n_sink": 0, "residual_length": 32}).config
    assert (shared.n_sink, shared.residual_length) == (0, 32)


def test_seed_and_preset():
    assert Subject("headq", {"preset": "headq_paper", "rank": 4}, seed=3).config == headq_config(
        "headq_paper", rank=4, seed=3
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("kvi", {}, "no method 'kvi'; there are headq, exact, quanto, hqq, fp8, .*kivi"),
        ("headq", {"bits": 2}, "unknown option bits"),
        ("kivi", {"k_bits": 2, "v_bits": 2, "rank": 2}, "kivi has no option rank"),
        ("exact", {"k_bits": 2}, "the exact cache has no options, got k_bits"),
        ("kivi", {"k_bits": 2, "v_bits": 2, "k_group": 128, "block_size": 24}, "block_size must be 16, 32, 64 or 128"),
    ],
)
def test_refuses(method, options, message):
    with pytest.raises(ValueError, match=message):
        Subject(method, options)


def test_bits_and_memory(tiny, token_ids):
    model, subject = tiny(), Subject("headq", {"warmup_tokens": 32, "residual_length": 16})
    with subject.on(model):
        cache = HeadQCache(model)
        model(token_ids(1, 300), cache=cache)
        report = cache.bits_report().to_dict()
    bits = subject.bits(model, report)
    assert bits["body"] == report["packed_bits_per_element"] < bits["at"]["16384"] < bits["at"]["1024"]
    memory = subject.memory_bytes(model, bits, report)
    exact = Subject("exact").memory_bytes(model, {}, {})
    assert exact["4096"] == 2 * 4096 * 2 * 2 * 32 * 2  # sides, tokens, layers, heads, head_dim, bytes
    assert memory["65536"] < 0.25 * exact["65536"] and memory["1024"] < memory["4096"]


def test_one_exact_side(tiny, token_ids):
    model, subject = tiny(), Subject("hadamard", {"k_bits": None, "v_bits": 2, "group": 32, "residual_length": 16})
    with subject.on(model):
        cache = HeadQCache(model)
        model(token_ids(1, 200), cache=cache)
        report = cache.bits_report().to_dict()
    bits = subject.bits(model, report)
    assert bits["key"] is None and bits["value"] == bits["body"] == 3.0
    full = Subject("exact").memory_bytes(model, {}, {})["65536"]
    assert 0.5 * full < subject.memory_bytes(model, bits, report)["65536"] < 0.6 * full
    assert torch.isfinite(torch.tensor(bits["at"]["4096"]))
