"""The tokens of a layer in full precision: sinks, then a ring of the newest ones."""

from collections.abc import Callable

import torch
from torch import Tensor

from headq_ao.cache.pages import growing
from headq_ao.ops.cache_update.move import select_rows
from headq_ao.ops.types import last_in_slots

NAMES = ("k", "v", "q")
ROOM = 4096  # body tokens that a ring has room for at first, where it may hold more


class Window:
    """``k``, ``v [B, Hkv, n_sink + R, D]`` and, while a sequence's own statistics are awaited, ``q [B, Hq, ..]``.

    Token ``p < n_sink`` is at slot ``p``, body token ``j`` at slot ``n_sink + j % R``.

    Args:
        n_sink: sinks.
        ring: R, body tokens that there is room for.
        shared: whether values are their keys, and held once.
    """

    def __init__(self, n_sink: int, ring: int, shared: bool = False) -> None:
        self.n_sink, self.ring, self.shared = n_sink, ring, shared
        self.names = ("k", "q") if shared else NAMES
        self.k: Tensor | None = None
        self.q: Tensor | None = None
        self._v: Tensor | None = None

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of what is a token's own: all but the queries."""
        return tuple(name for name in self.names if name != "q")

    @property
    def v(self) -> Tensor | None:
        """Values."""
        return self.k if self.shared else self._v

    @v.setter
    def v(self, x: Tensor) -> None:
        self._v = x

    def allocate(self, name: str, form: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros for tokens of the form ``B, H, D``."""
        b, h, d = form
        made = growing(torch.zeros(b, h, self.n_sink + self.ring, d, dtype=dtype, device=device), 2)
        setattr(self, name, made)
        return made

    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [t for name in self.names if (t := getattr(self, name)) is not None]

    def resize(self, ring: int, total: Tensor) -> None:
        """Another R; ``total [B]`` int64, tokens of each sequence."""
        if ring == self.ring:
            return
        count = total - self.n_sink
        body = last_in_slots(count, ring)
        body = torch.where((body >= 0) & (body >= (count - self.ring)[:, None]), body, 0)
        sinks = torch.arange(self.n_sink, device=total.device).expand(len(total), -1)
        index = torch.cat([sinks, self.n_sink + body % self.ring], 1)
        self._map(lambda t: t.gather(2, index[:, None, :, None].expand(*t.shape[:2], -1, t.shape[3])))
        self.ring = ring

    def select(self, index: Tensor) -> None:
        """Keep and reorder sequences, in place where there are as many."""
        if self.k is not None and len(self.k) == len(index):
            return select_rows(self.tensors(), index.tolist())
        self._map(lambda t: t.index_select(0, index.to(t.device)))

    def widen(self, dtype: torch.dtype) -> bool:
        """Hold tokens of that dtype too, without loss; whether tensors have changed."""
        if self.k is None or torch.promote_types(self.k.dtype, dtype) == self.k.dtype:
            return False
        self._map(lambda t: t.to(torch.promote_types(t.dtype, dtype)))
        return True

    def at(self, name: str, position: Tensor) -> Tensor:
        """Tokens at ``position [B, n]`` of their sequences, ``[B, H, n, D]``; those that are gone are any."""
        tokens: Tensor = getattr(self, name)
        slot = torch.where(position < self.n_sink, position, self.n_sink + (position - self.n_sink) % self.ring)
        return tokens.gather(2, slot[:, None, :, None].expand(*tokens.shape[:2], -1, tokens.shape[3]))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for name in self.names:
            if (t := getattr(self, name)) is not None:
                setattr(self, name, growing(fn(t), 2))
