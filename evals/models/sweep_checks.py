"""What one model shows: packed by HeadQ against transformers' own cache, in every way that a cache is used.

Models are tiny and their weights random, so errors are judged by a control: a dense cache whose rows carry as much
noise as 8 bits leave. The sharp check is of arithmetic: the rows that the packed cache stands for, put into a dense
cache, must give the same logits.
"""

import copy
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.integrations.transformers.models import with_cache
from headq_ao.ops import dispatch

PREFILL, CHUNKS, STEPS = 96, (17, 16), (4, 12)
SIZES = [PREFILL, CHUNKS[0], *[1] * STEPS[0], CHUNKS[1], *[1] * STEPS[1]]
SHORT = [PREFILL, CHUNKS[0], 1, 1]
PADS = 11  # slots on the left of one of two sequences
OPTIONS: dict[str, Any] = dict(k_bits=8, v_bits=8, rank=0, warmup_tokens=32, residual_length=32, block_size=16)
NOISE = 0.007  # of a row's norm: what 8 bits leave
FACTOR, FLOOR = 3.0, 2e-3  # an error is right up to FACTOR times the control's and FLOOR
SHARE = 0.98  # of the tokens of a model with routed experts
SEEDS = 4  # draws of the control at most: which expert a near-tie goes to is chance
ARITHMETIC = {"kernel": 1e-3, "reference": 1e-5}
KERNELS = dispatch.KERNELS.copy()


def check(model: PreTrainedModel) -> dict[str, Any]:
    """What became of a model: ``kind`` (native, fallback, refused), why, and what each check gave."""
    dense = copy.deepcopy(model)
    ids = torch.randint(5, 100, (2, sum(SIZES)), generator=torch.Generator().manual_seed(0))
    try:
        before = last_logits(model, ids)
        stream(dense, ids, DynamicCache(config=dense.config), [20, 1])
    except Exception as error:  # it needs images, or an encoder's output
        return {"kind": "no text", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        quantize_(model, headq_config(**OPTIONS))
    except ValueError as error:
        return {"kind": "refused", "why": str(error), "unchanged": torch.equal(last_logits(model, ids), before)}
    found: dict[str, Any] = {"kind": kind_of(model), "why": why_of(model)}
    reference = stream(dense, ids, DynamicCache(config=dense.config))
    share = share_of(model)
    found["control"] = relative(stream(dense, ids, noisy_cache(dense, 0)), reference, share)
    found["uncalibrated"] = of_stream(model, ids, reference)
    found |= padded(model, dense, ids)
    found |= stored(model, ids)
    model.generate(ids[:, :70], max_new_tokens=4, do_sample=False)
    restore_(model)
    calibration = calibrate(model, [ids, ids.flip(1)], progress=False)
    layers = [dataclasses.replace(layer, effective=None) for layer in calibration.layers]
    calibration = dataclasses.replace(calibration, layers=layers)
    quantize_(model, headq_config(calibration=calibration, **OPTIONS))
    found["calibrated"] = of_stream(model, ids, reference)
    for seed in range(1, SEEDS):
        if max(found[name]["error"] for name in ("uncalibrated", "calibrated")) > limit(found["control"]):
            again = relative(stream(dense, ids, noisy_cache(dense, seed)), reference, share)
            found["control"] = max(found["control"], again)
    for name in ARITHMETIC:
        with kernels_on(name == "kernel"):
            found[f"arithmetic_{name}"] = arithmetic(model, dense, ids)
    found["crop"] = cropped(model, dense, ids)
    restore_(model)
    found["restored"] = torch.equal(last_logits(model, ids), before)
    return found


def limit(control: float) -> float:
    """Up to which an error is right."""
    return FACTOR * control + FLOOR


def wrong(found: dict[str, Any]) -> list[str]:
    """The checks that a model has not passed."""
    if found["kind"] == "no text":
        return []
    if found["kind"] == "refused":
        return [] if found["unchanged"] else ["refused, but changed"]
    most = limit(found["control"])
    bad = [n for n in ("uncalibrated", "calibrated") if not found[n]["error"] <= most]
    bad += [n for n in ("uncalibrated", "calibrated") if not found[n]["packed"] > 0.03]
    bad += [] if found["padded"] <= max(limit(found["padded_control"]), most) else ["left padding"]
    bad += [n for n, high in ARITHMETIC.items() if not found[f"arithmetic_{n}"] <= high]
    bad += [n for n in ("loaded", "restored") if not found[n]]
    crop = found["crop"]
    return bad + ([] if isinstance(crop, str) or crop <= most else ["crop"])


def kind_of(model: PreTrainedModel) -> str:
    """How the attention of a quantized model is served."""
    return "fallback" if getattr(model._headq, "fallback", None) else "native"


def why_of(model: PreTrainedModel) -> str:
    """Why a model is not served natively, and what of its cache is not packed."""
    return str(getattr(model._headq, "fallback", None) or "")


def last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of a call without a cache; some models draw what they begin with."""
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        logits: Tensor = model(input_ids=ids[:, :20], use_cache=False).logits
    return logits[:, -1]


def stream(model: PreTrainedModel, ids: Tensor, cache: Any, sizes: list[int] = SIZES, mask: Any = None) -> Tensor:
    """Logits of a prefill, chunks and decoding steps."""
    found, at = [], 0
    with torch.no_grad():
        for part in ids[:, : sum(sizes)].split(sizes, 1):
            at += part.shape[1]
            more = {} if mask is None else {"attention_mask": mask[:, :at]}
            found.append(model(input_ids=part, **with_cache(cache), use_cache=True, **more).logits)
    return torch.cat(found, 1)


def relative(logits: Tensor, reference: Tensor, share: float = 1.0) -> float:
    """The error of logits ``[B, T, V]``, of what varies in them; ``share``: of the tokens, those that err least."""
    errors = (logits - reference).square().sum(-1).flatten()
    kept = errors.sort().values[: math.ceil(share * len(errors))]
    return float(kept.sum().sqrt() / (reference - reference.mean((0, 1))).norm())


def share_of(model: PreTrainedModel) -> float:
    """Which part of the tokens counts: with routed experts a near-tie may go either way, and few tokens err much."""
    return SHARE if any("expert" in name for name, _ in model.named_modules()) else 1.0


def of_stream(model: PreTrainedModel, ids: Tensor, reference: Tensor) -> dict[str, float]:
    """The error through a packed cache, also of all tokens, and how much of what was read was packed."""
    cache = HeadQCache(model)
    logits = stream(model, ids, cache)
    found = {name: relative(logits, reference, share) for name, share in (("error", share_of(model)), ("of_all", 1.0))}
    return found | {"packed": cache.packed_fraction, "bits": cache.packed_bits_per_element}


def noisy_cache(model: PreTrainedModel, seed: int) -> DynamicCache:
    """A dense cache whose rows carry noise once they are older than their own call."""
    cache, generator = DynamicCache(config=model.config), torch.Generator().manual_seed(seed)

    def with_noise(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator)
        noise: Tensor = NOISE * x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5 * drawn
        return x + noise

    def noisy(dense: type[Any]) -> type[Any]:
        def update(self: Any, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            keys, values = dense.update(self, with_noise(k), with_noise(v), *args, **kwargs)
            n = k.shape[2]
            return torch.cat([keys[:, :, :-n], k], 2), torch.cat([values[:, :, :-n], v], 2)

        return type("Noisy", (dense,), {"update": update, "_layer_type": None})

    for layer in cache.layers:
        if hasattr(layer, "get_mask_sizes"):
            layer.__class__ = noisy(type(layer))
    return cache


def padded(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Two sequences, one of them padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    sizes = [PREFILL, CHUNKS[0], *[1] * STEPS[0]]
    try:
        stream(dense, ids, DynamicCache(config=dense.config), sizes, mask)
    except Exception as error:  # some models take no padding in later calls
        return {"padded": 0.0, "padded_control": 0.0, "padding": f"not in a dense cache either: {error}"[:200]}
    runs = [
        stream(who, ids, cache, sizes, mask)[mask[:, : sum(sizes)] != 0]
        for who, cache in (
            (dense, DynamicCache(config=dense.config)), (dense, noisy_cache(dense, 0)), (model, HeadQCache(model)),
        )
    ]  # fmt: skip
    exact, control, packed = (x[None] for x in runs)
    return {"padded": relative(packed, exact), "padded_control": relative(control, exact)}


def stored(model: PreTrainedModel, ids: Tensor) -> dict[str, bool]:
    """Whether a cache that was saved and loaded gives the next logits bit for bit."""
    cache = HeadQCache(model)
    stream(model, ids, cache, SHORT)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = os.path.join(folder, "prompt.safetensors")
        cache.save(path)
        again = HeadQCache.load(path, model)
        one, other = (model(input_ids=ids[:, :1], **with_cache(c), use_cache=True).logits for c in (cache, again))
    return {"loaded": torch.equal(one, other)}


def cropped(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> float | str:
    """The error after three tokens were taken back and given again; a refusal by name where states cannot step back."""
    cache = HeadQCache(model)
    stream(model, ids, cache, SHORT)
    try:
        cache.crop(-3)
    except (RuntimeError, ValueError) as error:
        return str(error)
    n = sum(SHORT)
    with torch.no_grad():
        again = model(input_ids=ids[:, n - 3 : n], **with_cache(cache), use_cache=True).logits
    reference = stream(dense, ids, DynamicCache(config=dense.config), SHORT)
    return float((again - reference[:, -3:]).norm() / (reference - reference.mean((0, 1))).norm() * n**0.5 / 3**0.5)


@contextmanager
def kernels_on(on: bool) -> Iterator[None]:
    """Compiled kernels, or the reference in plain PyTorch."""
    try:
        if not on:
            dispatch.KERNELS.clear()
        yield
    finally:
        dispatch.KERNELS.update(KERNELS)


def arithmetic(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> float:
    """The error of a decoding step against a dense cache that holds the rows which the packed one stands for."""
    cache, n = HeadQCache(model), sum(SHORT)
    stream(model, ids, cache, SHORT)
    states = copy.deepcopy(cache)
    with torch.no_grad():
        logits = model(input_ids=ids[:, n : n + 1], **with_cache(cache), use_cache=True).logits
        plain = dequantized(cache, states, dense.config, n)
        reference = dense(input_ids=ids[:, n : n + 1], **with_cache(plain), use_cache=True).logits
    return relative(logits, reference)


def dequantized(
    cache: HeadQCache, states: HeadQCache, config: Any, tokens: int, rows: dict[int, Any] | None = None
) -> DynamicCache:
    """A dense cache with the rows of the first ``tokens`` tokens that a packed one stands for, and what ``states`` has
    beside them; ``rows``: keys, values and positions by layer, where they are known."""
    plain = DynamicCache(config=config)
    for layer in cache.layers[len(plain.layers) :]:  # a model's loops append copies
        window = layer.sliding_window
        plain.layers.append(DynamicLayer() if window is None else DynamicSlidingWindowLayer(window))
    for i, layer in enumerate(cache.layers):
        if not hasattr(layer, "rows_of_model"):
            plain.layers[i] = states.layers[i]
            continue
        k, v, position = layer.rows_of_model() if rows is None else rows[i]
        window = getattr(plain.layers[i], "sliding_window", None)
        keep = (position < tokens) & (position >= tokens - (tokens if window is None else window - 1))
        plain.layers[i].update(k[:, :, keep], v[:, :, keep])
        copy_states(states.layers[i], plain.layers[i], tokens)
    return plain


def copy_states(source: Any, to: Any, tokens: int) -> None:
    """What a dense layer keeps beside keys and values."""
    for name in getattr(source, "beside", ()):
        setattr(to, name, getattr(source, name))
    if hasattr(to, "cumulative_length"):
        to.cumulative_length = tokens
