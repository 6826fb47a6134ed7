"""``estimate_memory``: what a cache would take, found by running its storage code without data; and the most bits that
a number of bytes has room for."""

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from headq_ao.ambient import mode_neutral
from headq_ao.byte_size import bytes_text
from headq_ao.cache.batch import Batch
from headq_ao.cache.memory_report import BitsReport, storage_bytes
from headq_ao.cache.schedule import page_tokens, schedule_of
from headq_ao.cache.token_ids import TokenIds
from headq_ao.cache.writing import WritingLayer
from headq_ao.calibration.artifact import Calibration, usable_calibration
from headq_ao.calibration.bit_allocation import head_bits
from headq_ao.codecs.base import HeadBits, scale_bits
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.registry import LayerContext, build
from headq_ao.codecs.source import SourceModule
from headq_ao.codecs.whitened import Readout
from headq_ao.config import HeadQConfig
from headq_ao.integrations.config_only.served import served
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.layout import TOKEN_TILE, key_bytes_per_token, value_bytes_per_token
from headq_ao.statistics.moments import PROFILE, TENSORS, LayerMoments, tensor_shapes

META = torch.device("meta")


@mode_neutral
def estimate_memory(
    model_or_config: Any, config: HeadQConfig, tokens: int, batch_size: int = 1, dtype: torch.dtype | None = None,
    shapes: Sequence[LayerShape] | None = None,
) -> BitsReport:  # fmt: skip
    """The :meth:`HeadQCache.bits_report` that one prefill of ``tokens`` tokens would leave, without running the model.

    The cache's own code runs on shapes alone (PyTorch's meta device), so the counts are those of the real cache.
    Only sequences whose keys or values are far from ordinary size (:mod:`headq_ao.statistics.units`) hold more.

    Args:
        model_or_config: a transformers model, or its config.
        config: what to store; of a calibration only how ``mean_bits`` shares the bits counts, and that it is used:
            one on too few tokens is not, with the warning of :func:`headq_ao.quantize_`. With ``cache_bytes`` its bits
            are those that fit.
        tokens: per sequence.
        batch_size: sequences.
        dtype: of full-precision tokens; default the model's, else bfloat16.
        shapes: of the layers; None: what is found out (:func:`headq_ao.integrations.config_only.served.served`).

    Returns:
        A :class:`~headq_ao.cache.memory_report.BitsReport`; its ``bytes`` sum to the footprint.

    Raises:
        ValueError: when the model is not supported, a count is below 1, or nothing fits into ``cache_bytes``.

    Example:
        >>> from transformers import LlamaConfig
        >>> from headq_ao import estimate_memory, headq_config
        >>> report = estimate_memory(LlamaConfig(), headq_config(), tokens=4096)
        >>> round(report.packed_bits_per_element, 4)
        2.0938
    """
    if tokens < 1 or batch_size < 1:
        raise ValueError(f"tokens and batch_size must be at least 1, got {tokens} and {batch_size}")
    shapes, dtype = _form(model_or_config, config, dtype, shapes)
    config, known = usable_calibration(config)
    return _report(shapes, _within(shapes, config, known, dtype), known, tokens, batch_size, dtype)


@mode_neutral
def within_budget(
    model_or_config: Any, config: HeadQConfig, dtype: torch.dtype | None = None,
    shapes: Sequence[LayerShape] | None = None,
) -> HeadQConfig:  # fmt: skip
    """The config with the most bits whose cache of ``batch_size`` sequences of ``context_length`` tokens takes at most
    ``cache_bytes``; itself where it has none.

    With a calibration ``mean_bits`` is a multiple of one bit of one side of one head. Without one the layers have the
    same bits, and keys at most one step more than values.

    Args:
        model_or_config, dtype: as :func:`estimate_memory` takes them.
        config: with ``cache_bytes``.
        shapes: of the layers; None: what is found out.

    Raises:
        ValueError: where even the fewest bits take more, saying what they take.

    Example:
        >>> from transformers import LlamaConfig
        >>> from headq_ao import headq_config
        >>> from headq_ao.integrations.config_only.estimate import within_budget
        >>> chosen = within_budget(LlamaConfig(), headq_config(cache_bytes="1GiB", context_length=16384))
        >>> chosen.k_bits, chosen.v_bits, chosen.cache_bytes
        (2, 1, None)
    """
    if config.cache_bytes is None:
        return config
    config, known = usable_calibration(config)
    shapes, dtype = _form(model_or_config, config, dtype, shapes)
    return _within(shapes, config, known, dtype)


def _form(
    model_or_config: Any, config: HeadQConfig, dtype: torch.dtype | None, shapes: Sequence[LayerShape] | None
) -> tuple[Sequence[LayerShape], torch.dtype]:
    """The shapes of a model's layers, and the dtype of its full-precision tokens."""
    if dtype is None:
        dtype = getattr(model_or_config, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return served(model_or_config, config).shapes if shapes is None else shapes, dtype


def _within(
    shapes: Sequence[LayerShape], config: HeadQConfig, known: Calibration | None, dtype: torch.dtype
) -> HeadQConfig:
    """See :func:`within_budget`."""
    budget, tokens, batch = config.cache_bytes, config.context_length, config.batch_size or 1
    if not isinstance(budget, int) or tokens is None:
        return config
    settings = _settings(config, known, shapes)
    count = _Count(shapes, settings[0], tokens, batch, dtype, known is not None)

    def held(i: int) -> int:
        return count.held(head_bits(settings[i], known, shapes))

    found = bisect.bisect_right(range(len(settings)), budget, key=held) - 1
    if found < 0:
        least, sequences = held(0), "one sequence" if batch == 1 else f"{batch} sequences"
        raise ValueError(
            f"cache_bytes={budget} ({bytes_text(budget)}) has no room for {sequences} of {tokens:,} tokens of this "
            f"model: with the fewest bits its cache takes {least:,} bytes ({bytes_text(least)}); give at least these, "
            "a shorter context_length or a smaller batch_size"
        )
    return settings[found]


class _Count:
    """The bytes of a cache, counted once with equal bits in one layer of each shape; other bits change codes and scales
    alone.

    Args:
        shapes: of all layers.
        config: without ``cache_bytes``.
        tokens, batch_size, dtype: as for :func:`estimate_memory`.
        calibrated: whether a calibration is used.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], config: HeadQConfig, tokens: int, batch_size: int, dtype: torch.dtype,
        calibrated: bool,
    ) -> None:  # fmt: skip
        kinds = list(dict.fromkeys(shapes))
        plain = dataclasses.replace(
            config, k_bits=min(config.levels("k")), v_bits=min(config.levels("v")), mean_bits=None
        )
        same = head_bits(plain, None, kinds)
        batch, ids, _ = _filled(kinds, plain, same, tokens, batch_size, dtype)
        own = {kind: storage_bytes(layer.tensors()) for kind, layer in zip(kinds, batch.layers, strict=True)}
        self.tokens: dict[LayerShape, int] = {  # that the pages of one layer have room for
            kind: layer.pool.pages * batch.page_tokens for kind, layer in zip(kinds, batch.layers, strict=True)
        }
        self.config, self.calibrated = plain, calibrated
        self.shapes, shared = shapes, storage_bytes(batch.tensors() + ids.tensors())
        alike = dict(zip(kinds, same, strict=True))
        self.rest = shared + sum(own[shape] - self._codes(shape, alike[shape]) for shape in shapes)

    def _codes(self, shape: LayerShape, bits: HeadBits) -> int:
        """Bytes of the codes and scales of one layer."""
        (key_dim, value_dim), config = shape.dims, self.config
        side, in_bytes = (config.side_bits,) * config.side_rank(key_dim), config.byte_scales("k")
        held = sum(key_bytes_per_token((b,) * key_dim + side) + scale_bits(in_bytes, b) // 8 for b in bits.k)
        if shape.latent is None:
            in_bytes = self.calibrated and config.byte_scales("v")
            scales = value_dim // (config.v_group_size or value_dim)
            held += sum(value_bytes_per_token(b, value_dim) + scales * scale_bits(in_bytes, b) // 8 for b in bits.v)
        return self.tokens[shape] * held

    def held(self, bits: Sequence[HeadBits]) -> int:
        """Bytes of the cache whose layers have those bits."""
        return self.rest + sum(self._codes(shape, b) for shape, b in zip(self.shapes, bits, strict=True))


def _settings(config: HeadQConfig, known: Calibration | None, shapes: Sequence[LayerShape]) -> list[HeadQConfig]:
    """What :func:`within_budget` chooses from, in rising order of bits."""
    config = dataclasses.replace(config, cache_bytes=None, batch_size=None)
    keys, values = config.levels("k"), config.levels("v")
    one_row = any(shape.latent is not None for shape in shapes)  # a key that is its value, with the values' levels
    if known is None:
        between = [] if one_row else [(k, v) for v, k in itertools.pairwise(values)]
        steps = sorted([(b, b) for b in values] + between, key=sum)
        return [dataclasses.replace(config, k_bits=k, v_bits=v, mean_bits=None) for k, v in steps]
    sides, heads = [values] if one_row else [keys, values], sum(shape.n_kv_heads for shape in shapes)
    least, most = (heads * sum(map(of, sides)) for of in (min, max))
    return [dataclasses.replace(config, mean_bits=n / (len(sides) * heads)) for n in range(least, most + 1)]


def _report(
    shapes: Sequence[LayerShape], config: HeadQConfig, known: Calibration | None, tokens: int, batch_size: int,
    dtype: torch.dtype,
) -> BitsReport:  # fmt: skip
    """Run the storage code of a cache of that config on shapes."""
    shared = [None] * len(shapes) if config.codec is not None else head_bits(config, known, shapes)
    return BitsReport.of(*_filled(shapes, config, shared, tokens, batch_size, dtype))


def _filled(
    shapes: Sequence[LayerShape], config: HeadQConfig, shared: Sequence[HeadBits | None], tokens: int, batch_size: int,
    dtype: torch.dtype,
) -> tuple[Batch, TokenIds, list[int]]:  # fmt: skip
    """What holds the tokens of one prefill, on shapes, and how many layers each of its stands for; ``shared``: the bits
    of each layer's heads."""
    if config.codec is None:  # without data, layers of one form are alike
        alike = Counter(zip(shapes, shared, strict=True))
        sources, times = [_source(config, *kind) for kind in alike], list(alike.values())
        shapes = [shape for shape, _ in alike]
    else:
        n = len(shapes)
        sources, times = [_source(config, shape, None, i, n) for i, shape in enumerate(shapes)], [1] * n
    if any(source.prototype.drops for source in sources):
        raise ValueError(f"how many tokens {config.codec!r} leaves out depends on the text: there is no estimate")
    schedule = schedule_of(config, sources)
    batch = Batch(schedule, page_tokens(config, schedule))
    batch.layers = [WritingLayer(shape, source, batch) for shape, source in zip(shapes, sources, strict=True)]
    batch.begin(batch_size, tokens)
    for layer in batch.layers:
        k, v, q = (
            torch.empty(batch_size, heads, tokens, dim, dtype=dtype, device=META) for heads, dim in layer.forms.values()
        )
        layer.append(k, v)
        for part in q.chunk(layer.shape.readers, 1):  # of each module that reads the layer
            layer.commit(part)
    ids = TokenIds()
    ids.note(torch.empty(batch_size, tokens, dtype=torch.int64, device=META), batch_size, tokens, 0, None)
    return batch, ids, times


def _source(
    config: HeadQConfig, shape: LayerShape, bits: HeadBits | None, index: int = 0, layers: int = 1
) -> SourceModule:  # fmt: skip
    """What codes a layer of that form, without data."""
    moments = None if config.calibration is None else _no_moments(shape)
    if config.codec is None:
        rows = None
        if shape.latent is not None:
            rows = Readout(torch.empty(1, 1, shape.head_dim, dtype=torch.float32, device=META), 1.0)
        return LayerCodec(config, shape, moments, META, bits=bits, readout=rows)
    context = LayerContext(shape, config.n_sink, META, moments, framed=moments, index=index, layers=layers)
    return build(config.codec, config.codec_options or {}, context)


def assumed_calibration(shapes: Sequence[LayerShape]) -> Calibration:
    """A calibration without data, for estimates of layers as if they had one: all heads are equally sensitive.

    Which head gets more bits is unknown then, and the bytes of all heads are those of a real calibration.

    Example:
        >>> from transformers import LlamaConfig
        >>> from headq_ao import estimate_memory, headq_config
        >>> from headq_ao.integrations.config_only.estimate import assumed_calibration
        >>> from headq_ao.integrations.config_only.served import served
        >>> known = assumed_calibration(served(LlamaConfig(), headq_config()).shapes)
        >>> estimate_memory(LlamaConfig(), headq_config(calibration=known), tokens=4096).packed_bits_per_element
        2.4375
    """
    return Calibration([_no_moments(shape, PROFILE) for shape in shapes], {})


def _no_moments(shape: LayerShape, beside: Sequence[str] = ()) -> LayerMoments:
    """Moments without data; those tensors beside that allocate bits are the same for all heads."""
    shapes = tensor_shapes(shape.n_kv_heads, shape.head_dim, TOKEN_TILE, shape.dims[1])
    tensors: dict[str, Any] = {name: torch.empty(shapes[name], dtype=torch.float32, device=META) for name in TENSORS}
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    halving = torch.tensor([0.25**bits for bits in range(4)], **made)
    tensors |= {name: (halving if name == "errors" else torch.ones(1, **made)).expand(shapes[name]) for name in beside}
    return LayerMoments(1, 1, **tensors)
