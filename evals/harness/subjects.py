"""What an evaluation scores: HeadQ, another quantizer in its cache, transformers' own caches, or the exact cache."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from headq_ao import Calibration, HeadQConfig, estimate_memory, headq_config, quantize_, restore_
from headq_ao.codecs import registry
from headq_ao.evals.baselines.eviction import EVICTING
from headq_ao.evals.baselines.neighbours import ALL as ALL  # registers the baselines
from headq_ao.evals.baselines.transformers_cache import TransformersCache
from headq_ao.evals.harness.inputs import describe
from headq_ao.integrations.config_only.served import served

CONTEXTS = (1024, 4096, 16384)  # where bits are stated; 4096 is the one for claims at equal bits
MEMORY_CONTEXTS = (*CONTEXTS, 65536)
BACKENDS = ("quanto", "hqq", "fp8")
# Options of HeadQ's cache that every quantizer in it shares
CACHE_OPTIONS = ("n_sink", "residual_length", "block_size")


@dataclass
class Subject:
    """A cache to score.

    Args:
        method: ``"headq"``, ``"exact"``, a backend of transformers' ``QuantizedCache``, or a codec that is registered
            (:mod:`headq_ao.codecs.registry`), such as those of :data:`headq_ao.evals.baselines.neighbours.ALL`.
        options: of ``headq_config``, of ``QuantizedCache``, or of the method together with ``n_sink``,
            ``residual_length`` and ``block_size``.
        calibration: for those that use one.
        seed: of random bases.

    Raises:
        ValueError: on an unknown method or option.

    Example:
        >>> from headq_ao.evals.harness.subjects import Subject
        >>> Subject("kivi", {"k_bits": 2, "v_bits": 2}).kind, Subject("headq", {"rank": 0}).config.rank
        ('baseline', 0)
    """

    method: str = "headq"
    options: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.calibrate(self.calibration)

    def calibrate(self, calibration: Calibration | None) -> None:
        """Set the calibration; options are checked again."""
        self.calibration = calibration
        self.config: HeadQConfig | None = None
        if self.kind == "headq":
            self.config = headq_config(**{"seed": self.seed} | self.options | {"calibration": self.calibration})
        elif self.kind == "baseline":
            own = {name: x for name, x in self.options.items() if name not in CACHE_OPTIONS}
            registry.check(self.method, own)
            shared = {name: x for name, x in self.options.items() if name in CACHE_OPTIONS}
            self.config = headq_config(codec=self.method, codec_options=own, calibration=self.calibration, **shared)
        elif self.kind == "exact" and self.options:
            raise ValueError(f"the exact cache has no options, got {', '.join(self.options)}")

    @property
    def kind(self) -> str:
        """``"headq"``, ``"baseline"``, ``"transformers"`` or ``"exact"``."""
        if self.method in ("headq", "exact"):
            return self.method
        if self.method in BACKENDS:
            return "transformers"
        if self.method in registry.names():
            return "baseline"
        known = ", ".join(["headq", "exact", *BACKENDS, *registry.names()])
        raise ValueError(f"no method {self.method!r}; there are {known}")

    @contextlib.contextmanager
    def on(self, model: Any) -> Iterator[Callable[[], Any] | None]:
        """Put it on a model without HeadQ, give what :func:`~.scoring.score` takes as ``make_cache``,
        and take it off again."""
        if self.kind == "exact":
            yield functools.partial(DynamicCache, config=model.config)
        elif self.kind == "transformers":
            yield functools.partial(TransformersCache, self.method, model.config, **self.options)
        else:
            assert self.config is not None
            quantize_(model, self.config)
            try:
                yield None
            finally:
                restore_(model)

    @property
    def batchable(self) -> bool:
        """Whether rows of a batch are coded apart; transformers' backends share groups or a scale between them."""
        return self.kind != "transformers"

    def bits(self, model: Any, report: dict[str, Any]) -> dict[str, Any]:
        """Body bits per side, their mean, and the mean at each context of :data:`CONTEXTS`; None where exact.

        Args:
            model: for its shapes.
            report: ``bits_report().to_dict()`` of a run.
        """
        if self.kind == "exact":
            return {"key": None, "value": None, "body": None, "at": dict.fromkeys(map(str, CONTEXTS))}
        if self.method in EVICTING:  # the budget is in proportion to the prompt
            sides = {side: report[f"{side}_stored_bits"] for side in ("key", "value")}
            body = sum(sides.values()) / 2
            return {**sides, "body": body, "at": dict.fromkeys(map(str, CONTEXTS), body)}
        sides = {side: report[f"{side}_body_bits"] for side in ("key", "value")}
        packed = [x for x in sides.values() if x is not None]
        body = sum(packed) / len(packed)
        if self.kind == "headq":
            assert self.config is not None
            at = {str(t): estimate_memory(model, self.config, t).bits_at_t for t in CONTEXTS}
        else:
            own = _own_bytes(report)
            width = _width(model)
            at = {str(t): body + 8 * own / (t * width) / len(packed) for t in CONTEXTS}
        return {**sides, "body": body, "at": at}

    def memory_bytes(self, model: Any, bits: dict[str, Any], report: dict[str, Any]) -> dict[str, int]:
        """The whole cache of a sequence at each of :data:`MEMORY_CONTEXTS`, full-precision tokens in 16 bits."""
        width = _width(model)
        if self.kind == "exact":
            return {str(t): round(2 * t * width * 2) for t in MEMORY_CONTEXTS}
        if self.kind == "headq":
            assert self.config is not None
            found = {t: estimate_memory(model, self.config, t, dtype=torch.bfloat16) for t in MEMORY_CONTEXTS}
            return {str(t): sum(estimate.bytes.values()) for t, estimate in found.items()}
        exact = report["exact_rows"]
        own = 0 if self.method in EVICTING else _own_bytes(report)
        per_row = sum(16 if bits[side] is None else bits[side] for side in ("key", "value")) / 8
        return {str(t): round(own + width * ((t - exact) * per_row + exact * 4)) for t in MEMORY_CONTEXTS}

    def cache_config(self) -> dict[str, Any] | None:
        """The cache's config as plain data: all of it for HeadQ, for others what every quantizer shares."""
        if self.config is None:
            return None
        config = describe(self.config)
        return config if self.kind == "headq" else {name: config[name] for name in CACHE_OPTIONS}

    def describe(self) -> dict[str, Any]:
        """``kind``, ``name`` and ``options`` as plain data."""
        return {"kind": self.kind, "name": self.method, "options": self.options}


def _own_bytes(report: dict[str, Any]) -> float:
    """What a sequence keeps beside its tokens, whatever its length."""
    kept: float = report["bytes"].get("bases", 0) / report.get("sequences", 1)
    return kept


def _width(model: Any) -> float:
    """Elements of one side per token, over all layers: half of what transformers' own cache keeps."""
    return sum(served(model, headq_config()).exact) / 2
