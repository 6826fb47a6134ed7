"""Methods by name."""

import pytest

from headq_ao.evals.baselines.codecs import Affine, LowRank
from headq_ao.evals.baselines.methods import METHODS, build


def test_kivi():
    method = build("kivi", {"k_bits": 2, "v_bits": 4, "k_group": 64, "v_group": 16})
    assert method.keys == Affine(2, 64, per_channel=True) and method.values == Affine(4, 16)
    assert method.unit == 64


@pytest.mark.parametrize("name", METHODS)
def test_one_side(name):
    assert build(name, {"k_bits": None, "v_bits": 2}).keys is None
    assert build(name, {"k_bits": 2, "v_bits": None}).values is None


def test_gear_is_a_residual_on_kivi():
    method = build("gear", {"k_bits": 2, "v_bits": 2, "rank": 3, "block": 64})
    assert isinstance(method.keys, LowRank) and method.keys.rank == 3 and method.unit == 64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kv", {}, "no method 'kv'; there are kivi, per_token, hadamard"),
        ("kivi", {"k_bits": 2, "v_bits": 2, "bits": 2}, "kivi has no option bits; its options are k_bits, v_bits"),
        ("kivi", {"k_bits": 2}, "kivi needs v_bits"),
        ("hadamard", {"k_bits": 2, "v_bits": 2, "calibration": 1}, "has no option calibration"),
        ("kivi", {"k_bits": None, "v_bits": None}, "k_bits and v_bits are both None"),
        ("gear", {"k_bits": 2, "v_bits": 2, "k_group": 48}, "groups of 48 tokens must divide its blocks of 128"),
    ],
)
def test_refuses(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, options)


def test_group_must_divide_head_dim():
    with pytest.raises(ValueError, match="must divide head_dim 64, got 48"):
        build("kivi", {"k_bits": 2, "v_bits": 2, "v_group": 48}).check_head_dim(64)
