"""A packed cache under ``torch.compile``: what a traced model asks of it.

The graph sees the operators of :mod:`headq_ao.ops` and tensors: lengths, block tables and pages lie on the device, so
one graph serves all steps. What can only be said when a graph runs, a refusal, is said by an operator of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.masks import visible_slots
from headq_ao.codecs.source import SourceModule
from headq_ao.integrations.transformers.arguments import other_softcap, unknown_argument
from headq_ao.integrations.transformers.attention import beyond_sdpa
from headq_ao.integrations.transformers.cache import HeadQCache


@torch.library.custom_op("headq::refuse", mutates_args=())
def _refuse(like: Tensor, problem: str) -> Tensor:
    """An error found while tracing, where it would not reach the caller as it is."""
    raise ValueError(problem)


@_refuse.register_fake
def _(like: Tensor, problem: str) -> Tensor:
    return torch.empty_like(like)


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


def attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, is_causal: bool | None,
    weights: bool, kwargs: dict[str, Any], sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention over what ``update`` returned, in a traced model: ``[B, S, Hq, D]``.

    Raises:
        ValueError: when the graph runs, on a call that cannot be served.
    """
    layer: PackedLayer = k.layer  # type: ignore[attr-defined]
    states: tuple[Tensor, Tensor, Tensor] = q, k.new, v.new  # type: ignore[assignment]
    problem = layer.problem or _problem(module, layer, mask, is_causal, weights, q.shape[2], kwargs)
    if problem is None and softcap != layer.shape.softcap:
        problem = other_softcap(softcap, layer.shape.softcap)
    new_q, new_k, new_v = (x.detach() for x in states)
    if problem is not None:
        layer.batch.lengths.take_back_traced()
        out = torch.ops.headq.refuse(new_q, problem)
    elif layer.batch.lengths.first:
        out = _first(layer, new_q, new_k, new_v, mask, scaling, sinks)
        layer.count_first()
        layer.commit(new_q, scaling)
    else:
        # one new token sees all of itself: a mask counts where it speaks of several, or is the caller's own
        told = q.shape[2] > 1 or layer.batch.metadata.custom
        out = layer.attend(new_q, scaling, new_k, new_v, mask if told else None, is_causal, sinks)
    out = out.transpose(1, 2).contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in states):
        out = torch.ops.headq.without_gradients(out, *states)
    attended: Tensor = out
    return attended


def _problem(
    module: nn.Module, layer: PackedLayer, mask: Tensor | None, is_causal: bool | None, weights: bool, slots: int,
    kwargs: dict[str, Any],
) -> str | None:  # fmt: skip
    """Why attention of a compiled call cannot be served, None where it can."""
    source = layer.source
    assert isinstance(source, SourceModule)
    if weights or layer.batch.metadata.weights:
        return "a compiled call returns no attention weights; call the model itself with output_attentions=True"
    if is_causal is False and mask is None and slots > 1:
        return "a compiled call on a packed cache is causal, got is_causal=False; call the model itself"
    beyond = layer.sliding_window is not None and not layer.batch.lengths.first
    if beyond and slots > 1 and getattr(module, "is_causal", True) is False:
        return (
            "a compiled call of several tokens shows of a sliding window what is causal, and this layer's attention is "
            "not; call the model itself"
        )
    return unknown_argument(kwargs, source.call_options)


def _first(
    layer: PackedLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, sinks: Tensor | None
) -> Tensor:
    """Attention over the new tokens alone, in full precision, under the model's mask and the cache's own: ``q``'s
    form."""
    seen = None if mask is None or not layer.shows_more else visible_slots(mask)[:, None]
    own = layer.visible_new(q.shape[2])
    seen = own if seen is None else seen if own is None else seen & own
    softcap = layer.shape.softcap
    if sinks is not None or softcap is not None:
        return beyond_sdpa(q, k, v, seen, scaling, layer.sliding_window, sinks, softcap)
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast they may differ
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None and q.shape[2] > 1, scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def refused(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, problem: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that ends in a ValueError when its graph runs, before anything else."""
    model._headq.codecs[0].model.refusing = True  # type: ignore[union-attr,index]
    kwargs = {key: x for key, x in kwargs.items() if key != name} | {"use_cache": False}
    key = next((n for n in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(n), Tensor)), None)
    if key is None:
        return (torch.ops.headq.refuse(args[0], problem), *args[1:]), kwargs
    return args, {**kwargs, key: torch.ops.headq.refuse(kwargs[key], problem)}


def begin(cache: HeadQCache, model: nn.Module, kwargs: dict[str, Any], tokens: Tensor) -> str | None:
    """Count a call with ``tokens`` (ids or embeddings) ``[B, S, ...]`` that a graph makes; why it cannot, or None."""
    mask, slots, lengths = kwargs.get("attention_mask"), tokens.shape[1], cache.batch.lengths
    # numbers, for dynamo guards no `is`
    if cache.packed[0].source.model.number != model._headq.codecs[0].model.number:  # type: ignore[union-attr,index]
        return "this HeadQCache was made for another model; make a new one with HeadQCache(model)"
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is not None and mask.ndim != 2:
        return "a call within a compiled function takes a 2-D attention_mask; compile the model, not its caller"
    if mask is not None and lengths.on:
        _check_mask(mask, slots, next(iter(lengths.on.values())).total)
    cache.batch.begin_traced(slots, None if mask is None or slots == 1 else mask[:, -slots:] != 0)
    return None


def _check_mask(mask: Tensor, slots: int, held: Tensor) -> None:
    """Stop the graph where a 2-D mask says what a packed cache does not know without being asked on the host."""
    shown, new = mask != 0, mask[:, -slots:] != 0
    begins = new[:, 0] + (new[:, 1:] & ~new[:, :-1]).sum(1)
    torch._assert_async((begins <= 1).all(), "attention_mask has a hole among the new tokens of a compiled call")
    torch._assert_async(new[:, -1].all(), "attention_mask of a compiled call ends in padding; pad on the left")
    torch._assert_async(
        (shown[:, :-slots].sum(1) == held.to(mask.device)).all(),
        "attention_mask hides or shows other tokens than those that the cache holds; call the model uncompiled",
    )
