"""Rotary embeddings at other positions: rotated copies of queries and keys."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RopeShift:
    """Rotation by some numbers of positions: ``x · cos + x[partner] · sin``.

    ``cos``, ``sin`` ``[P, D]``, ``partner [D]``: the other coordinate of the pair that is rotated.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    def shifted(self, x: Tensor) -> list[Tensor]:
        """``x [.., D]`` as it would be at each of the positions.

        Example:
            >>> import torch
            >>> from headq_ao.statistics.rope_shift import RopeShift
            >>> quarter = RopeShift(torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.tensor([1, 0]))
            >>> quarter.shifted(torch.tensor([3.0, 0.0]))[0].tolist()
            [0.0, 3.0]
        """
        other = x[..., self.partner]
        return [x * c + other * s for c, s in zip(self.cos.to(x.dtype), self.sin.to(x.dtype), strict=True)]
