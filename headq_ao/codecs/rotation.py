"""A model's rotary embedding at any position, for codecs that write keys as they were before it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.statistics.turns import Turns


@dataclass(frozen=True)
class Rotation:
    """Rotary turns of pairs of coordinates: ``x_i cos(p θ_i) + x_{partner(i)} sin(p θ_i)`` at position p.

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
    def of_turn(cls, turns: Turns) -> "Rotation":
        """From the turn by one position, the last of ``turns``."""
        return cls(torch.atan2(turns.sin[-1].double(), turns.cos[-1].double()), turns.partner)

    def at(self, x: Tensor, position: Tensor) -> Tensor:
        """``x [B, H, n, D]`` turned by ``position [B, n]``; by minus the position, turned back."""
        turn = (position[..., None].double() * self.angle.to(x.device))[:, None]
        return x * turn.cos().to(x.dtype) + x[..., self.partner.to(x.device)] * turn.sin().to(x.dtype)
