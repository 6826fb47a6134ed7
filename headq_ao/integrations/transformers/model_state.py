"""``HeadQState``: what ``quantize_`` leaves on a model."""

import dataclasses
from typing import Any

from headq_ao.calibration.artifact import Calibration
from headq_ao.codecs.source import SourceModule
from headq_ao.config import HeadQConfig
from headq_ao.layer_shape import LayerShape


@dataclasses.dataclass
class HeadQState:
    """What ``quantize_`` leaves on a model, as ``model._headq``."""

    config: HeadQConfig
    shapes: list[LayerShape]
    calibration: Calibration | None = None  # what config.calibration is, or names
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    codecs: list[SourceModule] = dataclasses.field(default_factory=list)  # the modules' ``headq``
    attention_configs: list[Any] = dataclasses.field(default_factory=list)  # whose ``_attn_implementation`` counts
    chosen_attention: Any = None  # what a user has set since, for restore_
