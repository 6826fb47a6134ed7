"""A small calibration, and what makes two the same, for tests."""

import torch

from headq_ao import Calibration
from headq_ao.statistics.moments import TENSORS, LayerMoments

N_SINK = 3


def assert_same(a, b):
    assert (a.fingerprint, a.meta) == (b.fingerprint, b.meta)
    assert_same_moments(a, b)


def assert_same_moments(a, b):
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert (x.tokens, x.groups, x.effective) == (y.tokens, y.groups, y.effective)
        for name in TENSORS:
            assert torch.equal(getattr(x, name), getattr(y, name)), name


SEEN = ("q_seen_outer", "k_seen", "k_seen_sum", "k_seen_outer", "v_seen", "v_seen_sum", "v_seen_outer")


def small_calibration():
    """One of two layers with exact numbers in every field."""
    g = torch.Generator().manual_seed(0)
    shapes = {"outer": (2, 4, 4), "sum": (2, 4), "seen": (2,), "rows": (5, 2, 4)}

    def moments(tokens):
        tensors = {name: torch.randn(shapes[name.rpartition("_")[2]], generator=g) for name in TENSORS}
        tensors["k_rows"] = tensors["k_rows"].transpose(1, 2).mT
        return LayerMoments(tokens, 3, **tensors)

    print_ = {"model_type": "llama", "layers": 2, "rope": "None", "weights": [0.1, 0.25]}
    return Calibration([moments(7), moments(9)], print_, {"source": "text, “quoted”", "tokens": 16})
