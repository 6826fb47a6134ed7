"""Two tokens, then a third, through a copy of a model: whether HeadQ can serve its attention, before anything changes.

The copy shares the model's weights and has everything else of its own: config, buffers, counters, flags; hooks are left
out. So the model, its config and the random state stay as they are. Where weights are cheap to read (on an
accelerator, or up to :data:`CHEAP` bytes on the CPU) the copy computes with them. Larger, offloaded, meta and sharded
models are probed by shapes alone, those of the whole model, on PyTorch's meta device, without values or communication.

What cannot be found out is not held against a model: one whose ``forward`` needs other inputs than token ids, whose
routing of experts needs values where there are shapes only, or which cannot be copied, is taken as its config and
modules describe it.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from headq_ao.ambient import mode_neutral
from headq_ao.cache.masks import attend_new, sink_share
from headq_ao.integrations.config_only.shapes import (
    checked_layers,
    dense_layers,
    layer_shapes,
    packed_places,
    shared_places,
    text_config,
)
from headq_ao.integrations.transformers import latent
from headq_ao.integrations.transformers.arguments import SINKS, SOFTCAP, unknown_argument
from headq_ao.integrations.transformers.hybrid import packed_layer
from headq_ao.integrations.transformers.models import (
    CACHE_NAME,
    attention_modules,
    check_cached,
    forward_names,
    input_embedding,
    tensor_parallel,
    with_cache,
)
from headq_ao.layer_shape import LayerShape

NAME = "headq_probe"
CALLS = (2, 1)  # tokens: a prefill and a step of decoding
CHEAP = 2**30  # bytes of weights on the CPU; a second or two for both calls
SMALL = 2**24  # bytes of a buffer; larger ones hold packed weights, which no call changes
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SHARED = ("hf_quantizer", "generation_config", "_mesh_manager", "_device_mesh")
META = torch.device("meta")


class UnservedError(Exception):
    """Why HeadQ cannot serve a model's attention."""


@mode_neutral
def supported_layers(
    model: nn.Module, shapes: list[LayerShape] | None = None
) -> tuple[list[LayerShape], list[nn.Module]]:
    """The attention layers of a model that HeadQ can serve, and their modules; the model is not changed.

    Args:
        model: the whole causal LM.
        shapes: of its packed layers, as they were observed; None: as its config tells.

    Raises:
        ValueError: where it cannot serve the model, with the reason.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao.integrations.transformers.probe import supported_layers
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... )
        >>> shapes, modules = supported_layers(model)
        >>> shapes[0].n_heads, shapes[0].dims
        (2, (32, 32))
    """
    if not isinstance(model, PreTrainedModel):
        return [], attention_modules(model, 0)  # which says so
    check_cached(model)
    if shapes is None:
        shapes = layer_shapes(model.config)
    else:
        checked_layers(model.config, known=any(shape.latent is not None for shape in shapes))
    places = packed_places(model.config)
    modules = attention_modules(model, places)
    input_embedding(model)
    if hasattr(model, "_headq"):
        return shapes, modules
    for by_shapes in (False, True):
        if by_shapes or cheap(model):
            try:
                seen = probe(model, shapes, modules, by_shapes, places)
            except UnservedError as why:
                raise ValueError(f"{type(model).__name__} is not supported: {why}") from why
            if seen is not None:
                return seen, modules
    return shapes, modules


def cheap(model: PreTrainedModel) -> bool:
    """Whether two calls of a model cost little: all weights are here, whole, and few or on an accelerator."""
    parameters = list(model.parameters())
    if any(p.device.type == "meta" or isinstance(p, DTensor) for p in parameters) or tensor_parallel(model)[1] > 1:
        return False
    if any(moves_weights(module) for module in model.modules()):
        return False
    held: int = sum(p.numel() * p.element_size() for p in parameters if p.device.type == "cpu")
    return held <= CHEAP


def moves_weights(module: nn.Module) -> bool:
    """Whether accelerate brings a module's weights to where it computes when it is called."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [] if hook is None else getattr(hook, "hooks", [hook])
    return any(type(one).__name__ != "AlignDevicesHook" or one.offload for one in hooks)


def probe(
    model: PreTrainedModel, shapes: list[LayerShape], modules: list[nn.Module], by_shapes: bool,
    places: Sequence[int],
) -> list[LayerShape] | None:  # fmt: skip
    """The shapes with the query heads and the softcap of each layer; None where the model cannot be called so.

    Raises:
        UnservedError: where the calls show what HeadQ cannot serve.
    """
    weights = [p for module in modules for p in module.parameters() if p.ndim > 1]
    if tensor_parallel(model)[1] > 1 and not all(isinstance(p, DTensor) for p in weights):
        return None  # shards that do not tell of the whole
    try:
        twin, modules = twin_of(model, modules, by_shapes)
    except Exception:  # whatever a model holds that cannot be copied
        return None
    cache = ProbeCache(twin.config, places, shapes, modules, forward_names(model), eager_function(twin, modules))
    with quiet(model):
        try:
            previous = twin.config._attn_implementation
            twin.set_attn_implementation(NAME)
            for length in CALLS:
                run(twin, cache, length)
                cache.check_called()
        except UnservedError:
            raise
        except Exception as error:
            twin.set_attn_implementation(previous)
            if not runs_dense(twin):
                check_own_cache(twin)
                return None
            raise UnservedError(f"it runs with a DynamicCache, but not with HeadQ's: {error!r}") from error
    return cache.shapes


def twin_of(
    model: PreTrainedModel, modules: list[nn.Module], by_shapes: bool
) -> tuple[PreTrainedModel, list[nn.Module]]:
    """A copy of a model, in eval mode, without hooks, and its copies of ``modules``.

    It shares the weights, or has meta tensors in their place.
    """
    memo: dict[int, Any] = {}
    for part in model.modules():
        for name in HOOKS:
            memo[id(vars(part)[name])] = OrderedDict()
        for name in SHARED:
            if name in vars(part):
                memo[id(vars(part)[name])] = vars(part)[name]
        for parameter in part._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = as_meta(parameter) if by_shapes else parameter
        for buffer in part._buffers.values():
            if buffer is not None:
                large = buffer.numel() * buffer.element_size() > SMALL
                memo[id(buffer)] = as_meta(buffer) if by_shapes else buffer if large else buffer.detach().clone()
    weights = getattr(model.config, "quantization_config", None)
    if weights is not None:
        memo[id(weights)] = weights
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    for part in twin.modules():
        own_forward(part, by_shapes)
        if "rope_deltas" in vars(part):  # of the last prompt, whose batch was another
            part.rope_deltas = None
    if by_shapes:
        twin.config.pad_token_id = None  # else token ids are searched for it
        if twin._can_set_experts_implementation():
            twin.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on the routing
    return twin.eval(), [memo[id(module)] for module in modules]


def own_forward(part: nn.Module, by_shapes: bool) -> None:
    """Let a copied module call its own ``forward``: not one compiled or wrapped for the module it was copied from.

    By shapes alone accelerate, which would bring data, is taken off.
    """
    if by_shapes and hasattr(part, "_old_forward"):
        part.forward = part._old_forward  # type: ignore[assignment]
    if not isinstance(vars(part).get("forward"), (types.MethodType, functools.partial)):
        vars(part).pop("forward", None)


def as_meta(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape, the whole one where it is sharded."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@contextlib.contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, no warnings, nothing compiled, and the random state afterwards as before."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def run(twin: PreTrainedModel, cache: Cache | None, length: int) -> Any:
    """One call with ``length`` tokens of text, and what it gives."""
    device = getattr(input_embedding(twin).weight, "device", twin.device)
    ids = torch.tensor([plain_tokens(twin)[:length]], device=device)
    return twin(input_ids=ids, use_cache=True, **with_cache(cache))


def runs_dense(twin: PreTrainedModel) -> bool:
    """Whether the same calls run with transformers' own cache."""
    try:
        cache = DynamicCache(config=twin.config)
        for length in CALLS:
            run(twin, cache, length)
    except Exception:
        return False
    return True


def check_own_cache(twin: PreTrainedModel) -> None:
    """Raise UnservedError where a model runs with a cache of a class of its own alone."""
    try:
        made = getattr(run(twin, None, 1), CACHE_NAME, None)
    except Exception:
        return
    if made is not None and type(made) is not DynamicCache:
        raise UnservedError(f"it needs a cache of its own class, {type(made).__name__}")


def plain_tokens(model: PreTrainedModel) -> list[int]:
    """Two tokens that the configs do not name: no padding, no placeholder of an image."""
    named: set[Any] = set()
    for config in (model.config, text_config(model.config)):
        for name, value in vars(config).items():
            if "token" in name:
                named |= (
                    set(value) if isinstance(value, (list, tuple)) else {value} if isinstance(value, int) else set()
                )
    ids = range(getattr(text_config(model.config), "vocab_size", 2))
    plain = [i for i in ids[: len(named) + 2] if i not in named]
    return [*plain, 0, 0][:2]


def eager_function(twin: PreTrainedModel, modules: list[nn.Module]) -> Any:
    """The function that a model's file computes attention with where the model uses it; None where it uses another."""
    if getattr(modules[0], "config", twin.config)._attn_implementation != "eager":
        return None
    return getattr(sys.modules.get(type(modules[0]).__module__), "eager_attention_forward", None)


class ProbeRows(Tensor):
    """Cached keys or values of a layer, which only :func:`probe_attention` may read, as with HeadQ's."""

    layer: "ProbeLayer"
    side: str

    @staticmethod
    def __new__(cls, layer: "ProbeLayer", side: str, rows: Tensor) -> "ProbeRows":
        self = torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=rows.dtype, device=rows.device)
        self.layer, self.side = layer, side
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise UnservedError(
            f"its attention does not go through transformers' AttentionInterface with the keys and values that the "
            f"cache returns, it applies {func} to them"
        )


class ProbeLayer(CacheLayerMixin):
    """A cache layer of the probe: keeps the rows, and counts what the model does with them."""

    is_compileable = False
    is_croppable = True

    def __init__(
        self, index: int, shape: LayerShape, module: nn.Module, options: frozenset[str], eager: Any,
        sharing: frozenset[int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.index, self.shape, self.module, self.options, self.eager = index, shape, module, options, eager
        self.sharing = sharing
        self.is_sliding, self.sliding_window = shape.sliding_window is not None, shape.sliding_window
        self.updates = self.reads = self.seen = 0
        self.k = self.v = torch.empty(0, dtype=torch.float32, device="cpu")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device of the first states."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[1, Hkv, S, D]`` states."""
        for name, x, dim in zip(("keys", "values"), (key_states, value_states), self.shape.dims, strict=True):
            expected = (1, self.shape.n_kv_heads, dim)
            if x.ndim != 4 or (*x.shape[:2], x.shape[3]) != expected:
                raise UnservedError(
                    f"layer {self.index} caches {name} of shape {tuple(x.shape)}, where its config tells of "
                    f"{expected[1]} heads of {expected[2]}"
                )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.seen == 0
        self.k = key_states if first else torch.cat([self.k, key_states], 2)
        self.v = value_states if first else torch.cat([self.v, value_states], 2)
        self.seen += key_states.shape[2]
        self.updates += 1
        return ProbeRows(self, "key", self.k), ProbeRows(self, "value", self.v)

    def check_call(self, module: nn.Module, query: Tensor, mask: Any, is_causal: Any, kwargs: dict[str, Any]) -> None:
        """Raise UnservedError on a call of attention that HeadQ would not compute as the model does."""
        known = SINKS, SOFTCAP
        problem = unknown_argument({name: x for name, x in kwargs.items() if name not in known}, self.options)
        if problem is not None:
            raise UnservedError(problem)
        if module is not self.module and module.layer_idx not in self.sharing:
            raise UnservedError(
                f"the keys of layer {self.index} are read by a {type(module).__name__} that does not store them"
            )
        b, n_heads, s, d = query.shape
        if (b, d) != (1, self.shape.head_dim) or n_heads % self.shape.n_kv_heads:
            raise UnservedError(f"layer {self.index} has queries {tuple(query.shape)} for keys {tuple(self.k.shape)}")
        if is_causal is False and mask is None and s > 1:
            raise UnservedError(f"its attention is not causal (layer {self.index})")
        why = None if mask is None else odd_mask(mask, s, self.seen, self.sliding_window)
        if why is not None:
            raise UnservedError(f"layer {self.index}: {why}")
        self.shape = dataclasses.replace(
            self.shape, n_heads=n_heads, softcap=kwargs.get(SOFTCAP), readers=1 + len(self.sharing)
        )
        self.reads += 1

    def attend(self, query: Tensor, scaling: float, sinks: Tensor | None) -> Tensor:
        """Causal attention over all rows ``[1, S, Hq, D]``; a window does not matter to so few."""
        s = query.shape[2]
        shown = torch.ones(1, s, self.seen, dtype=torch.bool, device=query.device).tril(self.seen - s)
        out, lse = attend_new(query, scaling, self.k, self.v, shown, self.shape.softcap)
        out = out if sinks is None else out * sink_share(lse, sinks)
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def compare(self, module: nn.Module, query: Tensor, scaling: float, out: Tensor, kwargs: dict[str, Any]) -> None:
        """Raise UnservedError where the model's own function gives another output."""
        s = query.shape[2]
        if self.eager is None or query.is_meta or (self.sliding_window or self.seen) < self.seen:
            return
        hidden = torch.ones(s, self.seen, dtype=torch.bool, device=query.device).triu(self.seen - s + 1)
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask.masked_fill_(hidden, torch.finfo(query.dtype).min)
        try:
            own = self.eager(module, query, self.k, self.v, mask[None, None], scaling=scaling, dropout=0.0, **kwargs)[0]
        except (TypeError, ValueError, RuntimeError, AttributeError):  # a function of another form
            return
        limit = math.sqrt(torch.finfo(query.dtype).eps) * (own.float().norm() + 1e-6)
        if own.shape == out.shape and not (own.float() - out.float()).norm() <= limit and bool(own.isfinite().all()):
            raise UnservedError(
                f"the attention of layer {self.index} is more than a softmax of scaled products of queries and keys"
            )

    @property
    def observed(self) -> LayerShape:
        """As its calls showed it."""
        return self.shape

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens seen and the new ones."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """The sliding window, or -1: no limit."""
        return -1 if self.sliding_window is None else self.sliding_window


class LatentProbeLayer(ProbeLayer):
    """Of rows that are read absorbed: what the module itself would expand, and whether both come to the same."""

    def __init__(
        self, index: int, shape: LayerShape, module: Any, options: frozenset[str], eager: Any, readers: frozenset[int],
    ) -> None:  # fmt: skip
        heads, key, value = module.num_heads, module.qk_nope_head_dim + module.qk_rope_head_dim, module.v_head_dim
        self.widths = shape.latent or 0, module.qk_rope_head_dim
        self.row: Tensor | None = None
        self.as_rows = shape
        super().__init__(index, LayerShape(heads, heads, key, None, value), module, options, eager, readers)
        latent.put_on([module])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a latent ``[1, 1, S, r]`` and a rotary key ``[1, 1, S, rope]``."""
        forms = [(*x.shape[:2], x.shape[3]) for x in (key_states, value_states)]
        if forms != [(1, 1, width) for width in self.widths]:
            raise UnservedError(f"layer {self.index} caches {forms}, not a latent and a rotary key of {self.widths}")
        row = torch.cat([key_states, value_states], -1)
        self.row = row if self.row is None else torch.cat([self.row, row], 2)
        return super().update(*latent.expanded(self.module, row))

    def attend(self, query: Tensor, scaling: float, sinks: Tensor | None) -> Tensor:
        """See :class:`ProbeLayer`."""
        out, s = super().attend(query, scaling, sinks), query.shape[2]
        assert self.row is not None
        shown = torch.ones(1, s, self.seen, dtype=torch.bool, device=query.device).tril(self.seen - s)
        absorbed = latent.absorbed(self.module, query)
        other, _ = attend_new(absorbed, scaling, self.row, self.row, shown, self.shape.softcap)
        other = latent.read_out(self.module, other.to(query.dtype).transpose(1, 2))
        limit = math.sqrt(torch.finfo(query.dtype).eps) * (out.float().norm() + 1e-6) if not query.is_meta else None
        if limit is not None and not (other.float() - out.float()).norm() <= limit and bool(out.isfinite().all()):
            raise UnservedError(f"layer {self.index} does more with its latents than expand them by kv_b_proj")
        return out

    @property
    def observed(self) -> LayerShape:
        """See :class:`ProbeLayer`; of rows."""
        return dataclasses.replace(self.as_rows, softcap=self.shape.softcap)


class ProbeCache(Cache):
    """The cache of the probe."""

    def __init__(
        self, config: Any, places: Sequence[int], shapes: list[LayerShape], modules: list[nn.Module],
        options: frozenset[str], eager: Any,
    ) -> None:  # fmt: skip
        layers, sharing = dense_layers(config), shared_places(config)
        self.packed: list[ProbeLayer] = []
        for i, shape, module in zip(places, shapes, modules, strict=True):
            readers = frozenset(reader for reader, place in sharing.items() if place == i)
            kind = ProbeLayer if shape.latent is None else LatentProbeLayer
            layers[i] = packed_layer(kind, layers[i], i, shape, module, options, eager, readers)
            self.packed.append(layers[i])
        super().__init__(layers=layers)
        self.calls = 0

    def check_called(self) -> None:
        """After a call: raise UnservedError unless each layer has stored its rows and read them once."""
        self.calls += 1
        for layer in self.packed:
            kind, n = type(layer.module).__name__, 1 + len(layer.sharing)
            for count, each, done in (
                (layer.updates, 1, "caches keys"), (layer.reads, n, "reads them through AttentionInterface"),
            ):  # fmt: skip
                more = count - each * (self.calls - 1)
                if more != each:
                    times, needs = "never" if more == 0 else f"{more} times", "once" if each == 1 else f"{each} times"
                    raise UnservedError(f"in a call layer {layer.index} ({kind}) {times} {done}, HeadQ needs {needs}")

    @property
    def shapes(self) -> list[LayerShape]:
        """Of each layer, as its calls showed them."""
        return [layer.observed for layer in self.packed]


def odd_mask(mask: Any, queries: int, tokens: int, window: int | None) -> str | None:
    """What a mask of the probe's call does beside hiding later tokens and those beyond the window; None: nothing."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] not in (1, queries):
        return f"its attention takes a mask of its own, a {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}"
    if mask.is_meta:
        return None if mask.shape[1] == 1 else "its mask differs between heads"
    mask = mask[..., :tokens]
    age = torch.arange(tokens - queries, tokens, device=mask.device)[:, None] - torch.arange(tokens, device=mask.device)
    seen = (age >= 0) & (age < (window or tokens))
    own = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if not torch.equal(own.expand(*own.shape[:2], queries, tokens), seen.expand(*own.shape[:2], queries, tokens)):
        return "its attention is not causal, or hides other tokens than a sliding window does"
    if mask.dtype != torch.bool and bool((mask.masked_select(own) != 0).any()):
        return "its mask adds to the scores"
    return None


def probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the probe: notes how it is called, and computes it exactly."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    ours = isinstance(key, ProbeRows) and isinstance(value, ProbeRows)
    if not ours or key.layer is not value.layer or (key.side, value.side) != ("key", "value"):  # type: ignore[attr-defined]
        raise UnservedError(f"a {type(module).__name__} attends over other keys and values than the cache returns")
    layer: ProbeLayer = key.layer  # type: ignore[attr-defined]
    layer.check_call(module, query, attention_mask, is_causal, kwargs)
    out = layer.attend(query, scale, kwargs.get(SINKS))
    layer.compare(module, query, scale, out, kwargs)
    return out, None


AttentionInterface.register(NAME, probe_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
