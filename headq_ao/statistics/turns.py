"""Rotary turns of rows by some numbers of positions."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Turns:
    """Rotary turns by some numbers of positions: ``x · cos + x[partner] · sin``.

    ``cos``, ``sin`` ``[P, D]``, ``partner [D]``: the other coordinate of the pair that is turned.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    def turned(self, x: Tensor) -> list[Tensor]:
        """The rows ``[.., D]`` after each turn.

        Example:
            >>> import torch
            >>> from headq_ao.statistics.turns import Turns
            >>> quarter = Turns(torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.tensor([1, 0]))
            >>> quarter.turned(torch.tensor([3.0, 0.0]))[0].tolist()
            [0.0, 3.0]
        """
        other = x[..., self.partner]
        return [x * c + other * s for c, s in zip(self.cos.to(x.dtype), self.sin.to(x.dtype), strict=True)]
