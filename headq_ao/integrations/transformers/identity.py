"""What of a model decides the keys and values of a prompt, as text that another process can compare.

Checksums read every byte each time they are asked: a parameter's version does not move when it is edited through
``.data`` or by another process. Reading costs about a second per GB of weights on one thread of a CPU.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headq_ao.cache.token_ids import UNKNOWN
from headq_ao.files import tensor_bytes
from headq_ao.integrations.transformers.models import plain_tensors

WORDS = 2**15  # 64-bit words of a block: they stay in a core's cache
GPU_BLOCKS = 256  # blocks at a time elsewhere
VALUES = 256  # numbers that a buffer without a place in checkpoints is told by
TOLERANCE = 1e-5  # of these numbers, between machines
# Parts of a name that tell who wraps a weight, not which it is.
WRAPPERS = frozenset(
    {"base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
# Entries of a model's config that do not change keys: how it is called, made and saved.
IDLE_ENTRIES = re.compile(
    r"_.*|.*token_id|use_cache|output_.*|return_dict.*|dtype|torch_dtype|transformers_version|name_or_path|id2label"
    r"|label2id|architectures|tie_.*|vocab_size|problem_type|initializer_.*|.*p?drop(out)?.*|quantization_config"
    r"|distributed_config|.*attn_implementation.*|gradient_checkpointing|pretraining_tp"
)


def model_identity(model: nn.Module, ids: Tensor | None) -> dict[str, Any]:
    """Everything of a model, but its code, that acts on a prompt of these token ids (:mod:`headq_ao.cache.token_ids`).

    ``weights``: checksums of parameters and buffers by name, the output head left out, and of the rows of the input
    embedding that the ids use, all rows where some are unknown. ``numbers``: of buffers that checkpoints do not hold,
    such as rotary frequencies, which may differ in rounding between machines; and floats that modules keep as
    attributes, such as scales. ``adapters``: which act, with their scaling. ``model_config``: of the model.
    ``offloaded``: weights that are elsewhere, and could not be read.
    """
    found: dict[str, Any] = {"weights": {}, "numbers": {}, "adapters": {}, "offloaded": []}
    table, seen = embedding_table(model), set()
    whole: dict[str, Tensor] = {}
    for path, module, tensors in acting_modules(model):
        if is_tuner(module) and (state := adapter_state(module)):
            found["adapters"][common_name(path)] = state
        found["numbers"] |= {common_name(f"{path}.{n}"): [x] for n, x in float_attributes(module).items()}
        for name, held in tensors.items():
            if id(held) in seen:
                continue
            seen.add(id(held))
            full, tensor = common_name(f"{path}.{name}"), brought(module, name, held)
            if tensor is None:
                found["offloaded"].append(full)
            elif held is table:
                found["weights"] |= embedding_rows(full, tensor, ids)
            elif name not in module._non_persistent_buffers_set or not has_fractions(tensor):
                whole[full] = tensor
            elif not moves_with_length(module, name):
                found["numbers"][full] = few_numbers(tensor)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found["weights"] |= dict(zip(whole, pool.map(checksum, whole.values()), strict=True))
    config: Any = getattr(model, "config", None)
    found["model_config"] = {} if config is None else acting_entries(config.to_dict())
    return found


def brought(module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """A tensor of a module or, where accelerate offloads it, what its hook would bring; None where that is not told."""
    if not any(t.device.type == "meta" for t in plain_tensors(tensor)):
        return tensor
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        held = getattr(one, "weights_map", None)
        if held is not None and name in held:
            return torch.as_tensor(held[name], device="cpu")
    return None


def has_fractions(tensor: Tensor) -> bool:
    """Whether it holds floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def identity_problem(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    """In which way a file was made with another model than the one here, None where they are the same."""
    if here["adapters"] != there["adapters"]:
        return f"other adapters: {adapters_told(there)} there, {adapters_told(here)} here"
    skip = {*here["offloaded"], *there["offloaded"]}
    ours, theirs = ({n: d for n, d in x["weights"].items() if n not in skip} for x in (here, there))
    wrong = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if wrong:
        more = " and others" if len(wrong) > 2 else ""
        told = [n + (" (only there)" if n not in ours else " (only here)" if n not in theirs else "") for n in wrong]
        kinds = "other weights (another model, dtype or weight quantization)"
        return f"{kinds}: {', '.join(told[:2])}{more}" if ours.keys() & theirs.keys() else kinds
    one, other = here["numbers"], there["numbers"]
    wrong = sorted(n for n in one.keys() | other.keys() if n not in skip and not alike(one.get(n), other.get(n)))
    if wrong:
        return f"other numbers beside the weights: {', '.join(wrong[:2])}{' and others' if len(wrong) > 2 else ''}"
    one, other = here["model_config"], there["model_config"]
    wrong = sorted(n for n in one.keys() & other.keys() if one[n] != other[n])
    if wrong:
        return "another model config: " + "; ".join(f"{n} is {one[n]!r} here and {other[n]!r} there" for n in wrong[:2])
    return None


def adapters_told(identity: dict[str, Any]) -> str:
    """The adapters of an identity in a few words."""
    kinds = sorted(set(identity["adapters"].values()))
    return " and ".join(kinds[:3]) + (", …" if len(kinds) > 3 else "") if kinds else "none"


def alike(one: list[float] | None, other: list[float] | None, tolerance: float = TOLERANCE) -> bool:
    """Whether two lists of numbers are equal up to rounding."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12) for a, b in zip(one, other, strict=True))


def stamp(model: nn.Module) -> int:
    """A number that changes when parameters are replaced or written to, or adapters switched, within this process.

    It reads no weights: edits through ``.data`` pass.
    """
    parts: list[Any] = []
    for module in model.modules():
        if is_tuner(module):
            parts.append(adapter_state(module))
        for p in module._parameters.values():
            if p is not None and p.device.type != "meta":
                parts += (id(p), 0 if p.is_inference() else p._version, p.dtype)
    return hash(tuple(parts))


def acting_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """The modules of a model that act on keys, with path and own tensors by name.

    Left out: the output head, HeadQ's codecs, and adapters that are not at work.
    """
    outer, inner = (getattr(model, f"get_{side}_embeddings", lambda: None) for side in ("output", "input"))
    head, embedding = (ask() for ask in (outer, inner))
    left_out = {id(m) for m in head.modules()} if isinstance(head, nn.Module) else set()
    if isinstance(embedding, nn.Module):
        left_out -= {id(m) for m in embedding.modules()}
    idle: set[str] = set()
    for path, module in model.named_modules():
        if id(module) in left_out or "headq" in path.split(".") or not idle.isdisjoint(path_and_owners(path)):
            continue
        if is_tuner(module):
            resting = set(module._get_available_adapters()) - set(adapters_at_work(module))
            containers = [name for name, child in module.named_children() if hasattr(child, "keys")]
            idle |= {f"{path}.{container}.{name}" for container in containers for name in resting}
        own = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        yield path, module, {name: t for name, t in own.items() if f"{path}.{name}" not in idle}


def path_and_owners(path: str) -> Iterator[str]:
    """The path of a module, and those of the modules that it is in."""
    return itertools.accumulate(path.split("."), "{}.{}".format)


def is_tuner(module: nn.Module) -> bool:
    """Whether a module holds PEFT adapters of a layer (found by its form, PEFT need not be there)."""
    kind = type(module)
    return isinstance(getattr(kind, "active_adapters", None), property) and hasattr(kind, "_get_available_adapters")


def adapters_at_work(module: Any) -> list[str]:
    """The adapters of one layer that change what it computes, merged ones too."""
    merged = list(getattr(module, "merged_adapters", None) or ())
    active = [] if module.disable_adapters else list(module.active_adapters)
    held = module._get_available_adapters()
    return sorted({name for name in active if name in held} | set(merged))


def adapter_state(module: Any) -> str:
    """The adapters at work in one layer in words, ``""``: none."""
    names = adapters_at_work(module)
    scaling: Any = getattr(module, "scaling", None)
    told = []
    for name in names:
        scale = scaling.get(name) if isinstance(scaling, dict) else None
        told.append(name if scale is None else f"{name} × {float(scale):.9g}")
    merged = sorted(getattr(module, "merged_adapters", None) or ())
    if merged:
        told.append(f"merged: {', '.join(merged)}" + (", to be undone" if module.disable_adapters else ""))
    return ", ".join(told)


def common_name(path: str) -> str:
    """A parameter's name without the parts that only tell who wraps it."""
    return ".".join(part for part in path.split(".") if part and part not in WRAPPERS)


def float_attributes(module: nn.Module) -> dict[str, float]:
    """Scales and the like that a module keeps as plain numbers; dropout rates do nothing in eval mode."""
    own = {n: x for n, x in vars(module).items() if type(x) is float and math.isfinite(x)}
    return {n: x for n, x in own.items() if not n.startswith("_") and "dropout" not in n and n != "p"}


def moves_with_length(module: nn.Module, name: str) -> bool:
    """Whether a buffer holds rotary frequencies of the longest sequence so far; the config tells how it is made."""
    kinds = str(getattr(module, "rope_type", ""))
    return "inv_freq" in name and "original" not in name and ("dynamic" in kinds or "longrope" in kinds)


def few_numbers(tensor: Tensor) -> list[float]:
    """A buffer's values, or of a large one norm and projection of 256 parts."""
    wide = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    x = torch.nan_to_num(wide.cpu().double().flatten())
    if len(x) <= VALUES:
        return x.tolist()
    x = nn.functional.pad(x, (0, -len(x) % VALUES)).unflatten(0, (VALUES, -1))
    norms = x.norm(dim=1)
    direction = torch.cos(torch.arange(x.shape[1], dtype=torch.float64, device=x.device) ** 2)
    projections = 1 + (x @ direction) / norms.clamp(min=1e-30) / x.shape[1] ** 0.5  # near 1: compared to 1e-5 of it
    return [*norms.tolist(), *projections.tolist()]


def acting_entries(config: dict[str, Any], within: str = "") -> dict[str, Any]:
    """The entries of a config that may change keys, those of nested ones by dotted names, as they come out of JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if IDLE_ENTRIES.fullmatch(str(key)):
            continue
        if isinstance(value, dict):
            found |= acting_entries(value, f"{within}{key}.")
        else:
            plain = (
                value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
            )
            found[f"{within}{key}"] = value if plain else str(list(value) if isinstance(value, tuple) else value)
    return found


def embedding_table(model: nn.Module) -> Tensor | None:
    """The weight whose rows are looked up by token ids, None where there is no one such table."""
    ask: Any = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(ask(), "weight", None) if ask is not None else None
    except NotImplementedError:
        return None
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def embedding_rows(name: str, table: Tensor, ids: Tensor | None) -> dict[str, str]:
    """The checksum of the rows that ids use, in the order of ids; of the whole table where some are unknown.

    Raises:
        ValueError: when the table has too few rows.
    """
    if ids is None or bool((ids == UNKNOWN).any()):
        return {name: checksum(table)}
    used = ids[ids >= 0].unique()
    if not len(used):
        return {}
    if int(used[-1]) >= table.shape[0]:
        raise ValueError(f"it holds the token id {int(used[-1])}, but {name} has {table.shape[0]} rows")
    return {name: checksum(table, used)}


def checksum(tensor: Tensor, rows: Tensor | None = None) -> str:
    """A checksum over all bytes of a tensor, or of some of its rows, the same on every machine and device.

    Each block of 32768 64-bit words is a sum of words times weights modulo 2⁶⁴, after the upper half of each word was
    folded into the lower; a SHA-256 over the sums, dtypes and shapes follows. A single change is always noticed; swaps,
    permutations and changes of many signs are missed about once in 2³².
    """
    digest = hashlib.sha256()
    for part in plain_tensors(tensor):
        own = rows is not None and part.ndim > 0 and part.shape[0] == tensor.shape[0]
        held = part.detach()
        held = held.index_select(0, rows.to(part.device)) if own and rows is not None else held
        digest.update(f"{held.dtype} {tuple(held.shape)} ".encode())
        digest.update(tensor_bytes(block_sums(held)))
    for text in described(tensor):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def described(tensor: Tensor) -> Iterator[str]:
    """What a tensor subclass holds besides tensors, such as how a torchao weight treats its input."""
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, DTensor):
        names, context = tensor.__tensor_flatten__()
        yield re.sub(r" at 0x[0-9a-f]+", "", f"{type(tensor).__name__} {context!r}")
        for name in names:
            yield from described(getattr(tensor, name))


def block_sums(tensor: Tensor) -> Tensor:
    """The sum of each block, int64 on the CPU."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    block = 8 * WORDS
    whole = len(flat) // block * block
    pieces = [flat[:whole].view(torch.int64)] if whole else []
    if len(flat) > whole:
        pieces.append(nn.functional.pad(flat[whole:], (0, block + whole - len(flat))).view(torch.int64))
    weights = word_weights(WORDS).to(flat.device)
    at_once = WORDS if flat.device.type == "cpu" else WORDS * GPU_BLOCKS
    room = torch.empty(
        min(at_once, max([len(piece) for piece in pieces], default=0)), dtype=torch.int64, device=flat.device
    )
    sums = [folded_sums(words, weights, room) for piece in pieces for words in piece.split(at_once)]
    return torch.cat(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64, device="cpu")


def folded_sums(words: Tensor, weights: Tensor, room: Tensor) -> Tensor:
    """Of each block among ``words``: the weighted sum, modulo 2⁶⁴; ``room`` is written to."""
    mixed = torch.bitwise_right_shift(words, 32, out=room[: len(words)])
    mixed = mixed.bitwise_xor_(words).unflatten(0, (-1, len(weights)))
    return torch.mv(mixed, weights) if words.device.type == "cpu" else mixed.mul_(weights).sum(1)


def word_weights(n: int) -> Tensor:
    """Odd 64-bit numbers without a pattern (SplitMix64), by integer arithmetic alone."""
    if n not in _weights:
        with torch.inference_mode(False), torch.device("cpu"):
            z = (torch.arange(n, dtype=torch.int64, device="cpu") + 1) * signed(0x9E3779B97F4A7C15)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
            _weights[n] = (z ^ ((z >> 31) & (2**33 - 1))) | 1
    return _weights[n]


def signed(x: int) -> int:
    """An unsigned 64-bit number as int64 has it."""
    return x - 2**64 if x >= 2**63 else x


_weights: dict[int, Tensor] = {}
