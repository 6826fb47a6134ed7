"""transformers' own quantized caches: counted, otherwise untouched."""

import pytest
import torch
from transformers import QuantizedCache

from headq_ao.evals.baselines.transformers_cache import TransformersCache
from headq_ao.integrations.transformers.models import CACHE_NAME

BACKENDS = [
    ("fp8", {}, None),
    ("quanto", {"nbits": 2, "q_group_size": 32, "residual_length": 32}, "optimum.quanto"),
    ("quanto", {"nbits": 4, "q_group_size": 32, "residual_length": 32}, "optimum.quanto"),
    ("hqq", {"nbits": 4, "q_group_size": 32, "residual_length": 32, "axis_key": 1, "axis_value": 1}, "hqq"),
]
IDS = [f"{name}-{options.get('nbits', 8)}bit" for name, options, _ in BACKENDS]


def skip_without(package):
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("backend", "options", "package"), BACKENDS, ids=IDS)
def test_counts(tiny, token_ids, backend, options, package):
    skip_without(package)
    model, ids = tiny(), token_ids(1, 96)
    try:
        theirs = QuantizedCache(backend, model.config, **options)
    except ValueError as error:
        pytest.skip(f"this transformers has none: {error}")
    ours = TransformersCache(backend, model.config, **options)
    for call in (slice(0, 64), slice(64, 80), slice(80, 96)):
        a, b = (model(ids[:, call], cache=cache).logits for cache in (ours, theirs))
        assert torch.equal(a, b)
    packed, read = ours.rows_read
    assert read == 2 * 96 * 97 // 2  # two layers, each query and those before it
    assert packed == 2 * (16 * 64 + 16 * (80 if backend == "fp8" else 64))
    report = ours.bits_report()
    if backend == "fp8":
        assert report.key_body_bits == pytest.approx(8, abs=0.01)
    else:  # codes, and a scale and a zero of 16 bits for 32 values
        assert report.key_body_bits == report.value_body_bits == options["nbits"] + 1
    waiting = 0 if backend == "fp8" or CACHE_NAME == "cache" else 32  # before 5.24 a window that is just full waits
    assert report.exact_rows == waiting and report.tokens == 96
