"""A model's rotary embedding at any position, for codecs that write keys as they were before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.statistics.rope_shift import RopeShift


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

    def at(self, x: Tensor, position: Tensor) -> Tensor:
        """``x [B, H, n, D]`` rotated by ``position [B, n]``; by minus the position, rotated back."""
        angle = (position[..., None].double() * self.angle.to(x.device))[:, None]
        return x * angle.cos().to(x.dtype) + x[..., self.partner.to(x.device)] * angle.sin().to(x.dtype)
