"""headq_ao: a torchao-style packed KV cache with HeadQ keys for Hugging Face causal LMs."""

import importlib.util as _util
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# Installed, ops and evals are inside this folder; in a checkout they lie beside it, where an editable install finds
# them. A Python that was started in a checkout without one, or with one of another checkout, is told here.
_root = _Path(__file__).resolve().parents[1]
_ops = _util.find_spec("headq_ao.ops")
if _ops is None or not _Path(_ops.origin or "").resolve().is_relative_to(_root):
    __path__.append(str(_root))

from headq_ao import lazy as _lazy
from headq_ao import quiet as _quiet
from headq_ao import registration as _registration

if _TYPE_CHECKING:
    from headq_ao.calibration.artifact import Calibration
    from headq_ao.config import HeadQConfig, headq_config
    from headq_ao.integrations.config_only.estimate import estimate_memory
    from headq_ao.integrations.transformers.cache import HeadQCache
    from headq_ao.integrations.transformers.calibrate import calibrate
    from headq_ao.integrations.transformers.hf_quantizer import HeadQQuantizationConfig
    from headq_ao.quantize import quantize_, restore_

_HOMES = {
    "Calibration": "headq_ao.calibration.artifact",
    "HeadQCache": "headq_ao.integrations.transformers.cache",
    "HeadQConfig": "headq_ao.config",
    "HeadQQuantizationConfig": "headq_ao.integrations.transformers.hf_quantizer",
    "calibrate": "headq_ao.integrations.transformers.calibrate",
    "estimate_memory": "headq_ao.integrations.config_only.estimate",
    "headq_config": "headq_ao.config",
    "quantize_": "headq_ao.quantize",
    "restore_": "headq_ao.quantize",
}

__all__ = [
    "Calibration",
    "HeadQCache",
    "HeadQConfig",
    "HeadQQuantizationConfig",
    "calibrate",
    "estimate_memory",
    "headq_config",
    "quantize_",
    "restore_",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> _Any:
    globals()[name] = found = _lazy.find(__name__, name, _HOMES)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_quiet.install()
_registration.register_with_others()
