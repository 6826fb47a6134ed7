"""The layers of a cache: attention layers are packed, layers of other kinds stay as transformers has them.

Where one layer has both, as in Falcon-H1, or keeps more than keys and values, as the keys of an indexer, a packed layer
holds that beside them as transformers does.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.memory_report import storage_bytes
from headq_ao.integrations.config_only.shapes import PLAIN, DummyLayer

SIZES = ("get_mask_sizes", "get_seq_length")  # what tells how rows come back
ROWS = frozenset(vars(DynamicSlidingWindowLayer(1))) - {"record_past"} | {
    "dtype",
    "device",
}  # what packed layers hold in their own way
BATCH_DIM = {"indexer_position_ids": 1}  # of what is kept beside rows, where it is not the first


def packable(layer: Any) -> bool:
    """Whether a layer holds keys and values that come back as full or sliding-window layers give them."""
    base: type[Any] = DynamicSlidingWindowLayer if isinstance(layer, DynamicSlidingWindowLayer) else DynamicLayer
    same = all(getattr(type(layer), name, None) is getattr(base, name) for name in SIZES)
    return isinstance(layer, DynamicLayer) and same


def kind(layer: Any) -> str:
    """A layer's class, for messages and reports."""
    return "packed" if isinstance(layer, PackedLayer) else type(layer).__name__


@functools.cache
def mixed_class(packed: Any, dense: Any) -> Any:
    """Packed layers that keep beside rows what transformers' ``dense`` ones do."""

    def lazy_initialization(self: Any, *args: Any, **kwargs: Any) -> None:
        """Of states alone: room for rows comes with the first update."""
        (dense if kwargs else packed).lazy_initialization(self, *args, **kwargs)

    bases = (packed, Begun, dense)
    own = {"lazy_initialization": lazy_initialization, "_layer_type": None}  # else transformers would make these
    return type(f"{packed.__name__}And{dense.__name__}", bases, own)


class Begun:
    """Behind it in the order of bases nothing is initialized: what ``dense`` begins with was copied."""

    def __init__(self) -> None:
        pass


def packed_layer(packed: type[Any], layer: Any, *args: Any) -> Any:
    """A layer ``packed(*args)`` in place of transformers' own ``layer``, new and empty."""
    if type(layer) in PLAIN:
        return packed(*args)
    mixed: Any = mixed_class(packed, type(layer))  # type: ignore[arg-type]
    made = mixed.__new__(mixed)
    beside = {name: value for name, value in vars(layer).items() if name not in ROWS}
    vars(made).update(copy.deepcopy(beside), is_initialized=False)
    packed.__init__(made, *args)
    made.beside, made.dense_kind, made.dtype, made.device = beside, type(layer).__name__, None, None
    return made


def states_kind(layer: Any) -> str:
    """The class, among transformers' own, of a layer that keeps states."""
    return str(getattr(layer, "dense_kind", type(layer).__name__))


def keeps_states(layer: Any) -> bool:
    """Whether a layer holds what cannot step back: a crop, or an earlier call that failed, cannot be undone."""
    return hasattr(layer, "beside") or not isinstance(layer, (PackedLayer, DummyLayer))


def _beside(layer: Any) -> dict[str, Any]:
    """What a layer holds beside packed tokens, by attribute."""
    names = layer.beside if hasattr(layer, "beside") else () if isinstance(layer, PackedLayer) else vars(layer)
    return {name: vars(layer)[name] for name in names if name in vars(layer)}


def _tensors(layer: Any) -> Iterator[tuple[str, Any, Any, Tensor]]:
    """Tensors beside packed tokens: name, what holds it, under which key."""
    for name, held in _beside(layer).items():
        if isinstance(held, Tensor):
            yield name, vars(layer), name, held
        elif isinstance(held, dict):
            yield from ((f"{name}.{key}", held, key, t) for key, t in held.items() if isinstance(t, Tensor))


def state_tensors(layer: Any) -> dict[str, Tensor]:
    """What a layer keeps beside packed tokens, by name."""
    return {name: t for name, _, _, t in _tensors(layer)}


def state_data(layer: Any) -> dict[str, Any]:
    """Plain data that goes with :func:`state_tensors`; of a dict its items, for JSON has no other keys than texts."""
    plain = (bool, int, str, type(None))
    data: dict[str, Any] = {}
    for name, held in _beside(layer).items():
        if isinstance(held, plain):
            data[name] = held
        elif isinstance(held, dict):
            data[name] = [[key, x if isinstance(x, plain) else None] for key, x in held.items()]
    return data


def put_states(layer: Any, data: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give an empty layer what :func:`state_tensors` and :func:`state_data` told.

    Raises:
        ValueError: where they are not its own.
    """
    wrong = sorted(({name.partition(".")[0] for name in tensors} | data.keys()) - _beside(layer).keys())
    if wrong:
        raise ValueError(f"a {type(layer).__name__} has no {', '.join(wrong)}")
    for name, value in data.items():
        setattr(layer, name, {key: x for key, x in value} if isinstance(value, list) else value)
    for name, t in tensors.items():
        field, _, key = name.partition(".")
        held = getattr(layer, field)
        if key:
            held[next(k for k in held if str(k) == key)] = t.to(device)
        else:
            setattr(layer, field, t.to(device))
        if not isinstance(layer, PackedLayer):
            layer.device, layer.dtype = device, t.dtype


def forget_states(layers: Sequence[Any]) -> None:
    """Before a first call: an earlier one, or one that failed, may have left something."""
    for layer in layers:
        if hasattr(layer, "beside"):
            vars(layer).update(copy.deepcopy(layer.beside))
        elif not isinstance(layer, PackedLayer):
            layer.reset()


def select_states(layers: Sequence[Any], index: Tensor) -> None:
    """Keep those sequences, in that order."""
    for layer in layers:
        for name, held, key, t in _tensors(layer):
            held[key] = t.index_select(BATCH_DIM.get(name, 0), index.to(t.device))


def states_bytes(layers: Sequence[Any]) -> int:
    """Bytes of what is kept beside packed tokens."""
    return storage_bytes([t for layer in layers for t in state_tensors(layer).values()])
