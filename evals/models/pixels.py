"""Images in a first and in a later call: tiny models given real pixels, through HeadQ's cache and a dense one.

A conversation has a prompt with an image, some decoding, a turn with another image, and more decoding. Where a family
lets the tokens of an image see each other in both directions, there are more of them than a sliding window holds.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.cache.dequantized import DequantizedLayer
from headq_ao.evals.models.sweep_checks import (
    ARITHMETIC,
    OPTIONS,
    PADS,
    SEEDS,
    dequantized,
    kernels_on,
    kind_of,
    last_logits,
    limit,
    noisy_cache,
    relative,
    why_of,
)
from headq_ao.evals.models.tiny import LOCAL_GLOBAL, VISION
from headq_ao.integrations.transformers.models import with_cache

IMAGE = 120  # the token that stands where an image's features go
SIDE, PATCH = 10, 16  # an image has SIDE × SIDE patches of PATCH × PATCH pixels
ROWS, BEFORE, BEHIND = 2, 30, 12  # sequences; tokens of text on either side of an image
STEPS = (3, 8)  # of decoding after each image
Call = dict[str, Any]


class Pictures(NamedTuple):
    """How a family takes images.

    Attributes:
        name: its entry of transformers' mapping of image-text-to-text models.
        config: what its tiny config has beside, for images of so many patches a side.
        inputs: of the pixels of so many images with so many patches a side, ``[n, 3, side · 16, side · 16]``, and
            what says how they lie; None: tensors that a call takes.
        tokens: of an image with so many patches a side.
        types: the argument that tells tokens of images from others over all slots, None without any.
        is_image: what it holds at an image's tokens, and elsewhere.
    """

    name: str
    config: Callable[[int], dict[str, Any]]
    inputs: Callable[[Tensor, int], dict[str, Tensor]]
    tokens: Callable[[int], int] = lambda side: side * side
    types: str | None = None
    is_image: tuple[int, int] = (1, 0)


def patches(pixels: Tensor, size: int = PATCH) -> Tensor:
    """``[n, 3, H, W]`` as rows of patches ``[n, H · W / size², 3 · size²]``."""
    cut = pixels.unfold(2, size, size).unfold(3, size, size)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def plain(pixels: Tensor, side: int) -> dict[str, Tensor]:
    """Pixels as they are."""
    return {"pixel_values": pixels}


def with_places(pixels: Tensor, side: int, finer: int = 1) -> dict[str, Tensor]:
    """Patches, ``finer`` times as many a side, and the column and row of each."""
    at = torch.arange(side * finer)
    places = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(1, -1, 2)
    return {"pixel_values": patches(pixels, PATCH // finer), "image_position_ids": places.expand(len(pixels), -1, -1)}


def pooled(pixels: Tensor, side: int) -> dict[str, Tensor]:
    """Patches of one crop a picture, each a token by itself."""
    n = len(pixels)
    grid = torch.tensor([[side, side, 0, 0]] * n)
    own = torch.arange(n * side * side)[:, None]
    return {"pixel_values": patches(pixels), "image_token_pooling": own, "image_grids": grid}


def of_video(pixels: Tensor, side: int) -> dict[str, Tensor]:
    """Patches of two equal frames, in blocks of two by two that are merged."""
    n, pairs = len(pixels), side // 2
    rows = patches(pixels).unflatten(1, (pairs, 2, pairs, 2)).transpose(2, 3).flatten(0, 4)
    both = rows.unflatten(1, (3, -1))[:, :, None].expand(-1, -1, 2, -1).flatten(1)
    return {"pixel_values": both, "image_grid_thw": torch.tensor([[1, side, side]] * n)}


def tiled(pixels: Tensor, side: int) -> dict[str, Tensor]:
    """A whole picture made small, and its four quarters."""
    half = pixels.shape[-1] // 2
    small = torch.nn.functional.avg_pool2d(pixels, 2)
    quarters = [pixels[..., i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
    size = torch.tensor([[pixels.shape[2], pixels.shape[3]]] * len(pixels))
    return {"pixel_values": torch.stack([small, *quarters], 1), "image_sizes": size}


def siglip(side: int) -> dict[str, Any]:
    """A vision tower of so many patches a side."""
    return {"vision_config": {"image_size": side * PATCH, "patch_size": PATCH}}


BOTH = {"text_config": {"layer_types": LOCAL_GLOBAL}}
GEMMA2 = dict(model_type="gemma2", query_pre_attn_scalar=16, layer_types=LOCAL_GLOBAL, sliding_window=64)
GEMMA4 = {**BOTH["text_config"], "global_head_dim": 32}
GEMMA4_VISION = VISION | dict(
    model_type="gemma4_vision", patch_size=PATCH // 2, pooling_kernel_size=2, position_embedding_size=32
)
UNIFIED = dict(
    model_type="gemma4_unified_vision", pooling_kernel_size=1, mm_embed_dim=32, output_proj_dims=32, mm_posemb_size=32
)
PICTURES = {
    "gemma3": Pictures(
        "gemma3", lambda side: siglip(side) | BOTH | {"mm_tokens_per_image": side * side, "image_token_index": IMAGE},
        plain, types="token_type_ids",
    ),
    "paligemma": Pictures(
        "paligemma", lambda side: siglip(side) | {"image_token_index": IMAGE},
        plain, types="token_type_ids", is_image=(0, 1),
    ),
    "paligemma 2": Pictures(
        "paligemma", lambda side: siglip(side) | {"image_token_index": IMAGE, "text_config": GEMMA2},
        plain, types="token_type_ids", is_image=(0, 1),
    ),
    "gemma4_unified": Pictures(
        "gemma4_unified", lambda side: {
            "text_config": GEMMA4, "vision_config": UNIFIED, "image_token_id": IMAGE,
        },
        with_places, types="mm_token_type_ids",
    ),
    "gemma4": Pictures(
        "gemma4",
        lambda side: {
            "text_config": GEMMA4 | {"use_bidirectional_attention": "vision"}, "vision_config": GEMMA4_VISION,
            "image_token_id": IMAGE,
        },
        functools.partial(with_places, finer=2), types="mm_token_type_ids",
    ),
    "molmo2": Pictures(
        "molmo2",
        lambda side: {
            "vision_config": {"image_size": [side * PATCH] * 2, "initializer_range": 0.1}, "image_patch_id": IMAGE,
            "adapter_config": {"initializer_range": 0.1},
        },
        pooled, types="mm_token_type_ids",
    ),
    "qwen3_vl": Pictures(
        "qwen3_vl", lambda side: {"image_token_id": IMAGE, "vision_config": {"deepstack_visual_indexes": [0]}},
        of_video, lambda side: side * side // 4, types="mm_token_type_ids",
    ),
    "llava_onevision": Pictures(
        "llava_onevision",
        lambda side: siglip(side // 2) | {"image_grid_pinpoints": [[side * PATCH] * 2], "image_token_index": IMAGE},
        tiled, lambda side: side * side // 4 + side * (side + 1),
    ),
}  # fmt: skip


def turn(
    pictures: Pictures, types: Tensor | None, side: int, generator: torch.Generator, before: int = BEFORE,
    behind: int = BEHIND,
) -> Call:  # fmt: skip
    """A call's arguments: text, an image in each sequence, text. ``types``: of the slots before it ``[B, S]``."""
    text = torch.randint(5, 100, (ROWS, before + behind), generator=generator)
    image = torch.full((ROWS, pictures.tokens(side)), IMAGE)
    ids = torch.cat([text[:, :before], image, text[:, before:]], 1)
    pixels = torch.randn(ROWS, 3, side * PATCH, side * PATCH, generator=generator)
    call = {"input_ids": ids, **pictures.inputs(pixels, side)}
    if pictures.types is not None:
        here, other = pictures.is_image
        told = torch.where(ids == IMAGE, here, other)
        call[pictures.types] = told if types is None else torch.cat([types, told], 1)
    return call


def conversation(pictures: Pictures, sides: tuple[int, ...] = (SIDE, SIDE)) -> list[Call]:
    """Turns with an image each, whose patches a side are ``sides``, and decoding steps behind each."""
    generator, calls, types = torch.Generator().manual_seed(0), list[Call](), None
    for side, steps in zip(sides, STEPS * len(sides), strict=False):
        calls.append(turn(pictures, types, side, generator))
        calls += [{"input_ids": torch.randint(5, 100, (ROWS, 1), generator=generator)} for _ in range(steps)]
        if pictures.types is not None:
            told = calls[-1 - steps][pictures.types]
            types = torch.cat([told, torch.full((ROWS, steps), pictures.is_image[1])], 1)
    return calls


def conversed(model: PreTrainedModel, calls: list[Call], cache: Any, pads: int = 0) -> Tensor:
    """Logits ``[B, T, V]`` of all calls; ``pads``: slots of padding on the left of the first sequence."""
    found, seen = [], 0
    mask = torch.ones(ROWS, sum(call["input_ids"].shape[1] for call in calls), dtype=torch.int64)
    mask[0, :pads] = 0
    with torch.no_grad():
        for call in calls:
            seen += call["input_ids"].shape[1]
            more = {"attention_mask": mask[:, :seen]} if pads else {}
            found.append(model(**call, **with_cache(cache), use_cache=True, **more).logits)
    logits = torch.cat(found, 1)
    return logits if not pads else logits[mask != 0][None]


def check(model: PreTrainedModel, pictures: Pictures) -> dict[str, Any]:
    """What became of a model: as :func:`headq_ao.evals.models.sweep_checks.check`, through a conversation about
    images. ``pixels`` and ``blocks``: how much the logits change with other images, and with other types."""
    dense, calls = copy.deepcopy(model), conversation(pictures)
    ids = torch.randint(5, 100, (ROWS, 200), generator=torch.Generator().manual_seed(1))
    before, reference = last_logits(model, ids), conversed(dense, calls, DynamicCache(config=dense.config))
    quantize_(model, headq_config(**OPTIONS))
    found: dict[str, Any] = {"kind": kind_of(model), "why": why_of(model)}
    others = {"pixels": other_pixels(calls)}
    if pictures.types is not None:
        others["blocks"] = without_types(calls, pictures)
    for what, other in others.items():
        changed = conversed(copy.deepcopy(dense), other, DynamicCache(config=dense.config))
        found[what] = relative(changed, reference)
    found["control"] = relative(conversed(dense, calls, noisy_cache(dense, 0)), reference)
    found["uncalibrated"] = of_conversation(model, calls, reference)
    found |= padded(model, dense, calls)
    restore_(model)
    calibration = calibrate(model, [ids, ids.flip(1)], progress=False)
    layers = [dataclasses.replace(layer, effective=None) for layer in calibration.layers]
    quantize_(model, headq_config(calibration=dataclasses.replace(calibration, layers=layers), **OPTIONS))
    found["calibrated"] = of_conversation(model, calls, reference)
    for seed in range(1, SEEDS):
        if max(found[kind]["error"] for kind in ("uncalibrated", "calibrated")) > limit(found["control"]):
            again = relative(conversed(dense, calls, noisy_cache(dense, seed)), reference)
            found["control"] = max(found["control"], again)
    for kind in ARITHMETIC:
        with kernels_on(kind == "kernel"):
            found[f"arithmetic_{kind}"] = arithmetic(model, dense, calls)
    restore_(model)
    return found | {"restored": torch.equal(last_logits(model, ids), before)}


def wrong(found: dict[str, Any]) -> list[str]:
    """The checks that a model has not passed."""
    most = limit(found["control"])
    bad = [n for n in ("uncalibrated", "calibrated") if not found[n]["error"] <= most]
    bad += [n for n in ("uncalibrated", "calibrated") if not found[n]["packed"] > 0.03]
    bad += [n for n in ("pixels", "blocks") if n in found and not found[n] > 3 * most]
    bad += [] if found["padded"] <= max(limit(found["padded_control"]), most) else ["left padding"]
    bad += [n for n, high in ARITHMETIC.items() if not found[f"arithmetic_{n}"] <= high]
    return bad + ([] if found["restored"] else ["restored"])


def other_pixels(calls: list[Call]) -> list[Call]:
    """The same conversation about other images."""
    return [call | {"pixel_values": -call["pixel_values"]} if "pixel_values" in call else call for call in calls]


def without_types(calls: list[Call], pictures: Pictures) -> list[Call]:
    """The same conversation with every token told to be text."""
    kind, text = str(pictures.types), pictures.is_image[1]
    return [call | {kind: torch.full_like(call[kind], text)} if kind in call else call for call in calls]


def of_conversation(model: PreTrainedModel, calls: list[Call], reference: Tensor) -> dict[str, float]:
    """The error through a packed cache, and how much of what was read was packed."""
    cache = HeadQCache(model)
    error = relative(conversed(model, calls, cache), reference)
    return {"error": error, "packed": cache.packed_fraction, "bits": cache.packed_bits_per_element}


def padded(model: PreTrainedModel, dense: PreTrainedModel, calls: list[Call]) -> dict[str, Any]:
    """The same, one sequence padded on the left."""
    try:
        exact = conversed(dense, calls, DynamicCache(config=dense.config), PADS)
    except RuntimeError as error:
        return {"padded": 0.0, "padded_control": 0.0, "padding": f"not in a dense cache either: {error}"[:200]}
    control, packed = (
        conversed(m, calls, c, PADS) for m, c in ((dense, noisy_cache(dense, 0)), (model, HeadQCache(model)))
    )
    return {"padded": relative(packed, exact), "padded_control": relative(control, exact)}


def arithmetic(model: PreTrainedModel, dense: PreTrainedModel, calls: list[Call]) -> float:
    """The error of the later turn with an image against a dense cache that holds the rows which the packed one stands
    for."""
    later = max(i for i, call in enumerate(calls) if "pixel_values" in call)
    tokens = sum(call["input_ids"].shape[1] for call in calls[:later])
    cache = HeadQCache(model)
    for who, held in ((model, cache), (dense, DynamicCache(config=dense.config))):  # some keep where an image put them
        conversed(who, calls[:later], held)
    rows = watched(cache)
    logits = conversed(model, calls[later : later + 1], cache)
    plain = dequantized(cache, cache, dense.config, tokens, rows)
    return relative(logits, conversed(dense, calls[later : later + 1], plain))


def watched(cache: HeadQCache) -> dict[int, Any]:
    """What the layers of a cache will read in the next call: keys, values and positions, by layer."""
    rows: dict[int, Any] = {}
    for i, layer in enumerate(cache.layers):
        reads = "update" if isinstance(layer, DequantizedLayer) else "attend"
        setattr(layer, reads, functools.partial(noting, rows, i, layer, getattr(layer, reads)))
    return rows


def noting(rows: dict[int, Any], i: int, layer: Any, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a layer's own ``plain`` gives; what it reads goes into ``rows``."""
    if not isinstance(layer, DequantizedLayer):
        rows[i] = layer.rows_of_model()
        return plain(*args, **kwargs)
    k, v = plain(*args, **kwargs)
    rows[i] = k, v, torch.arange(layer.seen - k.shape[2], layer.seen)
    return k, v
