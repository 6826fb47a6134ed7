"""A packed cache on disk: stored once for a long prompt, read back by any process with the same model."""

import dataclasses
import math
import os
from typing import Any

import torch
import torchao
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from headq_ao.cache.serialize import batch_from_data, batch_to_data, layer_from_tensors, layer_to_tensors
from headq_ao.cache.token_ids import EMBEDDED, PAD, UNKNOWN
from headq_ao.codecs import registry
from headq_ao.compression import compress, decompress
from headq_ao.config import HeadQConfig
from headq_ao.files import FileKind
from headq_ao.integrations.transformers.hybrid import keeps_states, put_states, state_data, state_tensors
from headq_ao.integrations.transformers.identity import embedding_table, identity_problem, model_identity, stamp
from headq_ao.integrations.transformers.sink_check import TELLING, StoredCache, sink_error, tolerance
from headq_ao.user_warning import warn

PROMPT_CACHE = FileKind("prompt cache", 5, "fill a HeadQCache with the prompt and save it again", oldest=4)
IDS, STATE, COMPRESSED = "token_ids", "state", "compressed"


def save_cache(
    cache: StoredCache, model: PreTrainedModel, path: str | os.PathLike[str], compressed: bool = False
) -> None:  # fmt: skip
    """Write a cache; see :meth:`headq_ao.HeadQCache.save`."""
    cache.batch.settle()
    cache.ids.crop(cache.batch.lengths.seen)
    check_saveable(cache, model)
    tensors: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.packed):
        held, description = layer_to_tensors(layer)
        tensors |= {f"{i}.{name}": t for name, t in held.items()}
        layers.append(description)
    states: dict[str, Any] = {}
    for i, layer in enumerate(cache.layers):
        if keeps_states(layer):
            states[str(i)] = state_data(layer)
            tensors |= {f"{STATE}.{i}.{name}": t.contiguous() for name, t in state_tensors(layer).items()}
    ids = cache.ids.of_slots(cache.get_seq_length())
    if ids is not None:
        tensors[IDS] = ids
    versions = {m.__name__: m.__version__ for m in (torch, torchao, transformers)}
    head = model_head(model, cache.config, ids) | {"tokens": cache.get_seq_length(), "versions": versions}
    head |= {
        "counts": batch_to_data(cache.batch),
        "layers": layers,
        "states": states,
        "ids_capacity": cache.ids.capacity,
        "embedding": embedding_told(ids),
        "sinks": sinks_at_saving(cache, model),
    }
    if compressed:
        tensors, head[COMPRESSED] = compress(tensors)
    PROMPT_CACHE.save(path, head, tensors)


def check_saveable(cache: StoredCache, model: PreTrainedModel) -> None:
    """Raise ValueError where a cache holds nothing, or what cannot be written, or what the model would not compute."""
    if not cache.packed or not all(layer.is_initialized for layer in cache.packed):
        raise ValueError("this cache holds no tokens yet; call the model with it first, model(ids, cache=cache)")
    if len({layer.seen for layer in cache.packed}) > 1:
        raise ValueError("an earlier call failed part-way and its layers hold different tokens; call reset() first")
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


def sinks_at_saving(cache: StoredCache, model: PreTrainedModel) -> float | None:
    """:func:`~.sink_check.sink_error` for the file; None, with a warning, where it says nothing."""
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


def load_cache(cache: StoredCache, model: PreTrainedModel, path: str | os.PathLike[str]) -> None:
    """Fill an empty cache of ``model`` from a file; see :meth:`headq_ao.HeadQCache.load`."""
    head, tensors = PROMPT_CACHE.load(path)
    if COMPRESSED in head:
        with PROMPT_CACHE.refusing(path):
            tensors = decompress(tensors, head[COMPRESSED])
    state = model._headq
    ids = tensors.pop(IDS, None)
    with PROMPT_CACHE.refusing(path):
        check_same(model_head(model, cache.config, ids), head)
        batch_from_data(cache.batch, head["counts"])
        for i, (layer, description) in enumerate(zip(cache.packed, head["layers"], strict=True)):
            own = {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
            try:
                layer_from_tensors(layer, description, own, state.device(i))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"layer {i}: {error!r}") from error
        for i, data in head.get("states", {}).items():
            own = {n.removeprefix(f"{STATE}.{i}."): t for n, t in tensors.items() if n.startswith(f"{STATE}.{i}.")}
            put_states(cache.layers[int(i)], data, own, state.device(0))
        put_ids(cache, ids, head["ids_capacity"], embedding_device(model, cache))
        check_sinks(cache, model, head["sinks"])
    cache.filled = stamp(model)


def put_ids(cache: StoredCache, ids: Tensor | None, capacity: int, device: torch.device) -> None:
    """Give a cache that was filled from a file its token ids."""
    held = (cache.batch.lengths.batch, cache.batch.lengths.seen)
    if ids is not None and (ids.dtype != torch.int32 or ids.shape != held or (ids.numel() and int(ids.min()) < PAD)):
        raise ValueError(f"its token ids must be int32 {held}, got {ids.dtype} {tuple(ids.shape)}")
    cache.ids.put(None if ids is None else ids.to(device), capacity)


def embedding_device(model: PreTrainedModel, cache: StoredCache) -> torch.device:
    """Where a model takes token ids."""
    table = embedding_table(model)
    return cache.packed[0].device if table is None or table.device.type == "meta" else table.device


def check_sinks(cache: StoredCache, model: PreTrainedModel, at_saving: float | None) -> None:
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
    return {
        "fingerprint": model._headq.fingerprint,
        "shapes": [dataclasses.asdict(shape) for shape in model._headq.shapes],
        "identity": model_identity(model, ids),
        "config": options,
        "calibrated": config.calibration is not None,
        "codecs": [codec.sketch() for codec in model._headq.codecs],
        "segment_tokens": [codec.frame_tokens for codec in model._headq.codecs],
    }


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a config of any version that mean the same where they are equal: the version says what others are
    where they are not written.

    Example:
        >>> from headq_ao.integrations.transformers.prompt_cache import comparable
        >>> comparable({"k_bits": 2, "version": 1}) == comparable({"k_bits": 2, "scale_bits": 16, "version": 2})
        True
    """
    unwritten = {"scale_bits": 16} if options.get("version") == 1 else {}
    return {name: value for name, value in (unwritten | options).items() if name != "version"}


def check_same(here: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise ValueError where a file was made with another model, other weights, another config or calibration."""
    codec = there["config"].get("codec")
    if codec is not None and codec != here["config"]["codec"]:
        registry.check(codec, there["config"]["codec_options"] or {})
    configs = comparable(here["config"]), comparable(there["config"])
    for what, ours, theirs in (
        ("another model", here["fingerprint"], there["fingerprint"]), ("another config", *configs),
    ):  # fmt: skip
        wrong = [k for k in ours if k != "weights" and ours[k] != theirs.get(k)]
        if wrong:
            told = "; ".join(f"{k} is {ours[k]!r} here and {theirs.get(k)!r} there" for k in wrong)
            raise ValueError(
                f"it was made with {what}: {told}; load it into a model and with a config like those, or compute the "
                "prompt again"
            )
    if here["shapes"] != there["shapes"]:
        raise ValueError("it was made with other attention heads, as on another rank of a tensor-parallel model")
    if here["calibrated"] != there["calibrated"]:
        raise ValueError(f"it was made {'with' if there['calibrated'] else 'without'} a calibration, unlike this model")
    framed = there.get("segment_tokens", [0] * len(there["codecs"]))
    if here["segment_tokens"] != framed:
        told = ", ".join(
            f"{max(x, default=0)} {where}" for x, where in ((here["segment_tokens"], "here"), (framed, "there"))
        )
        raise ValueError(f"it was made with keys in the frames of other segments: of tokens {told}")
    problem = identity_problem(here["identity"], there["identity"])
    if problem is not None:
        raise ValueError(f"it was made with {problem}")
    for i, (a, b) in enumerate(zip(here["codecs"], there["codecs"], strict=True)):
        if len(a) != len(b) or not all(math.isclose(x, y, abs_tol=1e-3) for x, y in zip(a, b, strict=True)):
            raise ValueError(f"it was made with another calibration (layer {i} differs)")
