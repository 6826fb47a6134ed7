"""``HeadQPress``: the context of a kvpress pipeline, coded by HeadQ."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from kvpress import BasePress
from torch import nn

from headq_ao.cache.memory_report import BitsReport
from headq_ao.config import HeadQConfig, headq_config
from headq_ao.integrations.transformers import calls, hooks
from headq_ao.integrations.transformers.cache import HeadQCache
from headq_ao.integrations.transformers.models import CACHE_NAMES


@dataclass
class HeadQPress(BasePress):
    """Codes the keys and values of the prefill as a packed cache does, and leaves what attention would read of them,
    :math:`\\hat k` and :math:`\\hat v`, in the cache that the caller brought.

    While it is on a model, a call with an empty ``DynamicCache`` fills a :class:`~headq_ao.HeadQCache`: the call itself
    attends exactly, as kvpress's presses do, and its tokens are packed. Then sinks and window, as they are, and all
    packed tokens, dequantized, go into the caller's cache, and the model is as before. So answers are those of a packed
    context, and the pipeline's memory is not smaller: :attr:`report` has the bytes of the packed cache. Question and
    answer stay in full precision.

    Args:
        config: from :func:`headq_ao.headq_config`; the default without a calibration codes only contexts that are
            longer than its ``warmup_tokens``.

    kvpress's evaluation writes down the ``compression_ratio`` of its press: here it is what the last prefill came to,
    the part of the exact cache's bytes that the packed cache does without. A ratio that is set has no effect.

    Raises:
        ValueError: when the model's attention cannot read packed tokens, or the model has a packed cache already.

    Example:
        >>> from headq_ao import headq_config
        >>> from headq_ao.integrations.kvpress import HeadQPress  # doctest: +SKIP
        >>> press = HeadQPress(headq_config(calibration="smollm2.safetensors"))  # doctest: +SKIP
        >>> pipe = transformers.pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)  # doctest: +SKIP
        >>> pipe(context, question=question, press=press)["answer"]  # doctest: +SKIP
    """

    config: HeadQConfig = field(default_factory=headq_config)
    report: BitsReport | None = field(default=None, init=False)
    compression_ratio: float = field(default=0.0, init=False)

    def forward_hook(self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> NoReturn:
        """What other presses are combined by.

        Raises:
            NotImplementedError: always: tokens are coded by whole calls, with their queries and positions.
        """
        raise NotImplementedError("HeadQPress codes whole calls and cannot be part of another press; use it alone")

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """HeadQ on a model for the prefill; :attr:`report` is that of the last one."""
        hooks.attach(model, self.config)
        prefill = _Prefill(self, model)
        handles = [
            model.register_forward_pre_hook(prefill.note, with_kwargs=True, prepend=True),
            model.base_model.register_forward_pre_hook(prefill.supply, with_kwargs=True),
            model.base_model.register_forward_hook(prefill.hand_over),
        ]
        try:
            if model._headq.fallback is not None:
                raise ValueError(f"HeadQPress cannot serve this model: {model._headq.fallback}")
            yield
        finally:
            for handle in handles:
                handle.remove()
            hooks.detach(model)


class _Prefill:
    """One call of a model, or of what is below its head: the cache that the caller brought, and the packed one."""

    def __init__(self, press: HeadQPress, model: Any) -> None:
        self.press, self.model = press, model
        self.target: Any = None
        self.packed: Any = None

    def note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model, before the one that supplies a packed cache."""
        self.target = _cache_of(kwargs)

    def supply(self, base: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Pre-hook of the base model, which kvpress's pipeline calls by itself."""
        if not isinstance(_cache_of(kwargs), HeadQCache):
            self.target = _cache_of(kwargs)
            args, kwargs = calls.supply_cache(self.model, args, kwargs)
        self.packed = _cache_of(kwargs)
        return args, kwargs

    @torch.no_grad()
    def hand_over(self, base: Any, args: Any, output: Any) -> None:
        """Hook of the base model: what attention would read, into the caller's cache.

        Raises:
            ValueError: where a sliding window has let tokens go.
        """
        target, packed, self.target, self.packed = self.target, self.packed, None, None
        if target is None or packed is None or isinstance(target, HeadQCache):
            return
        for place, layer in zip(self.model._headq.serving.places, packed.packed, strict=True):
            k, v, positions = layer.rows_of_model()
            if len(positions) != packed.get_seq_length():
                raise ValueError(
                    f"layer {place} keeps {len(positions)} of {packed.get_seq_length()} tokens, its sliding window; "
                    "HeadQPress gives whole contexts: take a shorter one"
                )
            target.update(k.to(self.model.dtype), v.to(self.model.dtype), place)
        self.press.report = packed.bits_report()
        exact = sum(layer.keys.nbytes + layer.values.nbytes for layer in target.layers)
        self.press.compression_ratio = 1 - sum(self.press.report.bytes.values()) / exact
        for name in CACHE_NAMES:
            if getattr(output, name, None) is packed:
                output[name] = target


def _cache_of(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
