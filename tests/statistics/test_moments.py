"""Moments of a layer: what is weighted, and how."""

import dataclasses

import pytest
import torch

from headq_ao.statistics.moments import segment_tokens, tensor_shapes
from tests.calibration.moments import small_calibration


def test_seen_mixes_a_quarter_of_plain_statistics():
    moments = small_calibration().layers[0]
    for side in ("k", "v"):
        weight, plain, seen = (
            torch.tensor([2.0, 5.0]),
            *(getattr(moments, f"{side}_{n}") for n in ("sum", "seen_sum")),
        )
        setattr(moments, f"{side}_seen", weight)
        mean, outer = moments.weighted(side)
        torch.testing.assert_close(mean, 0.25 * plain / 7 + 0.75 * seen / weight[:, None])
        plain, seen = (getattr(moments, f"{side}_{n}") for n in ("outer", "seen_outer"))
        torch.testing.assert_close(outer, 0.25 * plain / 7 + 0.75 * seen / weight[:, None, None])
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    moments.q_seen_outer = q.mT @ q
    torch.testing.assert_close(moments.weighted_c_q, q.mT @ q / 21)  # 7 tokens of 3 query heads


def test_what_was_never_seen_counts_as_plain():
    """A head without weight, say of a calibration of sequences shorter than the window that stays exact."""
    moments = small_calibration().layers[0]
    for side in ("k", "v"):
        weight = getattr(moments, f"{side}_seen")
        weight[0], weight[1] = 0.0, 3.0
        getattr(moments, f"{side}_seen_sum")[0] = getattr(moments, f"{side}_seen_outer")[0] = 0.0
        mean, outer = moments.weighted(side)
        torch.testing.assert_close(mean[0], getattr(moments, f"{side}_sum")[0] / 7)
        torch.testing.assert_close(outer[0], getattr(moments, f"{side}_outer")[0] / 7)
        assert not torch.allclose(mean[1], getattr(moments, f"{side}_sum")[1] / 7)
    moments.q_seen_outer = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    torch.testing.assert_close(moments.weighted_c_q, torch.stack([moments.c_q[0], torch.eye(4) / 21]))


def test_plain_moments_are_means():
    moments = small_calibration().layers[0]  # 7 tokens of 3 query heads
    torch.testing.assert_close(moments.c_q, moments.q_outer / 21)
    torch.testing.assert_close(moments.k_mean, moments.k_sum / 7)


def test_errors_are_shares_of_the_layers_energy():
    moments = small_calibration().layers[0]
    moments.errors, moments.energy = torch.arange(16.0).view(2, 2, 4), torch.tensor([3.0, 5.0])
    assert moments.relative_errors(0) == [[0.0, 0.125, 0.25, 0.375], [1.0, 1.125, 1.25, 1.375]]
    assert moments.relative_errors(1)[1] == [1.5, 1.625, 1.75, 1.875]


def test_units_are_of_the_rms_and_leave_ordinary_rows_alone():
    """A head of keys 2²⁰ times as large is divided by that; all that is linear in it once, squares twice."""
    moments = small_calibration().layers[0]
    for side, heads in (("q", 21), ("k", 7), ("v", 7)):
        setattr(moments, f"{side}_outer", heads * torch.eye(4).repeat(2, 1, 1))
        assert moments.unit(side) is None
    assert all(torch.equal(x, moments.tensors()[n]) for n, x in moments.in_units().tensors().items())
    moments.k_outer[1] *= 2.0**40
    assert moments.unit("k").tolist() == [[[1.0], [2.0**21]]], "divided by it, their RMS is half"
    found = moments.in_units()
    powers = {"k_sum": 1, "k_seen_sum": 1, "k_outer": 2, "k_seen_outer": 2, "k_seen": 0, "v_sum": 0}
    for name, power in powers.items():
        x = getattr(moments, name)
        assert torch.equal(getattr(found, name)[1], x[1] / 2.0 ** (21 * power)), name
        assert torch.equal(getattr(found, name)[0], x[0])
    assert torch.equal(found.k_rows, moments.k_rows / torch.tensor([1.0, 2.0**21])[:, None])


def test_models_of_many_positions_have_longer_segments():
    assert [segment_tokens(n) for n in (1, 2**15, 2**15 + 1, 2**20)] == [256, 256, 512, 512]


@pytest.mark.parametrize("value_dim", [None, 6])
def test_shapes_are_those_of_the_tensors(value_dim):
    shapes = tensor_shapes(2, 4, 5, value_dim)
    moments = small_calibration().layers[0]
    if value_dim is None:
        assert all(x.shape == shapes[name] for name, x in moments.tensors().items())
    assert (shapes["v_sum"], shapes["v_outer"]) == ((2, value_dim or 4), (2, value_dim or 4, value_dim or 4))
    assert (shapes["k_sum"], shapes["k_rows"], shapes["errors"], shapes["v_seen"]) == (
        (2, 4),
        (5, 2, 4),
        (2, 2, 4),
        (2,),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 0}, "groups must be a whole number of at least 1"),
        ({"tokens": 2.0}, "tokens must be a whole number of at least 1"),
        ({"errors": torch.zeros(2, 2, 4)}, "errors and energy must come together"),
        ({"errors": torch.zeros(2, 2, 3), "energy": torch.zeros(2)}, r"errors must be \(2, 2, 4\), got \(2, 2, 3\)"),
        ({"k_seen": torch.zeros(2).double()}, "k_seen must hold finite float32 numbers"),
    ],
)
def test_what_does_not_fit_together_is_named_with_its_layer(changes, message):
    moments = small_calibration().layers[0]
    moments.check(3)
    with pytest.raises(ValueError, match=f"layer 3: {message}"):
        dataclasses.replace(moments, **changes).check(3)
