"""The quantizer that transformers finds for a checkpoint with HeadQ."""

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from headq_ao.integrations.transformers import hooks
from headq_ao.integrations.transformers.hf_quantizer import METHOD, HeadQQuantizer


class HeadQLoader(HeadQQuantizer):
    """Puts HeadQ on a model once its weights are loaded."""

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Make of a loaded model what it would be without HeadQ, and quantize it as any other."""
        super().postprocess_model(model, **kwargs)
        hooks.attach(model, self.quantization_config.config)


def register() -> None:
    """Make the method ``"headq"`` of checkpoints known to transformers."""
    if AUTO_QUANTIZER_MAPPING.get(METHOD) is not HeadQLoader:
        register_quantizer(METHOD)(HeadQLoader)
