"""Any codec in plain PyTorch: a researcher says what is stored and how tokens are coded, the engine does the rest.

A codec is a subclass of :class:`TokenCodec` with three methods: what is stored (:meth:`TokenCodec.forms`), how tokens
are written (:meth:`TokenCodec.encode`) and what they stand for (:meth:`TokenCodec.decode_keys`,
:meth:`TokenCodec.decode_values`). Everything else has a default.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from headq_ao.codecs.protocol import Codec
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.cache_update.reference import append, at, leaving_tokens
from headq_ao.ops.page_layout import NULL_PAGE
from headq_ao.ops.paged_attention.reference import (
    body_tokens,
    capped,
    merge,
    new_part,
    new_positions,
    softmax,
    visible_at,
    window_part,
    window_positions,
)
from headq_ao.ops.types import PagedKV, Visible, visible_positions

ENCODE_TOKENS = 2048  # tokens of a sequence that are coded at a time
SCORES = 2**24  # scores that are held at a time
POSITION = "position"  # the page tensor of codecs that leave tokens out


@dataclass(frozen=True)
class Form:
    """One page tensor: ``[N, Hkv, P / tokens, *shape]``.

    Attributes:
        side: ``"key"`` or ``"value"``, which it is charged to.
        shape: of an entry.
        dtype: None: the model's, of tokens that are not coded.
        tokens: that share an entry.
        by_head: False: one entry for all heads, ``[N, P / tokens, *shape]``.
    """

    side: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    tokens: int = 1
    by_head: bool = True


@dataclass(frozen=True)
class TokenLayout:
    """Pages of ``page_tokens`` tokens of ``kv_heads`` heads."""

    page_tokens: int
    kv_heads: int
    forms: Mapping[str, Form]

    @property
    def spec(self) -> str:
        """A text that says it all: files carry it."""
        forms = (f"{n}:{f.side}:{f.shape}:{f.dtype}:{f.tokens}:{int(f.by_head)}" for n, f in self.forms.items())
        return ";".join([str(self.page_tokens), str(self.kv_heads), *forms])

    def allocate(self, pages: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Zeroed tensors of ``pages`` pages, in the order of ``forms``."""
        made = []
        for form in self.forms.values():
            heads = (self.kv_heads,) if form.by_head else ()
            shape = (pages, *heads, self.page_tokens // form.tokens, *form.shape)
            made.append(torch.zeros(shape, dtype=dtype if form.dtype is None else form.dtype, device=device))
        return made


@dataclass(frozen=True)
class Held:
    """Packed tokens as a codec reads them; ``held[name]`` is ``[B, Hkv, n / tokens, *shape]``.

    Attributes:
        tensors: by the names of :meth:`TokenCodec.forms`. Where no token is they hold zeros or what was left there.
        position: ``[B, n]`` int64 of each token in its sequence; any number where no token is.
        segment: ``[B, n]`` int64, the codec id of its page; None: all 0.
    """

    tensors: Mapping[str, Tensor]
    position: Tensor
    segment: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class TokenCodec(Codec):
    """A codec of tokens in plain PyTorch, of all sequences of a batch.

    With scores ``s_j = scaling · q·k̂_j``, attention is ``o = Σ_j softmax(s)_j v̂_j`` over what is packed, merged by its
    log-sum-exp with the full-precision tokens: ``o = Σ_i e^{lse_i − lse} o_i``, ``lse = log Σ_i e^{lse_i}``.

    An instance is not changed once a cache has it; :meth:`replaced` and :meth:`with_own` give copies. Reading is by
    gathers of pages, in tiles, so that memory is bounded; there is no kernel.

    Attributes:
        shape: of the layer; put there by the engine, as ``n_sink`` and ``batch``.
        n_sink: first tokens, never packed.
        batch: sequences.
        fixed: tensors of the model by name, such as a calibrated mean; they follow it to its device.
        own: tensors of the sequences, ``[B, ..]``, by names ``"key.…"`` and ``"value.…"``.

    Example:
        >>> import torch
        >>> from headq_ao.codecs.tokenwise import Form, TokenCodec
        >>> class Half(TokenCodec):
        ...     def forms(self):
        ...         d = self.shape.head_dim
        ...         return {"k": Form("key", (d,), torch.float16), "v": Form("value", (d,), torch.float16)}
        ...     def encode(self, k, v, position):
        ...         return {"k": k, "v": v}
        ...     def decode_keys(self, held):
        ...         return held["k"].float()
        ...     def decode_values(self, held):
        ...         return held["v"].float()
    """

    shape: LayerShape
    n_sink: int = 0
    batch: int = 0
    fixed: Mapping[str, Tensor] = {}
    own: Mapping[str, Tensor] = {}

    # -- what a codec says ----------------------------------------------------------------------------------------

    def forms(self) -> dict[str, Form]:
        """The page tensors by name; their ``tokens`` must divide G."""
        raise NotImplementedError

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """Code tokens.

        Args:
            k, v: ``[B, Hkv, n, D]`` in the window's dtype, n a multiple of G. Codes of a token (of a group of G) must
                not depend on the others.
            position: ``[B, n]`` int64 of each in its sequence; below 0: no token, what is coded is thrown away.

        Returns:
            For each form ``[B, Hkv, n / tokens, *shape]``.
        """
        raise NotImplementedError

    def decode_keys(self, held: Held) -> Tensor:
        """``k̂ [B, Hkv, n, D]`` fp32, finite wherever ``held`` is zeros."""
        raise NotImplementedError

    def decode_values(self, held: Held) -> Tensor:
        """``v̂ [B, Hkv, n, D]`` fp32, finite wherever ``held`` is zeros."""
        raise NotImplementedError

    def scores(self, q: Tensor, held: Held) -> Tensor:
        """``s [B, Hkv, Hq / Hkv, S, n]`` of scaled queries ``q [B, Hkv, Hq / Hkv, S, D]``: ``q·k̂``."""
        return q @ self.decode_keys(held).to(q.dtype)[:, :, None].transpose(-1, -2)

    def readout(self, a: Tensor, held: Held) -> Tensor:
        """``Σ_j a_j v̂_j [B, Hkv, Hq / Hkv, S, D]`` of weights ``a [B, Hkv, Hq / Hkv, S, n]``."""
        return a @ self.decode_values(held).to(a.dtype)[:, :, None]

    @property
    def has_extra(self) -> bool:
        """Whether there may be an :meth:`extra` term."""
        return type(self).extra is not TokenCodec.extra

    def extra(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """A term of attention beside the tokens', from ``own`` and scaled queries (as in :meth:`scores`): its output
        ``[B, Hkv, Hq / Hkv, S, D]`` and log-sum-exp ``[.., S]``. All queries that see anything see it."""
        return None

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """Own tensors of ``batch`` new sequences. With ``accumulates``, :meth:`encode` may add to them in place what
        tokens of ``position ≥ 0`` bring; a token can come again after a call that failed."""
        return {}

    def see_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, position: Tensor
    ) -> tuple["TokenCodec", Tensor | None]:
        """See the whole first call, with ``prompt``; arguments as in :meth:`Codec.read_prompt`.

        Returns:
            The codec to go on with, and, with ``drops``, which slots stay, bool ``[B, S]``; None: all. Only tokens that
            the call packs can be left out.
        """
        return self, None

    def statistics(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> dict[str, Tensor]:
        """Own tensors ``[n, ..]`` of n sequences, with ``warmup``; arguments as in :meth:`Codec.learn`."""
        raise NotImplementedError

    # -- copies ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """See :class:`Codec`."""
        return self.replaced(own=copy.deepcopy(dict(self.own), memo)) if self.accumulates else self

    def replaced(self, **attributes: Any) -> Self:
        """A copy with other attributes."""
        made = copy.copy(self)
        vars(made).update(attributes)
        return made

    def with_own(self, **tensors: Tensor) -> Self:
        """A copy with more own tensors; ``"key.span"`` is given as ``key_span``."""
        return self.replaced(own={**self.own, **{name.replace("_", ".", 1): t for name, t in tensors.items()}})

    # -- the engine: what a layer asks of a codec -----------------------------------------------------------------

    @property
    def captured(self) -> bool:  # type: ignore[override]
        """See :class:`Codec`."""
        return self.granularity == 1 and not (self.warmup or self.prompt or self.accumulates)

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        """See :class:`Codec`."""
        return self.granularity > 1

    @property
    def packed_sides(self) -> tuple[str, ...]:  # type: ignore[override]
        """Which sides are coded."""
        coded = {form.side for form in self.forms().values() if form.dtype is not None}
        return tuple(side for side in ("key", "value") if side in coded)

    def layout(self, page_tokens: int) -> TokenLayout:
        """See :class:`Codec`."""
        forms, g = self.forms(), self.granularity
        wrong = [f"{name} ({form.tokens})" for name, form in forms.items() if g % form.tokens]
        if wrong:
            raise ValueError(f"{self.name} codes {g} tokens at a time, and entries are of more: {', '.join(wrong)}")
        if page_tokens % g:
            raise ValueError(
                f"block_size must be a multiple of the {g} tokens that {self.name} codes together, got {page_tokens}"
            )
        if self.drops:
            forms = forms | {POSITION: Form("key", (), torch.int32, by_head=False)}
        return TokenLayout(page_tokens, self.shape.n_kv_heads, forms)

    def tensors_by_side(self, tensors: Sequence[Tensor], layout: TokenLayout) -> dict[str, list[Tensor]]:
        """See :class:`Codec`."""
        found: dict[str, list[Tensor]] = {"key": [], "value": []}
        for form, t in zip(layout.forms.values(), tensors, strict=True):
            found[form.side].append(t)
        return found

    def own_tensors(self) -> dict[str, Tensor]:
        """See :class:`Codec`."""
        return dict(self.own)

    def index(self, sequences: Tensor) -> Self:
        """See :class:`Codec`."""
        own = {name: t.index_select(0, sequences.to(t.device)) for name, t in self.own.items()}
        return self.replaced(own=own, batch=len(sequences))

    def learn(
        self, members: Sequence[int], q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None
    ) -> Self:
        """See :class:`Codec`."""
        own, at_ = dict(self.own), torch.tensor(members, device=q.device)
        for name, t in self.statistics(q, k, v, scaling, sliding).items():
            held = own.get(name, t.new_zeros(self.batch, *t.shape[1:]))
            own[name] = held.index_copy(0, at_, t.to(held.dtype))
        return self.replaced(own=own)

    def read_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, position: Tensor, packed: Tensor, most: int
    ) -> tuple["TokenCodec", Tensor | None]:
        """See :class:`Codec`."""
        codec, keep = self.see_prompt(q, k, v, scaling, position)
        if not self.drops:
            return codec, None
        j = torch.arange(most, device=q.device).expand(len(q), -1)
        leaving = j < packed[:, None]
        if keep is None:
            keep = torch.ones_like(leaving)
        else:
            first = (position == 0).to(torch.int8).argmax(1, keepdim=True)
            keep = keep.gather(1, (first + self.n_sink + j).clamp(max=q.shape[2] - 1))
        kept, dropped = (leaving & keep).sum(1), (leaving & ~keep).sum(1)
        return codec.with_own(key_kept=kept, key_dropped=dropped), keep

    def crop_problem(self, body: int, packed: int) -> str | None:
        """See :class:`Codec`."""
        if self.drops and body < packed:
            return f"{self.name} has left tokens out, and which of them would go is not known"
        return super().crop_problem(body, packed)

    def pack(
        self, kv: PagedKV, k: Tensor | None, v: Tensor | None, packed: Tensor, most: int, keep: Tensor | None = None
    ) -> None:
        """See :class:`Codec`."""
        start = torch.zeros_like(kv.held) if kv.new_start is None else kv.new_start
        tile = max(ENCODE_TOKENS // self.granularity, 1) * self.granularity
        for begin in range(0, most, tile):
            n = max(min(tile, most - begin), 2)  # products of a single row may add in another order
            j = kv.packed[:, None] + torch.arange(begin, begin + n, device=kv.packed.device)
            live = j < packed[:, None]
            slot, stays = j, live
            if keep is not None:
                within = pad(keep, (0, begin + n - min(begin + n, most)))[:, : begin + n]
                slot, stays = (within.cumsum(1) - 1)[:, begin:], live & within[:, begin:]
            elif self.drops and "key.dropped" in self.own:
                slot = j - self.own["key.dropped"][:, None]
            tokens = [_leaving(kv, w, x, j, start) for w, x in ((kv.window_k, k), (kv.window_v, v))]
            position = torch.where(live, j + kv.n_sink, -1)
            self._write(kv, self.encode(tokens[0], tokens[1], position), slot.clamp(min=0), stays, position)
        if k is not None and v is not None:
            append(kv.window_k, k, kv, start)
            append(kv.window_v, v, kv, start)

    def _write(self, kv: PagedKV, coded: dict[str, Tensor], slot: Tensor, live: Tensor, position: Tensor) -> None:
        """Put entries ``[B, Hkv, n / tokens, ..]`` where tokens ``slot [B, n]`` lie; others go to the null page."""
        p = page_tokens(kv)
        page = kv.table.long().gather(1, (slot // p) % kv.table.shape[1])
        page = torch.where(live, page, NULL_PAGE)
        for (name, form), held in zip(self.layout(p).forms.items(), kv.pages, strict=True):
            of_entry, offset = page[:, :: form.tokens], (slot % p // form.tokens)[:, :: form.tokens]
            if name == POSITION and self.drops:
                held[of_entry, offset] = position.to(held.dtype)
            elif form.by_head:
                held[of_entry, :, offset] = coded[name].transpose(1, 2).to(held.dtype)
            else:
                held[of_entry, offset] = coded[name].to(held.dtype)
        if kv.segment is not None:
            kv.segment[page] = self.segment(slot // p, p).to(kv.segment.dtype)

    def attend(
        self, q: Tensor, scaling: float, kv: PagedKV, visible: Visible | None, sliding: int, reads: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Codec`."""
        b, s, wide = q.shape[0], q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
        grouped = (q.to(wide) * scaling).reshape(b, self.shape.n_kv_heads, -1, s, q.shape[-1])
        shown = visible_positions(kv.total, s, sliding) if visible is None else visible
        parts = [window_part(grouped, kv, shown)]
        if kv.new_k is not None:
            parts.append(new_part(grouped, kv, shown))
        if (more := self.extra(grouped)) is not None:
            nothing = (shown.low >= shown.high)[:, None, None]
            parts.append((more[0], more[1].masked_fill(nothing, float("-inf"))))
        if reads is not None:
            dense = [window_positions(kv), *([] if kv.new_k is None else [new_positions(kv)])]
            reads[1] += sum(visible_at(position, here, shown).sum() for position, here in dense)
        p = page_tokens(kv)
        columns = max(SCORES // (q.shape[0] * q.shape[1] * s * p), 1)
        unlearned = self.warmup > 0 and not self.own  # no sequence has packed tokens
        for begin in range(0, 0 if unlearned else kv.table.shape[1], columns):
            held, here = self._held(kv, slice(begin, begin + columns))
            seen = visible_at(held.position, here, shown)
            scores = capped(self.scores(grouped, held), kv.softcap)
            a, lse = softmax(scores.masked_fill(~seen[:, None, None], float("-inf")))
            parts.append((self.readout(a, held), lse))
            if reads is not None:
                reads += seen.sum()
        out, lse = merge(parts)
        return out.flatten(1, 2), lse.flatten(1, 2)

    def _held(self, kv: PagedKV, part: slice) -> tuple[Held, Tensor]:
        """What lies in some columns of the block table, and where there are tokens, ``[B, n]``."""
        packed = kv.packed
        if self.drops and "key.dropped" in self.own:  # what was kept of the prompt, and all behind it
            packed = (packed - self.own["key.dropped"]).maximum(self.own["key.kept"])
        slot = body_tokens(replace(kv, packed=packed), page_tokens(kv))[:, part].flatten(1)
        held = self._gathered(kv, kv.table[:, part].long(), slot)
        here = (slot >= 0) & (slot < packed[:, None]) & (held.position < kv.n_sink + kv.packed[:, None])
        return held, here

    def _gathered(self, kv: PagedKV, table: Tensor, slot: Tensor) -> Held:
        """Physical pages ``table [B, c]`` that hold tokens ``slot [B, c · P]``."""
        p, tensors = page_tokens(kv), {}
        for (name, form), held in zip(self.layout(p).forms.items(), kv.pages, strict=True):
            found = held[table]  # [B, c, Hkv, P / tokens, ..]
            tensors[name] = found.transpose(1, 2).flatten(2, 3) if form.by_head else found.flatten(1, 2)
        position = tensors.pop(POSITION).long() if self.drops else slot + kv.n_sink
        segment = None if kv.segment is None else kv.segment[table].long().repeat_interleave(p, 1)
        return Held(tensors, position, segment)

    def decode(self, kv: PagedKV, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """See :class:`Codec`.

        Raises:
            ValueError: where tokens may have been left out.
        """
        if self.drops:
            raise ValueError(f"{self.name} leaves tokens out: they have no keys and values")
        p = page_tokens(kv)
        page = torch.arange(begin // p, -(-end // p), device=kv.table.device)
        slot = (page[:, None] * p + torch.arange(p, device=page.device)).flatten().expand(len(kv.table), -1)
        held = self._gathered(kv, kv.table[:, page % kv.table.shape[1]].long(), slot)
        inside = slice(begin - begin // p * p, end - begin // p * p)
        return self.decode_keys(held)[:, :, inside], self.decode_values(held)[:, :, inside]


def page_tokens(kv: PagedKV) -> int:
    """P of pages of a :class:`TokenLayout`."""
    return int(kv.layout.split(";", 1)[0])


def _leaving(kv: PagedKV, window: Tensor, new: Tensor | None, j: Tensor, start: Tensor) -> Tensor:
    """Body tokens ``j [B, n]`` from the window, and from the call's own where there are any."""
    if new is None:
        return at(window, kv.n_sink + j % (window.shape[2] - kv.n_sink))
    return leaving_tokens(kv, window, new, j, start)
