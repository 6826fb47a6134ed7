"""Frames of segments for tests of operators."""

import torch

from headq_ao.ops.types import SegmentFrame


def some_frame(dim: int, tokens: int, count: int = 40, rotary: int | None = None, paired: bool = True) -> SegmentFrame:
    """A rotary embedding of the first ``rotary`` of ``dim`` coordinates; ``paired``: coordinate ``i`` turns with
    ``i + rotary / 2``, else with its neighbour."""
    rotary = dim if rotary is None else rotary
    half = rotary // 2
    i = torch.arange(rotary)
    if paired:
        partner, pair, first = (i + half) % rotary, i % half, i < half
    else:
        partner, pair, first = i ^ 1, i // 2, i % 2 == 0
    angle = 10000.0 ** (-2 * pair.double() / rotary) * torch.where(first, 1, -1)  # by minus the position
    rest = torch.arange(rotary, dim)
    angle, partner = torch.cat([angle, rest.double() * 0]), torch.cat([partner, rest])
    by = (torch.arange(count).double() * tokens)[:, None] * angle
    return SegmentFrame(torch.stack([by.cos(), by.sin()], 1).float(), partner.int(), tokens)
