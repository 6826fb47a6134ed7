"""How rows of any size are cut into heads that a codec stores."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor
from torch.nn import functional

from headq_ao.config import WIDEST_HEAD
from headq_ao.layer_shape import LayerShape

WIDEST, STEP = 256, 16  # coordinates of a head that a codec stores: at most, and a multiple of


def storable(shape: LayerShape) -> bool:
    """Whether HeadQ's codec has heads of that size."""
    return all(dim % STEP == 0 and dim <= WIDEST_HEAD for dim in shape.dims)


@dataclass(frozen=True)
class Tiling:
    """How a model's rows are cut into heads that a codec can store: ``heads`` of ``dims``, of keys and of values.

    A head of more than 256 coordinates is cut into several, and what is no multiple of 16 is filled up with zeros.

    Attributes:
        keys, values: heads and coordinates as the model has them.
        heads: what a codec sees.
        dims: coordinates of a key and of a value that a codec sees.

    Example:
        >>> Tiling.of((1, 512), (1, 64))
        Tiling(keys=(1, 512), values=(1, 64), heads=2, dims=(256, 32))
        >>> Tiling.of((4, 20), (4, 20)).dims
        (32, 32)
    """

    keys: tuple[int, int]
    values: tuple[int, int]
    heads: int
    dims: tuple[int, int]

    @classmethod
    def of(cls, keys: tuple[int, int], values: tuple[int, int]) -> Self:
        """The coarsest that serves: heads of the model stay apart where keys and values have as many."""
        base = keys[0] if keys[0] == values[0] else 1
        widths = [heads * dim // base for heads, dim in (keys, values)]
        pieces = max(-(-width // WIDEST) for width in widths)
        key, value = (-(-width // (pieces * STEP)) * STEP for width in widths)
        return cls(keys, values, base * pieces, (key, value))

    def shape(self, sliding_window: int | None) -> LayerShape:
        """What a codec is made for."""
        key, value = self.dims
        return LayerShape(self.heads, self.heads, key, sliding_window, None if value == key else value)

    def cut(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the model ``[B, H, S, D]`` as a codec sees them, ``[B, heads, S, d]``."""
        together = self.keys[0] != self.values[0]
        made = []
        for x, dim in zip((k, v), self.dims, strict=True):
            x = x.transpose(1, 2).flatten(2).unsqueeze(1) if together else x
            pieces = self.heads // x.shape[1]
            x = functional.pad(x, (0, pieces * dim - x.shape[3])).unflatten(3, (pieces, dim))
            made.append(x.transpose(2, 3).flatten(1, 2))
        return made[0], made[1]

    def join(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The other way."""
        together = self.keys[0] != self.values[0]
        made = []
        for x, (heads, dim) in zip((k, v), (self.keys, self.values), strict=True):
            base = 1 if together else heads
            x = x.unflatten(1, (base, -1)).transpose(2, 3).flatten(3)[..., : heads * dim // base]
            made.append(x.squeeze(1).unflatten(2, (heads, dim)).transpose(1, 2) if together else x)
        return made[0], made[1]
