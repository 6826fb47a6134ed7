"""headq_ao: a torchao-style packed KV cache with HeadQ keys for Hugging Face causal LMs."""

import importlib.util as _util
from pathlib import Path as _Path

# Installed, ops and evals are inside this folder; in a checkout they lie beside it, where an editable install finds
# them. A Python that was started in a checkout without one, or with one of another checkout, is told here.
_root = _Path(__file__).resolve().parents[1]
_ops = _util.find_spec("headq_ao.ops")
if _ops is None or not _Path(_ops.origin or "").resolve().is_relative_to(_root):
    __path__.append(str(_root))

from headq_ao import attention as _attention
from headq_ao.cache import HeadQCache
from headq_ao.calibrate import calibrate
from headq_ao.calibration import Calibration
from headq_ao.config import HeadQConfig, headq_config
from headq_ao.estimate import estimate_memory
from headq_ao.hf_quantizer import HeadQQuantizationConfig
from headq_ao.quantize import quantize_, restore_

_attention.register()

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
