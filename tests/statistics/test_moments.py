"""Moments of a layer: what is weighted, and how."""

import torch

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
