"""What attention masks and position ids say about the tokens of one call.

A cache keeps counts, not masks. A 2-D mask tells which slots of a call are padding (:func:`real_spans`), before the
call. What the model makes of it, or a 4-D mask of the caller's own, reaches attention: there :func:`mask_view` compares
it with the counts. New tokens are in full precision in their own call, so any mask among them is applied as it is; of
the cached tokens a query may see up to :data:`RANGES` contiguous ranges, each of which is read by itself.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headq_ao.cache.call import CallMetadata
from headq_ao.cache.lengths import Lengths
from headq_ao.cache.schedule import Span
from headq_ao.ops.paged_attention.reference import capped, softmax
from headq_ao.ops.types import Visible, on_device

QUERY_TILE = 256  # queries whose masks are looked through at a time
RANGES = 8  # of cached tokens that a query may see, at most


@dataclass(frozen=True)
class MaskView:
    """What each query of a call sees, where that is not simply every token up to its own.

    ``low``, ``high``: ``[B, S]`` int64, the range of cached tokens that it sees, as positions in the sequence;
    ``new``: bool ``[B or 1, S, S]``, which new slots it sees; ``more``: further ranges behind the first, where masks
    hide cached tokens between others.
    """

    low: Tensor
    high: Tensor
    new: Tensor
    more: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def ranges(self) -> list[Visible]:
        """What is seen of the cached tokens."""
        return [Visible(low, high) for low, high in ((self.low, self.high), *self.more)]


def custom(mask: Any) -> bool:
    """Whether a call's ``attention_mask`` is one that transformers hands to attention as it is: 4-D, or a dict of
    masks by layer type."""
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)


def real_spans(mask: Any, batch: int, length: int, seen: int) -> list[Span] | None:
    """Which of the ``length`` new slots hold real tokens, per row; None: all, as under a 4-D mask.

    Raises:
        ValueError: on a mask that does not cover all slots, or a 2-D one with a hole within a row.
    """
    if mask is None:
        return None
    if custom(mask):
        for one in mask.values() if isinstance(mask, dict) else (mask,):
            check_4d(one, batch, length, seen)
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != (batch, seen + length):
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask must be 2-D over all cached and new tokens, ({batch}, {seen + length}), or 4-D, "
            f"({batch}, 1, {length}, {seen + length}), got {what}"
        )
    real = mask != 0
    if bool(real.all()):
        return None
    edges = torch.diff(real.int(), dim=1, prepend=real.new_zeros(batch, 1).int()) == 1
    if bool((edges.sum(1) > 1).any()):
        row = int((edges.sum(1) > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has a hole: its real tokens must be contiguous; pad on the left (where "
            "no mask is passed, generate makes one from pad_token_id: pass attention_mask)"
        )
    first, count = real.int().argmax(1).tolist(), real.sum(1).tolist()

    def clamp(x: int) -> int:
        return min(max(x - seen, 0), length)

    return [Span(clamp(f), clamp(f + n)) if n else Span(0, 0) for f, n in zip(first, count, strict=True)]


def check_4d(mask: Any, batch: int, length: int, seen: int) -> None:
    """Raise ValueError where a caller's own mask, None for none, does not speak of the call's tokens."""
    if mask is None:
        return
    fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] in (1, batch)
    if not fits or mask.shape[-2:] != (length, seen + length):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"a 4-D attention_mask must be [{batch} or 1, 1, {length}, {seen + length}], new tokens by all "
            f"cached and new ones, got {got}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a 4-D attention_mask must be bool, or floating point and additive, got {mask.dtype}")


def hidden_tokens(mask: Any, tokens: Sequence[int], pads: Sequence[int], seen: int) -> Tensor | None:
    """How many of the oldest cached tokens of each sequence a 2-D mask over all slots hides; None: none at all.

    Raises:
        ValueError: where it shows slots that an earlier call's mask named padding: they are not in the cache.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or seen == 0:
        return None
    real, at = mask[:, :seen] != 0, torch.arange(seen, device=mask.device)
    last = on_device([seen - n for n in pads], mask.device)[:, None]
    held = (at >= last - on_device(tokens, mask.device)[:, None]) & (at < last)
    if torch.equal(real, held):
        return None
    shown = (real & ~held).any(1)
    if bool(shown.any()):
        raise ValueError(
            f"attention_mask row {int(shown.nonzero()[0])} shows slots that an earlier call's mask named padding; "
            "padding is not in the cache: hide them again, or start a new cache"
        )
    return (held & ~real).sum(1)


def check_left_padded(mask: Any) -> None:
    """Raise ValueError where a prompt of ``generate`` is padded on the right: its next token would follow the pads."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] == 0:
        return
    ends_in_pad = (mask[:, -1] == 0) & (mask != 0).any(1)
    if bool(ends_in_pad.any()):
        row = int(ends_in_pad.nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} ends in padding, and generated tokens would follow it; pad prompts on the left "
            "(tokenizer.padding_side = 'left')"
        )


def check_positions(position_ids: Any, mask: Any) -> None:
    """Raise ValueError where the tokens of a row do not follow each other."""
    if not isinstance(position_ids, Tensor) or mask is not None or position_ids.ndim != 2:
        return
    if position_ids.shape[1] == 1:  # nothing to look at: a decoding step waits for no device
        return
    if not bool((position_ids.diff(dim=1) == 1).all()):
        raise ValueError(
            "position_ids must count up by one within each row, or come with a 4-D attention_mask that says what each "
            "token sees; run the sequences as a batch"
        )


def mask_view(
    mask: Tensor, tokens: Sequence[int], pads: Sequence[int], spans: Sequence[Span], seen: int, window: int | None,
    hidden: Tensor | None = None, chunked: bool = False, held_from: int | None = None,
) -> MaskView | None:  # fmt: skip
    """How a mask ``[B or 1, 1 or Hq, S, T]`` differs from what the counts say; None where it does not.

    Args:
        mask: bool, True where a slot is seen, or additive, 0 or very negative; over the ``seen`` cached slots and the
            S new ones, or over the new ones alone.
        tokens: of each sequence before the call.
        pads: padding behind the last of them.
        spans: which new slots of each sequence are real.
        seen: cached slots.
        window, chunked: of a sliding layer, or of a chunked one.
        hidden: how many of its oldest cached tokens each sequence hides in this call, as :func:`hidden_tokens` tells.
        held_from: of cached tokens the last so many are there to be seen, whatever the mask shows before; None: all.

    Raises:
        ValueError: where the mask differs between heads, adds a bias, or shows cached tokens in more than
            :data:`RANGES` ranges. Padding that an earlier call's 2-D mask named is not in the cache, whatever this one
            says.

    Example:
        >>> import torch
        >>> from headq_ao.cache.masks import mask_view
        >>> from headq_ao.cache.schedule import Span
        >>> causal = torch.ones(1, 1, 2, 5).tril(3).bool()  # two new tokens behind three cached ones
        >>> given = ([3], [0], [Span(0, 2)], 3, None)
        >>> mask_view(causal, *given) is None, mask_view(torch.ones_like(causal), *given).new.tolist()
        (True, [[[True, True], [True, True]]])
    """
    visible, device = visible_slots(mask), mask.device
    new_slots = visible.shape[1]
    cached, new = visible[..., :-new_slots], visible[..., -new_slots:]
    if cached.shape[2] not in (0, seen):
        raise ValueError(
            f"the attention mask must cover {seen} cached and {new_slots} new slots, got {tuple(mask.shape)}"
        )
    at = torch.arange(new_slots, device=device)
    real = torch.stack([(at >= span.start) & (at < span.stop) for span in spans])  # [B, S]
    both = real[:, :, None] & real[:, None]
    held, start = on_device(tokens, device)[:, None], on_device([span.start for span in spans], device)[:, None]
    position = held + at - start
    first = first_visible(position, window, chunked)
    usual = (first.minimum(held), held.expand_as(real))
    found = [usual] if cached.shape[2] == 0 else _cached_ranges(cached, pads, held, real, usual, held_from)
    if hidden is not None:
        found = [(low.maximum(hidden.to(device)[:, None]).minimum(high), high) for low, high in found]
    plain = len(found) == 1 and all(map(torch.equal, found[0], usual))
    order = (at[:, None] >= at) & (position[:, None] >= first[:, :, None])
    if plain and not bool(((new != order) & both).any()):
        return None
    first_range, *more = ((torch.where(real, low, 0), torch.where(real, high, 0)) for low, high in found)
    return MaskView(*first_range, new & both, tuple(more))  # padding sees nothing


def first_visible(position: Tensor, window: int | None, chunked: bool = False) -> Tensor:
    """The first token that queries at those positions see: none before a sliding window, nor before their chunk."""
    if window is None:
        return torch.zeros_like(position)
    return (position // window * window if chunked else position - window + 1).clamp(min=0)


def causal_mask(slots: int, window: int | None, device: torch.device) -> Tensor:
    """``[S, S]`` bool: what new tokens see of each other by their order."""
    at = torch.arange(slots, device=device)
    age = at[:, None] - at
    return (age >= 0) if window is None else (age >= 0) & (age < window)


def visible_slots(mask: Tensor) -> Tensor:
    """An attention mask ``[B or 1, 1 or Hq, S, T]`` as bool ``[B or 1, S, T]``.

    Raises:
        ValueError: where it differs between heads, or adds a bias to the scores.
    """
    if mask.ndim != 4 or (mask.shape[1] > 1 and bool((mask != mask[:, :1]).any())):
        raise ValueError(
            f"the attention mask must be the same for all heads, [B, 1, S, T], got {tuple(mask.shape)}; "
            "restore_(model) and use another cache for this model"
        )
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(torch.float16).min / 2  # what models write to hide a slot is at least that low
    if bool(((mask != 0) & ~hidden).any()):
        raise ValueError(
            "the attention mask adds a bias to the scores, which a packed cache does not know (0 shows a slot, "
            "-32752 or less hides it); restore_(model) and use another cache for this model"
        )
    return ~hidden


def _cached_ranges(
    cached: Tensor, pads: Sequence[int], held: Tensor, real: Tensor, usual: tuple[Tensor, Tensor],
    held_from: int | None = None,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """The ranges of cached tokens that each query sees, first tokens and ends ``[B, S]``, by a mask
    ``[B or 1, S, cached slots]``; a query that sees fewer ranges than another has empty ones.

    Queries of padding see what is usual, whatever the mask says of them.
    """
    slots = cached.shape[2]
    first_slot = slots - on_device(pads, held.device)[:, None] - held
    at = torch.arange(slots, device=held.device)
    in_cache = (at >= first_slot) & (at < first_slot + held)  # padding is not
    if held_from is not None:
        in_cache = in_cache & (at >= first_slot + held - held_from)
    tiles = [
        _ranges(part & in_cache[:, None] & here[:, :, None], first_slot, held)
        for part, here in zip(cached.split(QUERY_TILE, 1), real.split(QUERY_TILE, 1), strict=True)
    ]
    most = max(map(len, tiles))
    nothing = held.expand(-1, 1)
    found = []
    for i in range(most):
        parts = [t[i] if i < len(t) else (nothing.expand(-1, t[0][0].shape[1]),) * 2 for t in tiles]
        low, high = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
        other = usual if i == 0 else (held, held)
        found.append((torch.where(real, low, other[0]), torch.where(real, high, other[1])))
    return found


def _ranges(shown: Tensor, first_slot: Tensor, held: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The ranges of one tile of queries, ``shown [B, S, slots]``; one at least, which may be empty."""
    edge = torch.diff(torch.nn.functional.pad(shown.to(torch.int8), (1, 1)), dim=2)
    begins, ends = (edge == 1).cumsum(2, dtype=torch.int32), (edge == -1).cumsum(2, dtype=torch.int32)
    count = begins[:, :, -1]
    most = int(count.max())
    if most > RANGES:
        raise ValueError(
            f"the attention mask of sequence {int((count > RANGES).any(1).nonzero()[0])} shows cached tokens in {most} "
            f"ranges with others between them that it hides; a packed cache serves up to {RANGES} ranges of cached "
            "tokens for each new token, and any mask among the new ones: crop the cache, or start a new one"
        )
    found = []
    for i in range(max(most, 1)):
        low, high = ((x > i).to(torch.uint8).argmax(2) - first_slot for x in (begins, ends))
        found.append((torch.where(count > i, low, held), torch.where(count > i, high, held)))
    return found


def contiguous_ranges(cached: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """The one range that each query sees, in a graph, of sequences without padding behind them: where there are more
    the graph stops."""
    at, first_slot = torch.arange(cached.shape[2], device=held.device), cached.shape[2] - held[:, None]
    shown = (cached & (at >= first_slot)[:, None]).to(torch.uint8)
    count, first = shown.sum(2), shown.argmax(2)
    last = cached.shape[2] - 1 - shown.flip(2).argmax(2)
    whole = (count == 0) | (last - first + 1 == count)
    torch._assert_async(whole.all(), "the attention mask hides cached tokens between others that it shows")
    low = torch.where(count > 0, first - first_slot, held[:, None])
    return low, low + count


def view_of_call(
    mask: Tensor | None, is_causal: bool | None, lengths: Lengths, metadata: CallMetadata, window: int | None,
    device: torch.device, chunked: bool = False,
) -> MaskView | None:  # fmt: skip
    """:func:`mask_view` of a mask in the call that ``lengths`` counted last; None where counts say all. The layers of a
    call share the answer.

    Raises:
        ValueError: where the mask hides or shows cached tokens in a way that cannot be served.
    """
    new, seen, hidden, given = lengths.new, lengths.seen - lengths.new, metadata.hidden, mask
    # of cached tokens a model's own masks tell padding and windows, which the counts know: see `hidden`. Where it tells
    # types of tokens, a window may show more: what a window's own cache would hold of one block with the new tokens
    beyond = not metadata.custom and metadata.by_slot and window is not None and not chunked
    if not metadata.custom and mask is not None:
        mask = None if new == 1 else mask if beyond else mask[..., -new:]
    if mask is None and (is_causal is not False or new == 1):
        return None
    key = (id(given), lengths.calls, window, chunked)
    found: tuple[weakref.ref[Tensor] | None, MaskView | None] = metadata.views.get(key, (None, None))
    told, view = found
    if given is None or told is None or told() is not given:
        if mask is None:
            mask = (causal_mask(new, window, device) | (is_causal is False))[None, None]
        spans = lengths.spans or [Span(0, new)] * lengths.batch
        held_from = window - 1 if beyond and window is not None else None
        view = mask_view(mask, *lengths.before(), spans, seen, window, hidden, chunked, held_from)
        if given is not None:
            metadata.views[key] = weakref.ref(given), view
    return view


def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What sink logits ``[Hq]`` leave of a softmax whose scores have the log-sum-exp ``lse [B, Hq, S]``, ``[.., 1]``:
    they are one more score, of nothing, in the denominator: ``e^lse / (e^lse + e^s) = sigmoid(lse − s)``."""
    return torch.sigmoid(lse - sinks.to(lse)[:, None])[..., None]


def attend_new(
    q: Tensor, scaling: float, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, Hq, S, D]`` over the keys and values ``[B, Hkv, S, D]`` of the same call: ``o`` and ``lse``
    as :func:`headq_ao.ops.paged_attention`; ``visible [B or 1, S, S]``."""
    q = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32) * scaling
    grouped, k, v = q.unflatten(1, (k.shape[1], -1)), k.to(q.dtype)[:, :, None], v.to(q.dtype)[:, :, None]
    parts = []
    for tile, seen in zip(grouped.split(QUERY_TILE, 3), visible.split(QUERY_TILE, 1), strict=True):
        s = capped(tile @ k.transpose(-1, -2), softcap)
        a, lse = softmax(s.masked_fill(~seen[:, None, None], float("-inf")))
        parts.append((a @ v, lse))
    out, lse = (torch.cat(x, 3) for x in zip(*parts, strict=True))
    return out.flatten(1, 2), lse.flatten(1, 2)
