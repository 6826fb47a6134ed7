"""Checkpoints that transformers saved with HeadQ on the model: plain weights, with a calibration beside them."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from headq_ao.integrations.transformers.hf_quantizer import METHOD, PREFIX


class HeadQCheckpoint(QuantizationConfig):
    """Leaves all weights as they are, and the calibration's tensors out.

    Raises:
        ValueError: for quantized weights, which transformers' torchao wrote in a form of its own.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if config.get("weights"):
            raise ValueError(
                "HeadQ serves checkpoints with plain weights in vLLM, and this one's are quantized by "
                f"{config['weights'].get('quant_method')!r}; save the model without that"
            )

    def get_name(self) -> Any:
        """See :class:`QuantizationConfig`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """See :class:`QuantizationConfig`."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See :class:`QuantizationConfig`."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """See :class:`QuantizationConfig`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "HeadQCheckpoint":
        """See :class:`QuantizationConfig`."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """As without quantization; vLLM asks it of linear layers, and takes its own for all others."""
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """See :class:`QuantizationConfig`."""
        return WeightsMapper(orig_to_new_prefix={PREFIX: None})
