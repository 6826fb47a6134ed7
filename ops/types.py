"""What the operators of the paged cache pass to each other; plain tensors with names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedKV:
    """The keys and values that one call's queries may see, in one layer.

    A token of position ``p`` in its sequence is a *sink* if ``p < n_sink``, else the *body token* ``j = p − n_sink``.

    - Body tokens ``j < packed[b]`` are in pages: token ``j`` is number ``j % P`` of physical page
      ``table[b, (j // P) % C]``.
    - The other tokens of position ``p < held[b]`` are in the window, in full precision: sinks at slot ``p``, body
      tokens at slot ``n_sink + j % R``, a ring.
    - Tokens ``held[b] ≤ p < total[b]`` are ``new``: number ``new_start[b] + p − held[b]`` of ``new_k`` and ``new_v``.

    With a ``window_table`` an engine owns all pages, those of full precision too, and each token lies where its
    position says, so that a page can be shared by all requests that begin with the same tokens:

    - Token ``p < packed[b]`` is body token ``j = p`` of the pages, sinks among them; sinks are not read there.
    - Tokens ``packed[b] ≤ p < held[b]`` are number ``p % Pw`` of page ``window_table[b, p // Pw]`` of ``window_k``,
      ``window_v``. Sinks are number ``p`` of page ``table[b, 0]`` of ``sink_k``, ``sink_v``.

    With ``recent`` too, all tokens are in pages, and what a query reads of them depends on its position alone, not on
    the call that it comes with: up to ``max(packed[b], p − recent)`` the query at ``p`` reads codes, from there on full
    precision, which is there for ``packed[b]`` and later.

    Attributes:
        pages: of :meth:`PageLayout.allocate`.
        layout: :attr:`PageLayout.spec`.
        table: ``[B, C]`` int32.
        segment: ``[N]`` int32, which of the query maps reads a physical page; None: all pages, the first.
        packed, held, total: ``[B]`` int64.
        window_k, window_v: ``[B, Hkv, n_sink + R, D]``.
        n_sink: sinks.
        new_k, new_v: ``[B, Hkv, S, D]``, or None where ``held`` is ``total``.
        new_start: ``[B]`` int64, the first real slot of ``new_k`` (padding on the left); None: 0.
        window_table: ``[B, Cw]`` int32, or None; with it, ``window_k``, ``window_v`` are ``[Nw, Hkv, Pw, D]``.
        sink_k, sink_v: ``[N, Hkv, n_sink, D]`` with a ``window_table``.
        newest: with a ``window_table``, an upper bound of ``held − max(packed, n_sink)`` that the host knows; None:
            what the table has room for.
        recent: with a ``window_table``, tokens before a query that it reads in full precision; None: all from
            ``packed`` on.
        softcap: that scores are read under, ``softcap · tanh(s / softcap)``; None: as they are.
    """

    pages: list[Tensor]
    layout: str
    table: Tensor
    segment: Tensor | None
    packed: Tensor
    held: Tensor
    total: Tensor
    window_k: Tensor
    window_v: Tensor
    n_sink: int
    new_k: Tensor | None = None
    new_v: Tensor | None = None
    new_start: Tensor | None = None
    window_table: Tensor | None = None
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None
    newest: int | None = None
    recent: int | None = None
    softcap: float | None = None

    @property
    def coded(self) -> Tensor:
        """``[B]`` int64: body tokens that a query may read as codes, those before them too."""
        return self.packed if self.recent is None else torch.maximum(self.packed, self.total - 1 - self.recent)

    @property
    def body_start(self) -> int:
        """The position of body token 0."""
        return self.n_sink if self.window_table is None else 0

    def sequence(self, b: int) -> "PagedKV":
        """The cache of one sequence alone."""
        one = slice(b, b + 1)
        ring = self.window_table is None
        window_k, window_v = (x[one] if ring else x for x in (self.window_k, self.window_v))
        new_k, new_v, new_start, window_table = (
            None if x is None else x[one] for x in (self.new_k, self.new_v, self.new_start, self.window_table)
        )
        return PagedKV(
            self.pages, self.layout, self.table[one], self.segment, self.packed[one], self.held[one], self.total[one],
            window_k, window_v, self.n_sink, new_k, new_v, new_start, window_table, self.sink_k, self.sink_v,
            self.newest, self.recent, self.softcap,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SegmentFrame:
    """Keys are coded in the frame of their segment, the tokens of which stand at neighbouring positions: what a rotary
    embedding turns from segment to segment then stands still.

    Body token ``j`` is of segment ``s = min(j // tokens, S − 1)``. With ``R_s`` the rotation by ``s · tokens``
    positions, ``R_sᵀ k`` is what is coded, and a query reads it as ``R_sᵀ q``: ``q·k`` is what it was, whatever
    positions the tokens really have.

    Attributes:
        table: ``[S, 2, D]`` fp32, ``c`` and ``d`` of each segment: ``(R_sᵀ x)_i = c_i x_i + d_i x_{partner(i)}``.
        partner: ``[D]`` int32, the other coordinate of the pair that turns together.
        tokens: of a segment, whole pages.
    """

    table: Tensor
    partner: Tensor
    tokens: int

    def of(self, body: Tensor) -> Tensor:
        """The segments of body tokens; those below 0 are none, and get the first."""
        return body.div(self.tokens, rounding_mode="floor").clamp(0, len(self.table) - 1)

    def along(self, tokens: int, n_sink: int, device: torch.device) -> Tensor:
        """The segments of a sequence's first ``tokens``, ``n_sink`` of them sinks."""
        return self.of(torch.arange(tokens, device=device) - n_sink)

    def into(self, x: Tensor, segment: Tensor, back: bool = False) -> Tensor:
        """``R_sᵀ x`` (``back``: ``R_s x``) for ``x [.., D]`` and segments ``[..]`` that broadcast, fp32 or as wide as
        ``x``; computed in fp64, so that it does not depend on how a device contracts products."""
        c, d = self.table.double()[segment].unbind(-2)
        wide = x.double()
        turned = wide * c + wide[..., self.partner.long()] * (-d if back else d)
        return turned if x.dtype == torch.float64 else turned.float()


@dataclass(frozen=True)
class Readers:
    """How packed tokens are read.

    Attributes:
        query_map: ``[G, B or 1, Hkv or 1, D, M + 3]`` fp32, one for each segment: takes a scaled query to ``q̃``, ``b``,
            ``h`` and ``q·μ``, so that ``s_j = σ_j (q̃·c_j + b) + m_j h + q·μ``; None where keys are not coded.
        read: ``[B or 1, Hkv or 1, D, D]`` fp32, takes ``Σ_j a_j ŷ_j`` back to the model's basis; None: as it is.
        mean: ``[B or 1, Hkv or 1, D]`` fp32, added once to a readout of packed values (``Σ_j a_j = 1``), or None.
        frame: that keys were coded in; a query is taken into the frame of each segment before it is mapped. None: the
            model's own.
    """

    query_map: Tensor | None
    read: Tensor | None
    mean: Tensor | None
    frame: SegmentFrame | None = None


def in_vectors(x: Tensor) -> Tensor:
    """Matrices with rows ``[.., D, M]`` that begin at multiples of 16 numbers, zeros between them; those that have, as
    they are."""
    d, m = x.shape[-2:]
    row = -(-m // 16) * 16
    strides, lead = [row, 1], d * row
    for n in x.shape[-3::-1]:
        strides, lead = [lead, *strides], lead * n
    if list(x.stride()) == strides:
        return x
    made = x.new_zeros(*x.shape[:-1], row)[..., :m]
    return made.copy_(x)


@dataclass(frozen=True)
class Visible:
    """Which tokens a query sees: positions ``low ≤ p < high``, ``[B, S]`` int64 each.

    None in place of this: query ``s`` stands at ``total − S + s`` and sees all up to itself, under a sliding window
    the last ``sliding`` of them.
    """

    low: Tensor
    high: Tensor

    def tile(self, of: slice) -> Self:
        """Of some of the queries."""
        return replace(self, low=self.low[:, of], high=self.high[:, of])

    def codes_end(self, kv: PagedKV) -> Tensor:
        """Positions below which queries read codes, sinks apart, ``[B, S]`` or ``[B, 1]``; the last position that a
        query sees is its own."""
        end = (kv.packed + kv.body_start)[:, None]
        return end if kv.recent is None else torch.maximum(end, self.high - 1 - kv.recent)

    def in_codes(self, kv: PagedKV) -> Self:
        """The part that queries read as codes."""
        return replace(self, high=torch.minimum(self.high, self.codes_end(kv)))


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as int64 ``[n]``, without waiting for the copy."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def last_in_slots(count: Tensor, slots: int) -> Tensor:
    """Of ``count [B]`` things, of which number ``j`` lies in slot ``j mod slots``, the last of each slot:
    ``[B, slots]``; below 0: none."""
    slot, last = torch.arange(slots, device=count.device), (count - 1)[:, None]
    return last - (last - slot).remainder(slots)


class Plan(Protocol):
    """An operator with arguments that are put together once: it reads and writes tensors where they lay then."""

    def __call__(self, *args: Any) -> Any:
        """The operator of what is left to be given."""

    def moved(self, pages: Sequence[Tensor], table: Tensor) -> None:
        """Go on with pages and a table that have grown; the old ones still exist."""


def visible_positions(total: Tensor, queries: int, sliding: int) -> Visible:
    """:class:`Visible` of ``queries`` new tokens at the end of each sequence; ``sliding`` 0: no sliding window."""
    position = total[:, None] - queries + torch.arange(queries, device=total.device)
    low = (position - sliding + 1).clamp(min=0) if sliding else torch.zeros_like(position)
    return Visible(low, position + 1)
