"""A packed cache under ``torch.compile``: the graph calls operators that find the cache when they run.

Which rows are packed changes from step to step, and dynamo would compile again for each count that it saw. So a traced
model sees none: it holds a cache by a tensor, its handle, and hands queries, keys and values to operators that it
cannot look into. They do there what the eager path does: append, attend, close blocks, take statistics. Each claims to
write to the handle, which keeps them in order and alive.
"""

import itertools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headq_ao.ambient import mode_neutral
from headq_ao.masks import causal_mask, custom, visible_slots

if TYPE_CHECKING:
    from headq_ao.cache import HeadQCache, HeadQState
    from headq_ao.cache_layer import HeadQCacheLayer

_ids = itertools.count()
_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# Replaying a CUDA graph would leave out what these operators do in Python.
_TAGS = (torch.Tag.cudagraph_unsafe,)


class Handled:
    """An object that operators find by ``handle``, an int64 tensor ``[1]``; a copy has a handle of its own."""

    handle: Tensor

    def register(self) -> None:
        """Take a new handle."""
        number = next(_ids)
        _owners[number] = self
        with torch.inference_mode(False):
            self.handle = torch.tensor([number], dtype=torch.int64, device="cpu")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.register()


def owner(handle: Tensor) -> Any:
    """The object of a handle.

    Raises:
        RuntimeError: when it is gone.
    """
    found = _owners.get(int(handle))
    if found is None:
        raise RuntimeError("the object of this HeadQ handle is gone; keep the cache and the model while they are used")
    return found


@dataclass(eq=False)
class PendingRows:
    """What ``update`` returns in a traced model: new rows ``[B, Hkv, S, D]`` on their way to :func:`step`."""

    handle: Tensor
    layer: int
    rows: Tensor


@torch.library.custom_op("headq::announce", mutates_args=("handle",), tags=_TAGS)
def _announce(
    handle: Tensor, model: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, length: int,
    tokens: Tensor | None = None,
) -> None:  # fmt: skip
    cache: HeadQCache = owner(handle)
    if custom(attention_mask):
        raise ValueError(
            "a call within a compiled function takes a 2-D attention_mask; compile the model, not its caller"
        )
    cache.expect(owner(model), batch, length, attention_mask, position_ids, tokens=tokens)


@torch.library.custom_op("headq::seen", mutates_args=(), tags=_TAGS)
def _seen(handle: Tensor) -> Tensor:
    return torch.tensor(owner(handle).get_seq_length(), dtype=torch.int64, device=handle.device)


@torch.library.custom_op("headq::step", mutates_args=("handle",), tags=_TAGS)
def _step(
    handle: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, problem: str | None,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    if problem is not None:  # found while tracing, where an error would not reach the caller as it is
        raise ValueError(problem)
    return _run(owner(handle), layer, q, k, v, scaling, mask)


@_announce.register_fake
def _(
    handle: Tensor, model: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, length: int,
    tokens: Tensor | None = None,
) -> None:  # fmt: skip
    return None


@_seen.register_fake
def _(handle: Tensor) -> Tensor:
    return handle.new_empty(())


@_step.register_fake
def _(
    handle: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, problem: str | None,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    b, hq, s, d = q.shape
    return q.new_empty((b, s, hq, d))


@torch.library.custom_op("headq::without_gradients", mutates_args=())
def _without_gradients(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``out`` as a function of the states that it was computed from: a backward pass through it is refused by name."""
    return out.clone()


@torch.library.custom_op("headq::refuse_gradients", mutates_args=())
def _refuse_gradients(gradient: Tensor) -> Tensor:
    raise ValueError(
        "a compiled call on a packed cache has no gradients to give, and gradients are wanted: call the model itself, "
        "or pass use_cache=False"
    )


@_without_gradients.register_fake
def _(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(out)


@_refuse_gradients.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    nothing = torch.ops.headq.refuse_gradients(gradient)
    return nothing, *(nothing.new_zeros(shape) for shape in ctx.shapes)


def _keep_shapes(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.shapes = [x.shape for x in inputs[1:]]


_without_gradients.register_autograd(_backward, setup_context=_keep_shapes)


def seen(cache: "HeadQCache") -> Tensor:
    """Slots seen, a 0-dim int64 tensor, read when the graph runs."""
    return torch.ops.headq.seen(cache.handle)


def step(
    q: Tensor, k: PendingRows, v: PendingRows, scaling: float, problem: str | None = None, mask: Tensor | None = None
) -> Tensor:
    """Append, attend and commit in one layer, when the graph runs: ``[B, S, Hq, D]``.

    ``mask``: among the new slots ``[B or 1, 1, S, S]``; None: causal.

    Raises:
        ValueError: with ``problem``, when the graph runs.
    """
    states = (q, k.rows, v.rows)
    detached = [x.detach() for x in states]
    out: Tensor = torch.ops.headq.step(k.handle, k.layer, *detached, scaling, problem, mask)
    if torch.is_grad_enabled() and any(x.requires_grad for x in states):
        return torch.ops.headq.without_gradients(out, *states)
    return out


def announce(cache: "HeadQCache", state: "HeadQState", kwargs: dict[str, Any], tokens: Tensor) -> None:
    """Tell the cache, when the graph runs, about a call with ``tokens`` (ids or embeddings) ``[B, S, ...]``.

    Raises:
        ValueError: when the graph runs, as :meth:`HeadQCache.expect` does.
    """
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    batch, length = tokens.shape[:2]
    if length == 1 or not isinstance(position_ids, Tensor):
        position_ids = None
    torch.ops.headq.announce(cache.handle, state.handle, mask, position_ids, batch, length, tokens.detach())


@torch.no_grad()
@mode_neutral
def _run(
    cache: "HeadQCache", index: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    state, layer = cache.caller(), cache.layers[index]
    if state is None or (cache.incoming.seen, cache.incoming.length) != (layer.seen, q.shape[2]):
        raise RuntimeError(
            "the model's pre-hook was bypassed: compile the model that quantize_ was given, torch.compile(model), "
            "not its forward or a part of it"
        )
    codec = state.codecs[index]
    layer.update(k, v)
    try:
        if layer.first_call:
            out = _attend_first(layer, q, k, v, scaling, mask)
            layer.count_exact_reads()
        else:
            out = layer.attend(q, scaling, codec, (k, v), layer.view(mask))
    except BaseException:
        layer.take_back()
        raise
    layer.commit(q, codec, scaling)
    return out.transpose(1, 2).contiguous()


def _attend_first(
    layer: "HeadQCacheLayer", q: Tensor, k: Tensor, v: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Exact attention over the new rows alone, under the model's mask, or as the eager path masks: causal, window,
    padding."""
    s, window = q.shape[2], layer.sliding_window
    if mask is not None:
        mask = visible_slots(mask)[:, None]
    if any(span.length != s for span in layer.last_spans) or (window is not None and window < s):
        at = torch.arange(s, device=q.device)
        real = [(at >= span.start) & (at < span.stop) for span in layer.last_spans]
        shown = causal_mask(s, window, q.device) if mask is None else mask
        mask = shown & torch.stack(real)[:, None, None]
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast they may differ
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and s > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
