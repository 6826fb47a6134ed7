"""headq_ao: a torchao-style packed KV cache with HeadQ keys for Hugging Face causal LMs."""

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
