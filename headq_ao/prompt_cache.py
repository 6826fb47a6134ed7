"""A packed cache on disk: stored once for a long prompt, read back by any process with the same model."""

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

import torch
import torchao
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.codec import runs_of
from headq_ao.config import HeadQConfig
from headq_ao.files import FileKind
from headq_ao.identity import embedding_table, identity_problem, model_identity, stamp
from headq_ao.layer_codec import Epoch, LayerCodec
from headq_ao.models import attention_modules, execution_device
from headq_ao.sink_check import TELLING, sink_error, tolerance
from headq_ao.state import RowCounts, RowStore
from headq_ao.token_ids import EMBEDDED, PAD, UNKNOWN
from headq_ao.user_warning import warn

if TYPE_CHECKING:
    from headq_ao.cache import HeadQCache

PROMPT_CACHE = FileKind("prompt cache", 3, "fill a HeadQCache with the prompt and save it again")
IDS = "token_ids"
EXACT = ("k", "v", "q")
STORES = ("store_k", "store_v")


def save_cache(cache: "HeadQCache", model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Write a cache; see :meth:`headq_ao.HeadQCache.save`."""
    check_saveable(cache, model)
    tensors: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.layers):
        held, description = layer_to_file(layer)
        tensors |= {f"{i}.{name}": t for name, t in held.items()}
        layers.append(description)
    ids = cache.ids.of_slots(cache.get_seq_length())
    if ids is not None:
        tensors[IDS] = ids
    versions = {m.__name__: m.__version__ for m in (torch, torchao, transformers)}
    head = model_head(model, cache.config, ids) | {"tokens": cache.get_seq_length(), "versions": versions}
    head |= {
        "layers": layers,
        "ids_capacity": cache.ids.capacity,
        "embedding": embedding_told(ids),
        "sinks": sinks_at_saving(cache, model),
    }
    PROMPT_CACHE.save(path, head, tensors)


def check_saveable(cache: "HeadQCache", model: PreTrainedModel) -> None:
    """Raise ValueError where a cache holds nothing, or what cannot be written, or what the model would not compute."""
    if not cache.layers or not all(layer.is_initialized for layer in cache.layers):
        raise ValueError("this cache holds no tokens yet; call the model with it first, model(ids, cache=cache)")
    if len({layer.seen for layer in cache.layers}) > 1:
        raise ValueError("an earlier call failed part-way and its layers hold different tokens; call reset() first")
    if any(type(layer) is not HeadQCacheLayer for layer in cache.layers):
        raise ValueError(f"only HeadQ layers can be saved, this cache holds {type(cache.layers[0]).__name__}")
    if cache.foreign:
        raise ValueError(
            "another model than the one that this cache was made for has computed tokens in it; "
            "fill a HeadQCache made for the model that is called, and save that"
        )
    if cache.filled is not None and cache.filled != stamp(model):
        raise ValueError(
            "the model's weights or adapters have changed since this cache was filled; "
            "fill a new HeadQCache with the model as it is now, or save before the change"
        )


def sinks_at_saving(cache: "HeadQCache", model: PreTrainedModel) -> float | None:
    """:func:`~headq_ao.sink_check.sink_error` for the file; None, with a warning, where it says nothing."""
    try:
        error = sink_error(cache, model)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError) as problem:  # it needs more than ids, such as an image
        why, error = str(problem), math.inf
    else:
        why = f"they are {error} off"
    if error is None or error <= TELLING:
        return error
    warn(
        f"HeadQ: the first tokens of this cache do not come out again when the model computes them alone ({why}): "
        "it was changed in a way that its parameters do not tell, or the prompt had other positions, masks or images; "
        "HeadQCache.load will compare weights and embedding rows only"
    )
    return None


def load_cache(cache: "HeadQCache", model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Fill an empty cache of ``model`` from a file; see :meth:`headq_ao.HeadQCache.load`."""
    head, tensors = PROMPT_CACHE.load(path)
    modules = attention_modules(model, len(cache.layers))
    ids = tensors.pop(IDS, None)
    with PROMPT_CACHE.refusing(path):
        check_same(model_head(model, cache.config, ids), head)
        for i, (layer, module, description) in enumerate(zip(cache.layers, modules, head["layers"], strict=True)):
            own = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            try:
                layer_from_file(layer, module, description, own)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"layer {i}: {error!r}") from error
        if len({(layer.seen, len(layer.rows)) for layer in cache.layers}) > 1:
            raise ValueError("its layers hold different numbers of tokens")
        put_ids(cache, ids, head["ids_capacity"], embedding_device(model, cache))
        check_sinks(cache, model, head["sinks"])
    cache.filled = stamp(model)


def put_ids(cache: "HeadQCache", ids: Tensor | None, capacity: int, device: torch.device) -> None:
    """Give a cache that was filled from a file its token ids."""
    held = (len(cache.layers[0].rows), cache.layers[0].seen)
    if ids is not None and (ids.dtype != torch.int32 or ids.shape != held or (ids.numel() and int(ids.min()) < PAD)):
        raise ValueError(f"its token ids must be int32 {held}, got {ids.dtype} {tuple(ids.shape)}")
    cache.ids.put(None if ids is None else ids.to(device), capacity)


def embedding_device(model: PreTrainedModel, cache: "HeadQCache") -> torch.device:
    """Where a model takes token ids."""
    table = embedding_table(model)
    return cache.layers[0].device if table is None or table.device.type == "meta" else table.device


def check_sinks(cache: "HeadQCache", model: PreTrainedModel, at_saving: float | None) -> None:
    """Raise ValueError where the model computes other keys or values for the sinks than a file holds."""
    if at_saving is None:
        return
    error = sink_error(cache, model)
    if error is not None and not error <= max(tolerance(cache), 4 * at_saving):
        raise ValueError(
            f"its first tokens come out otherwise here, {error:.3g} off and {at_saving:.3g} where it was saved: "
            "a hook, a switch or the code of the model differs, though its weights are the same"
        )


def embedding_told(ids: Tensor | None) -> str:
    """What of the input embedding a file's checksums cover, in words for who reads its head."""
    if ids is None or bool((ids == UNKNOWN).any()):
        return "all rows: not all token ids are known"
    embedded = int((ids == EMBEDDED).sum())
    return "rows of its token ids" + (f"; {embedded} slots came as embeddings, nothing is checked" if embedded else "")


def model_head(model: PreTrainedModel, config: HeadQConfig, ids: Tensor | None) -> dict[str, Any]:
    """What a model must share with the one that a file was made with, for a prompt of these token ids."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "calibration"}
    codecs = [module.headq for module in attention_modules(model, len(model._headq.shapes))]
    return {
        "fingerprint": model._headq.fingerprint,
        "shapes": [dataclasses.asdict(shape) for shape in model._headq.shapes],
        "identity": model_identity(model, ids),
        "config": options,
        "calibrated": config.calibration is not None,
        "codecs": [codec.sketch() for codec in codecs],  # type: ignore[union-attr,operator]
    }


def check_same(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise ValueError where a file was made with another model, other weights, another config or calibration."""
    for name, what in (("fingerprint", "another model"), ("config", "another config")):
        wrong = [k for k in here[name] if k != "weights" and here[name][k] != there[name].get(k)]
        if wrong:
            told = "; ".join(f"{k} is {here[name][k]!r} here and {there[name].get(k)!r} there" for k in wrong)
            raise ValueError(f"it was made with {what}: {told}")
    if here["shapes"] != there["shapes"]:
        raise ValueError("it was made with other attention heads, as on another rank of a tensor-parallel model")
    if here["calibrated"] != there["calibrated"]:
        raise ValueError(f"it was made {'with' if there['calibrated'] else 'without'} a calibration, unlike this model")
    problem = identity_problem(here["identity"], there["identity"])
    if problem is not None:
        raise ValueError(f"it was made with {problem}")
    for i, (a, b) in enumerate(zip(here["codecs"], there["codecs"], strict=True)):
        if len(a) != len(b) or not all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip(a, b, strict=True)):
            raise ValueError(f"it was made with another calibration (layer {i} differs)")


def layer_to_file(layer: HeadQCacheLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of one layer without unused capacity, and the counts that go with them."""
    held = max(row.exact for row in layer.rows)
    slots = max(row.slots for row in layer.rows)
    tensors = {f"exact.{n}": t[:, :, :held] for n in EXACT if (t := getattr(layer.exact, n)) is not None}
    stores = {}
    for name in STORES:
        store = getattr(layer, name)
        if slots:
            tensors |= {f"{name}.{j}": t for j, t in enumerate(store.view(0, slots))}
            stores[name] = {"units": store.units, "capacity": store.capacity}
    epochs = []
    for e, epoch in enumerate(layer.epochs):
        codec = epoch.codec
        own = {} if codec is None else {n: t for n, t in codec.tensors().items() if n in codec.own}
        if codec is not None and codec.side_read is codec.side_encode:
            own.pop("side_read", None)
        tensors |= {f"epoch{e}.{n}": t for n, t in own.items()}
        epochs.append({"begin": epoch.begin, "per_sequence": epoch.per_sequence, "ready": epoch.ready, "own": [*own]})
    if layer.value_codec is not None and layer.value_codec.unit is not None:
        tensors["value_unit"] = layer.value_codec.unit
    if layer.valid is not None:
        tensors["valid"] = layer.valid
    if layer.k_sum is not None:
        tensors["k_sum"] = layer.k_sum
    assert layer.exact.k is not None
    description = {
        "seen": layer.seen,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "rows": [dataclasses.asdict(row) for row in layer.rows],
        "rows_read": layer.rows_read,
        "exact_capacity": layer.exact.k.shape[2],
        "stores": stores,
        "epochs": epochs,
    }
    return tensors, description


def layer_from_file(
    layer: HeadQCacheLayer, module: nn.Module, description: dict[str, Any], held: dict[str, Tensor]
) -> None:
    """Put :func:`layer_to_file`'s data into an empty layer, with the capacity that it had."""
    device, codec = execution_device(module), module.headq
    assert isinstance(codec, LayerCodec)
    tensors = {name: t.to(device, copy=True) for name, t in held.items()}
    rows = [RowCounts(**row) for row in description["rows"]]
    layer.dtype, layer.device = getattr(torch, description["dtype"]), device
    check_layer(layer, codec, rows, description, tensors)
    layer.rows, layer.seen, layer.rows_read = rows, description["seen"], list(description["rows_read"])
    for name in EXACT:
        if f"exact.{name}" in tensors:
            setattr(layer.exact, name, widened(tensors[f"exact.{name}"], description["exact_capacity"]))
    for name, about in description["stores"].items():
        store: RowStore = getattr(layer, name)
        store.units, store.capacity = list(about["units"]), about["capacity"]
        parts = [tensors[f"{name}.{j}"] for j in range(len(store.units))]
        store.tensors = [widened(t, store.capacity // unit) for t, unit in zip(parts, store.units, strict=True)]
    for e, about in enumerate(description["epochs"]):
        own = {name: tensors[f"epoch{e}.{name}"] for name in about["own"]}
        key_codec = codec.with_own(own, layer.dtype) if own else None
        layer.epochs.append(Epoch(about["begin"], about["per_sequence"], key_codec, list(about["ready"])))
    if "value_unit" in tensors and codec.values is not None:
        layer.value_codec = dataclasses.replace(codec.values, unit=tensors["value_unit"])
    layer.valid, layer.k_sum = tensors.get("valid"), tensors.get("k_sum")
    layer.is_initialized = True


def widened(tensor: Tensor, capacity: int) -> Tensor:
    """The same rows in a tensor of ``capacity`` entries along dim 2."""
    wide = tensor.new_zeros((*tensor.shape[:2], capacity, *tensor.shape[3:]))
    wide[:, :, : tensor.shape[2]] = tensor
    return wide


def check_layer(
    layer: HeadQCacheLayer, codec: LayerCodec, rows: list[RowCounts], description: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:  # fmt: skip
    """Raise ValueError where counts and tensors of a layer do not fit each other or the model."""
    if not rows or any(n < 0 for row in rows for n in (*dataclasses.astuple(row), row.exact)):
        raise ValueError("its counts of rows are not usable")
    batch, heads, dim = len(rows), layer.shape.n_kv_heads, layer.shape.head_dim
    exact, slots = max(row.exact for row in rows), max(row.slots for row in rows)
    expected = {f"exact.{n}": (batch, heads, exact, dim) for n in "kv"} | {"k_sum": (batch, heads, dim)}
    expected["value_unit"] = (batch, heads, 1)
    expected["exact.q"] = (batch, layer.shape.n_heads, exact, dim)
    if "exact.k" not in tensors or "exact.v" not in tensors or description["exact_capacity"] < exact:
        raise ValueError("it lacks exact rows")
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensors[name].shape)}")
    if slots and set(description["stores"]) != set(STORES):
        raise ValueError("it lacks packed rows")
    for name, about in description["stores"].items():
        held = heads_of_tensors(codec, name, heads, len(about["units"]))
        for j, (unit, n) in enumerate(zip(about["units"], held, strict=True)):
            got = tuple(tensors[f"{name}.{j}"].shape)
            if got[:3] != (batch, n, slots // unit) or about["capacity"] < slots:
                raise ValueError(f"{name}.{j} must begin with {(batch, n, slots // unit)}, got {got}")


def heads_of_tensors(codec: LayerCodec, store: str, heads: int, tensors: int) -> list[int]:
    """How many KV heads each of a store's ``tensors`` holds: those of a run, where heads have different bits."""
    runs = runs_of(codec.calibrated, codec.values)
    if len(runs) == 1:
        return [heads] * tensors
    held = []
    for run in runs:
        of = run.keys if store == "store_k" else run.values
        held += [run.heads.stop - run.heads.start] * (1 if of is None else of.planes + 1 + of.has_zero)
    return held
