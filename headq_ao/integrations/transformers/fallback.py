"""Models whose attention cannot read packed tokens: their cache is packed in memory and gives dequantized rows.

Memory is saved, time is not: each step dequantizes all rows, one layer at a time. What a model caches is observed with
two tokens and then a third on a copy (:mod:`headq_ao.integrations.transformers.probe`).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from headq_ao.cache.dequantized import DequantizedLayer
from headq_ao.cache.tiling import Tiling
from headq_ao.calibration.observers import Recorder
from headq_ao.codecs.unseen import isotropic_queries
from headq_ao.integrations.config_only.shapes import dense_layers, layer_configs
from headq_ao.integrations.transformers.cache_layer import HeadQCacheLayer
from headq_ao.integrations.transformers.hybrid import kind, packable, packed_layer
from headq_ao.integrations.transformers.models import attention_problem, check_cached, input_embedding, tensor_parallel
from headq_ao.integrations.transformers.probe import CALLS, cheap, quiet, run, twin_of

SAME = 1e-4  # relative; what rounding may change


class Rows(NamedTuple):
    """What a layer of a cache holds: its place among them, heads and coordinates of keys and of values."""

    place: int
    keys: tuple[int, int]
    values: tuple[int, int]
    sliding_window: int | None


class FallbackLayer(DequantizedLayer, HeadQCacheLayer):
    """:class:`DequantizedLayer` by the names that transformers calls."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that the next :meth:`update` will return, and the position of the first."""
        seen = self.get_seq_length()
        first = 0 if self.sliding_window is None else max(seen - self.sliding_window + 1, 0)
        return seen - first + query_length, first


def truly_refused(model: PreTrainedModel) -> bool:
    """Whether a model has no cache of keys and values that a fallback could pack: it has none at all, is an encoder or
    half of an encoder–decoder, or its heads are spread over processes."""
    try:
        check_cached(model)
        input_embedding(model)
    except ValueError:
        return True
    problem = attention_problem(model)
    prefix = any(getattr(c, "use_bidirectional_attention", None) for c in layer_configs(model.config))  # a prefix LM
    halves = getattr(model.config, "is_encoder_decoder", False) or (problem is not None and not prefix)
    return halves or tensor_parallel(model)[1] > 1


def observed_rows(model: PreTrainedModel) -> list[Rows]:
    """What a model caches, observed on a copy; and that it runs on rows that a cache returns, whatever holds them.

    Raises:
        ValueError: where its cache is not one of rows that each call appends to once, and reads from what comes back.
    """
    twin, _ = twin_of(model, [], not cheap(model))
    cache, kept = DynamicCache(config=twin.config), DynamicCache(config=twin.config)
    cache.layers, kept.layers = dense_layers(twin.config), dense_layers(twin.config)
    for i, layer in enumerate(cache.layers):
        if packable(layer):
            layer.__class__, layer.seen = watched_class(type(layer)), []  # type: ignore[arg-type]
            kept.layers[i] = packed_layer(Keeper, kept.layers[i], getattr(layer, "sliding_window", None))
    with quiet(model):
        for call, length in enumerate(CALLS):
            logits = called(twin, cache, length)
            for i, layer in enumerate(cache.layers):
                if hasattr(layer, "seen"):
                    check_rows(i, layer.seen, call + 1, length)
            if not any(hasattr(layer, "seen") for layer in cache.layers):
                kinds = sorted({kind(layer) for layer in cache.layers})
                raise ValueError(f"its cache holds no plain keys and values, but {', '.join(kinds)}")
            check_same(logits, called(twin, kept, length))
    return [rows_of(i, layer, *layer.seen[0]) for i, layer in enumerate(cache.layers) if hasattr(layer, "seen")]


def called(twin: PreTrainedModel, cache: Cache, length: int) -> Any:
    """The logits of one call."""
    try:
        return getattr(run(twin, cache, length), "logits", None)
    except Exception as error:
        raise ValueError(f"two tokens and then a third do not run with such a cache: {error!r}") from error


def check_same(logits: Any, other: Any) -> None:
    """Raise ValueError where a model gives other logits when another object holds its rows."""
    if not isinstance(logits, Tensor) or logits.is_meta:
        return
    if not (logits.float() - other.float()).norm() <= SAME * logits.float().norm():
        raise ValueError("it does more with its cache than append rows and read what comes back")


@functools.cache
def watched_class(dense: Any) -> Any:
    """Dense layers that remember what they are given, in ``seen``; models may copy them."""

    def update(self: Any, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((k, v))
        return dense.update(self, k, v, *args, **kwargs)

    return type(f"Watched{dense.__name__}", (dense,), {"update": update, "_layer_type": None})


class Keeper(CacheLayerMixin):
    """Rows as they came, where nobody finds them: what a model reads elsewhere than from :meth:`update` is missing."""

    is_compileable = False
    is_croppable = True

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__()
        self.is_sliding, self.sliding_window = sliding_window is not None, sliding_window
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Rows are room enough."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All rows."""
        k, v = (key_states, value_states)
        if self._k is not None and self._v is not None:
            k, v = torch.cat([self._k, k], 2), torch.cat([self._v, v], 2)
        self._k, self._v = k, v
        return k, v

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self._k is None else self._k.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens seen and the new ones: fewer than any window."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """The sliding window, or -1: no limit."""
        return -1 if self.sliding_window is None else self.sliding_window


def check_rows(place: int, seen: list[tuple[Tensor, Tensor]], calls: int, length: int) -> None:
    """Raise ValueError unless a layer was given one chunk of rows in each call."""
    if len(seen) != calls:
        times = {0: "never"}.get(len(seen) - calls + 1, f"{len(seen) - calls + 1} times")
        raise ValueError(f"in a call layer {place} caches keys {times}, and a packed layer needs them once")
    k, v = seen[-1]
    forms = [tuple(x.shape) for x in (k, v)]
    if k.ndim != 4 or v.ndim != 4 or {k.shape[2], v.shape[2]} != {length} or not k.numel() or not v.numel():
        raise ValueError(
            f"layer {place} caches keys and values of shapes {forms[0]} and {forms[1]} for {length} tokens"
        )


def rows_of(place: int, layer: Any, k: Tensor, v: Tensor) -> Rows:
    """Of a layer that was given such keys and values ``[B, H, S, D]``."""
    sliding = getattr(layer, "sliding_window", None)
    return Rows(place, (k.shape[1], k.shape[3]), (v.shape[1], v.shape[3]), sliding)


def recording_cache(model: PreTrainedModel, places: list[int], tilings: list[Tiling], recorder: Recorder) -> Cache:
    """A dense cache that shows a recorder what it is given: keys and values; of queries nothing is known, so they count
    as evenly spread (:func:`headq_ao.codecs.unseen.isotropic_queries`)."""
    cache = DynamicCache(config=model.config)
    cache.layers = dense_layers(model.config)
    cache.layers += [DynamicLayer() for _ in range(len(cache.layers), max(places) + 1)]
    for place, tiling in zip(places, tilings, strict=True):
        layer = cache.layers[place]
        layer.__class__ = watched_class(type(layer))  # type: ignore[arg-type]
        layer.seen = Shown(recorder, place, tiling)
    return cache


class Shown:
    """What a watched layer shows to a recorder."""

    def __init__(self, recorder: Recorder, place: int, tiling: Tiling) -> None:
        self.recorder, self.place, self.tiling = recorder, place, tiling

    def append(self, rows: tuple[Tensor, Tensor]) -> None:
        """Record the rows of one call."""
        k, v = self.tiling.cut(*rows)
        self.recorder.record(self.place, isotropic_queries(k), k, v, 0.0, None)
