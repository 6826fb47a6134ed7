"""Bits where they matter: how a budget is shared between layers and heads, and between keys and values."""

import dataclasses
import heapq
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from headq_ao.calibration.artifact import Calibration
from headq_ao.codecs.base import HeadBits
from headq_ao.codecs.linalg import centred_moment
from headq_ao.codecs.whitened import Readout, joint_metric, whitened_codec, whitened_value_codec
from headq_ao.config import HeadQConfig
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.layout import PIECES, granule
from headq_ao.ops.types import SegmentFrame
from headq_ao.statistics.importance import attention, score_tiles
from headq_ao.statistics.moments import PROFILED_BITS, LayerMoments

Part = TypeVar("Part", bound=Hashable)
HeadSide = tuple[int, str, int]  # a layer, "k" or "v", a KV head
WHOLE = max(granule(width) for pieces in PIECES.values() for width in pieces)  # tokens that values of any bits pack in
PER_BIT = 0.27  # what a further bit leaves of the error of a fine code; 1/4 in theory


@torch.no_grad()
def output_errors(
    moments: LayerMoments, q: Tensor, k: Tensor, v: Tensor, scaling: float, *, n_sink: int, window: int | None,
    every: int, counted: Tensor | None = None, sinks: Tensor | None = None, frame: SegmentFrame | None = None,
    softcap: float | None = None, readout: Readout | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What coded keys or values change in a layer's output, at each of :data:`PROFILED_BITS`, and the output's energy.

    ``Σ_q ‖Σ_j (â_qj − a_qj) v_j‖²`` for keys and ``Σ_q ‖Σ_j a_qj (v̂_j − v_j)‖²`` for values, over queries of one
    sequence and the keys that a cache would have packed; both in the same unit, so that keys and values compare.

    Args:
        moments: of the layer, from which the codecs come.
        q: ``[1, Hq, T, D]``, and ``k``, ``v`` ``[1, Hkv, T, D]``.
        counted: ``[T]``, which queries count; None: all.
        frame: that keys are coded in.
        sinks, softcap: as in :func:`headq_ao.statistics.importance.attention`.
        readout: where ``v`` is ``k``, one row: what is measured as keys is then what coding that row changes, through
            both, in what the heads read out; as values nothing.

    Returns:
        ``[Hkv, 2, 4]``, keys then values, and ``[Hkv]``.
    """
    tokens = k.shape[2] // WHOLE * WHOLE
    q, k, v = (x[:, :, :tokens].float() for x in (q, k, v))
    keys, values = coding_errors(moments, k, v, n_sink=n_sink, frame=frame, readout=readout)
    errors, energy = k.new_zeros(k.shape[1], 2, len(PROFILED_BITS)), k.new_zeros(k.shape[1])

    def read(weights: Tensor, rows: Tensor) -> Tensor:
        out = torch.einsum("bhgst,bhtd->bhgsd", weights, rows)
        return out if readout is None else torch.einsum("bhgsd,gvd->bhgsv", out, readout.matrices.to(out))

    for at, query, s, packed in score_tiles(q, k, scaling, n_sink=n_sink, window=window, every=every):
        shown = 1.0 if counted is None else counted[at, None].to(s.dtype)
        a = attention(s, sinks, softcap)
        energy += (shown * read(a, v)).square().sum((0, 2, 3, 4))
        for i, (dk, dv) in enumerate(zip(keys, values, strict=True)):
            moved = attention(s + torch.einsum("bhgsd,bhtd->bhgst", query, dk) * packed, sinks, softcap) - a
            if readout is not None:
                out = shown * (read(moved, v) + read((a + moved) * packed, dv))
                errors[:, 0, i] += out.square().sum((0, 2, 3, 4))
                continue
            for side, (weights, rows) in enumerate(((moved, v), (a * packed, dv))):
                errors[:, side, i] += (shown * read(weights, rows)).square().sum((0, 2, 3, 4))
    return errors.cpu(), energy.cpu()


def coding_errors(
    moments: LayerMoments, k: Tensor, v: Tensor, *, n_sink: int, frame: SegmentFrame | None = None,
    readout: Readout | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """``k̂ − k`` and ``v̂ − v`` of a sequence at each of :data:`PROFILED_BITS`, shaped as they are; arguments as in
    :func:`output_errors`, ``k`` and ``v`` fp32 and whole granules long."""
    tokens, units, all_moments = k.shape[2], [moments.unit(side) for side in "kv"], moments
    moments = moments.in_units()
    of_rows = None if readout is None else joint_metric(all_moments, readout).to(k.device)
    k_unit, v_unit = (None if unit is None else unit.to(k.device) for unit in units)
    (k_mean, k_outer), (v_mean, v_outer), c_k = (
        *((x.to(k.device)[None] for x in moments.shrunk(side)) for side in "kv"), moments.key_metric.to(k.device)[None]
    )  # fmt: skip
    c_v = None if (metric := moments.value_metric) is None else metric.to(k.device)
    segment = torch.zeros(tokens, dtype=torch.int64, device=k.device)
    coded = k
    if frame is not None:
        segment = frame.along(tokens, n_sink, k.device)
        coded = frame.into(k, segment)
    keys, values = [], []
    for bits in PROFILED_BITS:
        config = HeadQConfig(k_bits=bits, v_bits=bits)
        added = None if of_rows is None else config.readout_weight * of_rows
        codec = whitened_codec(config, c_k, k_mean, centred_moment(k_mean, k_outer), frame is not None, added)
        codec = dataclasses.replace(codec, unit=k_unit)
        error = codec.dequantize(*codec.quantize(coded, config.unbiased_scale)) - coded
        keys.append(error if frame is None else frame.into(error, segment, back=True))
        if readout is not None:
            values.append(error)
            continue
        of_values = whitened_value_codec(config, v_mean, v_outer, c_v)
        of_values = of_values if v_unit is None else of_values.in_unit(v_unit)
        values.append(of_values.dequantize(*of_values.quantize(v)) - v)
    return keys, values


def head_bits(config: HeadQConfig, calibration: Calibration | None, shapes: Sequence[LayerShape]) -> list[HeadBits]:
    """The bits of each layer's heads: the same for all, or what ``mean_bits`` gives them.

    Raises:
        ValueError: when the calibration is of another number of layers, or has not profiled them.
    """
    layers = len(shapes)
    if calibration is not None and len(calibration.layers) != layers:
        raise ValueError(f"the calibration must hold {layers} layers, as the model does, got {len(calibration.layers)}")
    given = {"k": config.k_bits, "v": config.v_bits}
    if any(shape.latent is not None for shape in shapes):  # one row: its bits are those of a key
        given = {"k": config.row_bits}
    if config.mean_bits is None or calibration is None:
        found = ({side: (b,) * s.n_kv_heads for side, b in given.items() if b is not None} for s in shapes)
        return [HeadBits(bits.get("k", ()), bits.get("v", ())) for bits in found]
    unknown = [i for i, layer in enumerate(calibration.layers) if layer.errors is None]
    if unknown:
        raise ValueError(
            f"mean_bits={config.mean_bits} allocates bits by the sensitivity of heads, and the calibration has not "
            "measured that; make it again with calibrate(...), or give k_bits and v_bits"
        )
    sides = [side for side, bits in given.items() if bits is not None]
    sensitivity: dict[HeadSide, Sequence[float]] = {
        (i, side, h): errors
        for i, layer in enumerate(calibration.layers)
        for side in sides
        for h, errors in enumerate(layer.relative_errors("kv".index(side)))
    }
    sensitivity = cautious(sensitivity, calibration)
    levels = {side: config.levels(side if len(given) > 1 else "v") for side in sides}
    bits = allocate_bits(sensitivity, {part: levels[part[1]] for part in sensitivity}, config.mean_bits)
    of = {
        (i, side): tuple(bits[i, side, h] for h in range(s.n_kv_heads)) for i, s in enumerate(shapes) for side in sides
    }
    return [HeadBits(of.get((i, "k"), ()), of.get((i, "v"), ())) for i in range(layers)]


def cautious(
    sensitivity: Mapping[HeadSide, Sequence[float]], calibration: Calibration
) -> dict[HeadSide, Sequence[float]]:
    """The sensitivity of heads, pulled towards the (geometric) mean of their side where the calibration is small.

    Args:
        sensitivity: of each ``(layer, side, head)`` at 1, 2, 3 and 4 bits.
        calibration: that they were measured with.
    """
    share = max((layer.doubt for layer in calibration.layers), default=0.0)  # the same in all
    if not share:
        return dict(sensitivity)
    exact: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    logs = {part: torch.tensor(d, **exact).clamp(min=1e-30).log() for part, d in sensitivity.items()}
    found: dict[HeadSide, Sequence[float]] = {}
    for part, own in logs.items():
        mean = torch.stack([x for other, x in logs.items() if other[1] == part[1]]).mean(0)
        found[part] = own.lerp(mean, share).exp().tolist()
    return found


def allocate_bits(
    sensitivity: Mapping[Part, Sequence[float]], levels: Mapping[Part, Sequence[int]], mean: float
) -> dict[Part, int]:
    """Bits of every part, of mean at most ``mean``: each next bit goes where it lowers the error most.

    Args:
        sensitivity: of each part at 1, 2, 3 and 4 bits; beyond, :data:`PER_BIT` of it remains per bit.
        levels: bits that each part may have, in rising order.
        mean: over parts.

    Raises:
        ValueError: when ``mean`` is below the least that the parts can have.

    Example:
        >>> from headq_ao.calibration.bit_allocation import allocate_bits
        >>> flat, steep = [0.1, 0.02, 0.005, 0.001], [0.9, 0.3, 0.1, 0.02]
        >>> allocate_bits({"first": flat, "second": steep}, {"first": [1, 2, 3], "second": [1, 2, 3]}, 2.5)
        {'first': 2, 'second': 3}
    """
    at = dict.fromkeys(sensitivity, 0)
    left = mean * len(sensitivity) - sum(levels[part][0] for part in sensitivity)
    if left < 0:
        least = sum(levels[part][0] for part in sensitivity) / len(sensitivity)
        raise ValueError(f"mean_bits must be at least {least:g} with this block_size, got {mean}")
    order = itertools.count()

    def next_step(part: Part) -> None:
        here, there = levels[part][at[part] : at[part] + 2]
        gain = (_at(sensitivity[part], here) - _at(sensitivity[part], there)) / (there - here)
        heapq.heappush(heap, (-gain, next(order), there - here, part))

    heap: list[tuple[float, int, int, Part]] = []
    for part in sensitivity:
        next_step(part)
    while heap:
        _, _, cost, part = heapq.heappop(heap)
        if cost > left + 1e-9:
            continue
        left -= cost
        at[part] += 1
        if at[part] + 1 < len(levels[part]):
            next_step(part)
    return {part: levels[part][i] for part, i in at.items()}


def _at(sensitivity: Sequence[float], bits: int) -> float:
    last = PROFILED_BITS[-1]
    return sensitivity[bits - 1] if bits <= last else sensitivity[last - 1] * PER_BIT ** (bits - last)
