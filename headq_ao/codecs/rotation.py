"""A model's rotary embedding at any position, for codecs that write keys as they were before it, or as they would be at
the start of a context."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.ops.types import SegmentFrame
from headq_ao.statistics.moments import LayerMoments
from headq_ao.statistics.rope_shift import RopeShift

CONTEXT = 4096  # positions over which statistics of segments are spread where a codec reads no segments
POSITIONS = 2**15  # of a model that does not say
MOST_POSITIONS = 2**20  # that frames have tables for; later tokens are of the last segment


@dataclass(frozen=True)
class Rotation:
    """Rotation of pairs of coordinates: ``x_i cos(p θ_i) + x_{partner(i)} sin(p θ_i)`` at position p.

    ``angle [D]`` float64, of opposite sign in the two of a pair, and ``partner [D]``.

    Example:
        >>> import torch
        >>> from headq_ao.codecs.rotation import Rotation
        >>> quarter = Rotation(torch.tensor([-1.0, 1.0]).double() * torch.pi / 2, torch.tensor([1, 0]))
        >>> quarter.at(torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[1]])).round().tolist()
        [[[[0.0, 3.0]]]]
    """

    angle: Tensor
    partner: Tensor

    @classmethod
    def of_shift(cls, shift: RopeShift) -> "Rotation":
        """From the rotation by one position, the last of ``shift``."""
        return cls(torch.atan2(shift.sin[-1].double(), shift.cos[-1].double()), shift.partner)

    def frame(self, tokens: int, positions: int, device: torch.device) -> SegmentFrame:
        """The frame of segments of ``tokens`` tokens in contexts of ``positions``, the same object each time."""
        count = max(-(-min(positions, MOST_POSITIONS) // tokens), 1)
        return _frame(tuple(self.angle.tolist()), tuple(self.partner.tolist()), tokens, count, torch.device(device))

    def at(self, x: Tensor, position: Tensor) -> Tensor:
        """``x [B, H, n, D]`` rotated by ``position [B, n]``; by minus the position, rotated back."""
        angle = (position[..., None].double() * self.angle.to(x.device))[:, None]
        return x * angle.cos().to(x.dtype) + x[..., self.partner.to(x.device)] * angle.sin().to(x.dtype)


def in_model_frame(moments: LayerMoments, rotation: Rotation) -> LayerMoments:
    """Moments in the frame of segments as they are in the model's own, over a context of :data:`CONTEXT` positions, for
    codecs that take keys as they come: ``C = mean_s R_s C R_sᵀ``."""
    if not moments.segment_tokens:
        return moments
    device = moments.k_sum.device
    count = max(CONTEXT // moments.segment_tokens, 1)
    frame, every = rotation.frame(moments.segment_tokens, CONTEXT, device), torch.arange(count, device=device)

    def mean(x: Tensor) -> Tensor:  # of rows [.., D]
        return frame.into(x.unsqueeze(-2).expand(*x.shape[:-1], count, -1), every, back=True).mean(-2)

    def outer(x: Tensor) -> Tensor:
        one = frame.into(x.unsqueeze(-3).expand(*x.shape[:-2], count, -1, -1), every[:, None], back=True)
        return frame.into(one.mT, every[:, None], back=True).mT.mean(-3)

    made = {name: x for name, x in moments.tensors().items() if name[0] in "qk" and name != "k_seen"}
    turned: dict[str, Any] = {
        n: outer(x) if n.endswith(("outer", "fisher")) else mean(x) for n, x in made.items() if n != "k_rows"
    }
    turned["k_rows"] = frame.into(
        moments.k_rows, every[torch.arange(len(moments.k_rows), device=device) % count][:, None], back=True
    )
    return dataclasses.replace(moments, segment_tokens=0, **turned)


@functools.lru_cache(maxsize=64)
@mode_neutral
def _frame(
    angle: tuple[float, ...], partner: tuple[int, ...], tokens: int, count: int, device: torch.device
) -> SegmentFrame:
    """All layers of a model that turn alike share it."""
    start = tokens * torch.arange(count, dtype=torch.float64, device="cpu")
    by = start[:, None] * torch.tensor(angle, dtype=torch.float64, device="cpu")
    table = torch.stack([by.cos(), -by.sin()], 1).float()
    return SegmentFrame(table.to(device), torch.tensor(partner, dtype=torch.int32, device="cpu").to(device), tokens)
