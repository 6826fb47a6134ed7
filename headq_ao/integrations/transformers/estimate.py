"""``estimate_memory``: what a cache would take, found by running its storage code without data."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from headq_ao.ambient import mode_neutral
from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.memory_report import BitsReport
from headq_ao.cache.schedule import page_tokens, schedule_of
from headq_ao.cache.token_ids import TokenIds
from headq_ao.calibration.artifact import Calibration, usable_calibration
from headq_ao.calibration.bit_allocation import head_bits
from headq_ao.codecs.base import HeadBits
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.registry import LayerContext, build
from headq_ao.codecs.source import SourceModule
from headq_ao.config import HeadQConfig
from headq_ao.integrations.transformers.models import layer_shapes
from headq_ao.layer_shape import LayerShape
from headq_ao.ops.layout import TOKEN_TILE
from headq_ao.statistics.moments import PROFILE, TENSORS, LayerMoments, tensor_shapes

META = torch.device("meta")


@mode_neutral
def estimate_memory(
    model_or_config: Any, config: HeadQConfig, tokens: int, batch_size: int = 1, dtype: torch.dtype | None = None
) -> BitsReport:
    """The :meth:`HeadQCache.bits_report` that one prefill of ``tokens`` tokens would leave, without running the model.

    The cache's own code runs on shapes alone (PyTorch's meta device), so the counts are those of the real cache.
    Only sequences whose keys or values are far from ordinary size (:mod:`headq_ao.statistics.units`) hold more.

    Args:
        model_or_config: a transformers model, or its config.
        config: what to store; of a calibration only how ``mean_bits`` shares the bits counts, and that it is used:
            one on too few tokens is not, with the warning of :func:`headq_ao.quantize_`.
        tokens: per sequence.
        batch_size: sequences.
        dtype: of full-precision tokens; default the model's, else bfloat16.

    Returns:
        A :class:`~headq_ao.cache.memory_report.BitsReport`; its ``bytes`` sum to the footprint.

    Raises:
        ValueError: when the model is not supported or a count is below 1.

    Example:
        >>> from transformers import LlamaConfig
        >>> from headq_ao import estimate_memory, headq_config
        >>> report = estimate_memory(LlamaConfig(), headq_config(), tokens=4096)
        >>> round(report.packed_bits_per_element, 4)
        2.125
    """
    if tokens < 1 or batch_size < 1:
        raise ValueError(f"tokens and batch_size must be at least 1, got {tokens} and {batch_size}")
    model_config = model_or_config.config if isinstance(model_or_config, PreTrainedModel) else model_or_config
    if dtype is None:
        dtype = getattr(model_or_config, "dtype", None)
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    shapes = layer_shapes(model_config)
    config, known = usable_calibration(config)
    shared = [None] * len(shapes) if config.codec is not None else head_bits(config, known, shapes)
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
    batch.layers = [PackedLayer(shape, source, batch) for shape, source in zip(shapes, sources, strict=True)]
    batch.begin(batch_size, tokens)
    for layer in batch.layers:
        k, v, q = (
            torch.empty(batch_size, heads, tokens, dim, dtype=dtype, device=META) for heads, dim in layer.forms.values()
        )
        layer.update(k, v)
        layer.commit(q)
    ids = TokenIds()
    ids.note(torch.empty(batch_size, tokens, dtype=torch.int64, device=META), batch_size, tokens, 0, None)
    return BitsReport.of(batch, ids, times)


def _source(
    config: HeadQConfig, shape: LayerShape, bits: HeadBits | None, index: int = 0, layers: int = 1
) -> SourceModule:  # fmt: skip
    """What codes a layer of that form, without data."""
    moments = None if config.calibration is None else _no_moments(shape)
    if config.codec is None:
        return LayerCodec(config, shape, moments, META, bits=bits)
    context = LayerContext(shape, config.n_sink, META, moments, framed=moments, index=index, layers=layers)
    return build(config.codec, config.codec_options or {}, context)


def assumed_calibration(model_config: Any) -> Calibration:
    """A calibration without data, for estimates of a config as if it had one: all heads are equally sensitive.

    Which head gets more bits is unknown then, and the bytes of all heads are those of a real calibration.

    Example:
        >>> from transformers import LlamaConfig
        >>> from headq_ao import estimate_memory, headq_config
        >>> from headq_ao.integrations.transformers.estimate import assumed_calibration
        >>> known = assumed_calibration(LlamaConfig())
        >>> estimate_memory(LlamaConfig(), headq_config(calibration=known), tokens=4096).packed_bits_per_element
        2.375
    """
    return Calibration([_no_moments(shape, PROFILE) for shape in layer_shapes(model_config)], {})


def _no_moments(shape: LayerShape, beside: Sequence[str] = ()) -> LayerMoments:
    """Moments without data; those tensors beside that allocate bits are the same for all heads."""
    shapes = tensor_shapes(shape.n_kv_heads, shape.head_dim, TOKEN_TILE, shape.dims[1])
    tensors: dict[str, Any] = {name: torch.empty(shapes[name], dtype=torch.float32, device=META) for name in TENSORS}
    made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    halving = torch.tensor([0.25**bits for bits in range(4)], **made)
    tensors |= {name: (halving if name == "errors" else torch.ones(1, **made)).expand(shapes[name]) for name in beside}
    return LayerMoments(1, 1, **tensors)
