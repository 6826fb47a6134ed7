"""A rotary embedding at any position, and the frame of segments that it makes."""

import dataclasses

import torch

from headq_ao.codecs.rotation import CONTEXT, MOST_POSITIONS, Rotation, in_model_frame
from headq_ao.statistics.rope_shift import RopeShift
from tests.cache.streams import moments
from tests.codecs.states import some_rotation


def test_a_frame_turns_back_by_whole_segments():
    """``R_sᵀ`` by the rotation itself at the start of the segment; and back again."""
    torch.manual_seed(0)
    rotation, k = some_rotation(), torch.randn(1, 2, 100, 16)
    frame = rotation.frame(32, 96, torch.device("cpu"))
    segment = frame.of(torch.arange(-4, 96))
    assert frame.tokens == 32 and segment.tolist() == [0] * 36 + [1] * 32 + [2] * 32
    there = frame.into(k, segment)
    torch.testing.assert_close(there, rotation.at(k, -32 * segment[None]))
    torch.testing.assert_close(frame.into(there, segment, back=True), k)
    assert frame.of(torch.tensor(10**6)) == 2 and rotation.frame(32, 96, torch.device("cpu")) is frame


def test_rows_turn_by_their_position():
    """Pair by pair, a complex number times ``exp(i p θ)``; by minus the position, back."""
    torch.manual_seed(0)
    rotation, x = some_rotation(), torch.randn(2, 3, 5, 16, dtype=torch.float64)
    position = torch.tensor([[0, 1, 7, -2, 1000], [3, 3, 3, 0, 5]])
    turned = rotation.at(x, position)
    phase = torch.exp(1j * position[:, None, :, None] * rotation.angle[8:])
    want = torch.complex(x[..., :8], x[..., 8:]) * phase
    torch.testing.assert_close(torch.complex(turned[..., :8], turned[..., 8:]), want)
    torch.testing.assert_close(rotation.at(turned, -position), x)
    assert rotation.at(x.half(), position).dtype == torch.float16


def test_the_rotation_of_a_shift_is_that_of_its_last_position():
    rotation = some_rotation()
    angle = rotation.angle
    by_0_and_1 = torch.stack([0 * angle, angle])
    shift = RopeShift(by_0_and_1.cos(), by_0_and_1.sin(), rotation.partner)
    found = Rotation.of_shift(shift)
    torch.testing.assert_close(found.angle, angle)
    assert found.partner is rotation.partner


def test_frames_end_with_the_context():
    """As many segments as positions fill, at least one, and no table without end."""
    rotation, cpu = some_rotation(), torch.device("cpu")
    for positions, segments in ((1, 1), (256, 1), (257, 2), (1 << 40, MOST_POSITIONS // 256)):
        assert len(rotation.frame(256, positions, cpu).table) == segments


def test_moments_in_the_models_frame_are_those_of_turned_rows():
    """``C = mean_s R_s C R_sᵀ`` and ``μ = mean_s R_s μ`` over the segments of a context, row by row."""
    torch.manual_seed(0)
    rotation = some_rotation(32)
    segments = CONTEXT // 256
    framed = dataclasses.replace(moments(), segment_tokens=256)
    framed = dataclasses.replace(framed, k_fisher=framed.k_outer.flip(-1, -2), v_fisher=framed.v_outer)
    found = in_model_frame(framed, rotation)
    assert found.segment_tokens == 0 and in_model_frame(found, rotation) is found
    at = 256 * torch.arange(segments)
    vectors = torch.eye(32).expand(1, segments, 32, 32).transpose(1, 2)  # [1, D, s, D]
    turn = rotation.at(vectors, at[None])[0].transpose(0, 1)  # [s, D, D]: rows are turned unit vectors
    torch.testing.assert_close(found.k_sum, (framed.k_sum @ turn.mean(0)), rtol=1e-4, atol=1e-3)
    for name in ("k_outer", "q_outer", "q_seen_outer", "k_fisher"):
        want = torch.stack([r.T @ getattr(framed, name) @ r for r in turn]).mean(0)
        torch.testing.assert_close(getattr(found, name), want, rtol=1e-4, atol=1e-3 * float(want.abs().max()))
    assert torch.equal(found.v_fisher, framed.v_fisher)
    assert torch.equal(found.v_outer, framed.v_outer) and torch.equal(found.k_seen, framed.k_seen)
    rows = rotation.at(framed.k_rows.transpose(0, 1)[None], (at.repeat(100)[: len(framed.k_rows)])[None])
    torch.testing.assert_close(found.k_rows, rows[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
