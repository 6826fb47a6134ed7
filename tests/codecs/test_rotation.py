"""A rotary embedding at any position, and the frame of segments that it makes."""

import torch

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
