"""``HeadQState``: what ``quantize_`` leaves on a model."""

import dataclasses
from typing import Any, NamedTuple

import torch

from headq_ao.calibration.artifact import Calibration
from headq_ao.codecs.source import SourceModule
from headq_ao.config import HeadQConfig
from headq_ao.integrations.transformers.models import execution_device
from headq_ao.integrations.transformers.serving import Serving
from headq_ao.layer_shape import LayerShape


class Depth(NamedTuple):
    """How many layers a call ran, and the configs that said so: the model's, and its decoder's part."""

    config: Any
    text: Any
    layers: int


@dataclasses.dataclass
class HeadQState:
    """What ``quantize_`` leaves on a model, as ``model._headq``."""

    config: HeadQConfig
    shapes: list[LayerShape]
    serving: Serving
    calibration: Calibration | None = None  # what config.calibration is, or names
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    codecs: list[SourceModule] = dataclasses.field(default_factory=list)  # the modules' ``headq``
    attention_configs: list[Any] = dataclasses.field(default_factory=list)  # whose ``_attn_implementation`` counts
    chosen_attention: Any = None  # what a user has set since, for restore_
    depth: Depth | None = None  # of the last call

    @property
    def fallback(self) -> str | None:
        """Why attention cannot read packed tokens, and the cache gives dequantized rows; None: it reads them."""
        return self.serving.fallback

    def device(self, number: int) -> torch.device:
        """Where the packed layer of that number computes."""
        modules = self.serving.modules
        return execution_device(modules[number]) if modules else next(self.codecs[number].buffers()).device
