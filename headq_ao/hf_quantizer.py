"""``save_pretrained`` and ``from_pretrained`` of a model with HeadQ, through transformers' quantizer interface."""

import dataclasses
from typing import Any

import safetensors
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from headq_ao.calibration import CALIBRATION, Calibration
from headq_ao.config import HeadQConfig
from headq_ao.models import kv_heads_here, layer_shapes

METHOD = "headq"
PREFIX = "headq_calibration."  # of the calibration's tensors in a checkpoint
OF_THE_WEIGHTS = (  # what loading asks of a quantizer about weights: HeadQ leaves them to the one below it
    "update_dtype", "update_device_map", "param_element_size", "get_new_dtype", "adjust_max_memory",
    "param_needs_quantization", "get_quantize_ops", "get_load_operations", "get_weight_conversions",
    "update_weight_conversions", "validate_environment",
)  # fmt: skip


@register_quantization_config(METHOD)
class HeadQQuantizationConfig(QuantizationConfigMixin):
    """transformers' ``quantization_config`` of a model with HeadQ.

    Args:
        config: from :func:`headq_ao.headq_config`; its JSON form when read from a checkpoint.
        weights: transformers' quantization config of the weights, such as ``TorchAoConfig``, or None.
        calibrated: whether the checkpoint holds the calibration.
        quant_method: ``"headq"``.

    Raises:
        ValueError: when ``config`` is no HeadQ config.

    Example:
        >>> from headq_ao import HeadQQuantizationConfig, headq_config
        >>> HeadQQuantizationConfig(headq_config(k_bits=3)).to_dict()["config"]["_data"]["k_bits"]
        3
    """

    def __init__(
        self,
        config: HeadQConfig | dict[str, Any],
        weights: QuantizationConfigMixin | dict[str, Any] | None = None,
        calibrated: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        made = config_from_dict(config) if isinstance(config, dict) else config
        if not isinstance(made, HeadQConfig):
            raise ValueError(f"config must come from headq_config, got a {type(made).__name__}")
        self.quant_method = quant_method
        self.config = made
        self.weights = AutoQuantizationConfig.from_dict(weights) if isinstance(weights, dict) else weights
        self.calibrated = calibrated or made.calibration is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json; a calibration goes into the weights file instead."""
        return {
            "quant_method": self.quant_method,
            "config": config_to_dict(dataclasses.replace(self.config, calibration=None)),
            "calibrated": self.calibrated,
            "weights": None if self.weights is None else self.weights.to_dict(),
        }


@register_quantizer(METHOD)
class HeadQQuantizer(HfQuantizer):
    """Puts HeadQ on a model as it is loaded, and its calibration into a checkpoint as it is saved.

    What concerns weights is left to ``inner``, the quantizer of the weights, where there is one.
    """

    def __init__(self, quantization_config: HeadQQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.inner: HfQuantizer | None = None
        self.below: HfQuantizer | None = None  # what the model had before, for restore_
        if quantization_config.weights is not None:
            self.set_inner(AutoHfQuantizer.from_config(quantization_config.weights, pre_quantized=self.pre_quantized))

    def set_inner(self, inner: HfQuantizer) -> None:
        """Take over the quantizer of the weights."""
        self.inner = inner
        self.quantization_config.weights = inner.quantization_config
        for name in OF_THE_WEIGHTS:
            setattr(self, name, getattr(inner, name))

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Names of quantized weights in a checkpoint."""
        return {} if self.inner is None else self.inner.serialized_names

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` can write this model."""
        return self.inner is None or self.inner.is_serializable()

    @property
    def is_trainable(self) -> bool:
        """As for the weights: in train mode HeadQ steps aside."""
        return self.inner is None or self.inner.is_trainable

    @property
    def is_compileable(self) -> bool:
        """HeadQ is; the quantizer of the weights may not be."""
        return self.inner is None or self.inner.is_compileable

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes: the weights, and the calibration beside them."""
        state, metadata = (None, {}) if self.inner is None else self.inner.get_state_dict_and_metadata(model)
        if self.inner is None:
            check_weights_known(model)
        if self.below is not None and plain(self.below):  # the model's own names, not those of the GGUF file
            vars(model).pop("_weight_conversions", None)
        untie(model)
        calibration = model._headq.calibration
        if calibration is not None:
            tensors = calibration.tensors()
            state = dict(model.state_dict() if state is None else state)
            state |= {PREFIX + name: t.contiguous() for name, t in tensors.items()}
            metadata = metadata | CALIBRATION.metadata(calibration.head(), tensors)
        return state, metadata

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.inner is not None:
            self.inner._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        config = self.quantization_config.config
        processes = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        kv_heads_here(model, layer_shapes(model.config), 0, processes)
        if self.pre_quantized and self.quantization_config.calibrated:
            config = dataclasses.replace(config, calibration=read_calibration(checkpoint_files or []))
            self.quantization_config.config = config
        known = set(type(model)._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {"^" + PREFIX.replace(".", r"\.")}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from headq_ao.quantize import quantize_  # attaches the quantizer, and so imports this file

        if self.inner is not None:
            self.inner._process_model_after_weight_loading(model, **kwargs)
        del model._keys_to_ignore_on_load_unexpected
        forget_one_way_conversions(model)
        align_weights(model)
        quantize_(model, self.quantization_config.config)


def forget_one_way_conversions(model: PreTrainedModel) -> None:
    """Let a model with quantized weights be saved again: transformers would undo what loading did to them, and cannot.

    ``get_state_dict_and_metadata`` returns them in the checkpoint's form already.
    """
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        own = [any(hasattr(op, "hf_quantizer") for op in getattr(c, "operations", ())) for c in loaded]
        model._weight_conversions = [c for c, one_way in zip(loaded, own, strict=True) if not one_way]


def align_weights(model: PreTrainedModel) -> None:
    """Copy weights that transformers has mapped from a file to where PyTorch allocates them, on multiples of 64 bytes.

    In the file they begin at any multiple of 8, and CPU products with such a weight round differently: the logits would
    not be bit for bit those of the model that was saved.
    """
    for _, parameter in model.named_parameters():
        names = parameter.__tensor_flatten__()[0] if isinstance(parameter, TorchAOBaseTensor) else []
        for name in names:
            setattr(parameter, name, aligned(getattr(parameter, name)))
        if type(parameter) is nn.Parameter:
            parameter.data = aligned(parameter.data)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that begins on a multiple of 64 bytes."""
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % 64 == 0 else tensor.clone()


def read_calibration(files: list[str]) -> Calibration:
    """The calibration inside a checkpoint's safetensors files.

    Raises:
        ValueError: when it is missing, damaged or of another version.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            raise ValueError(f"a calibrated HeadQ checkpoint is read from safetensors files, got {path!r}")
        with safetensors.safe_open(path, "pt") as f:
            metadata |= f.metadata() or {}
            names = [name for name in f.keys() if name.startswith(PREFIX)]  # noqa: SIM118, not a dict
            tensors |= {name.removeprefix(PREFIX): f.get_tensor(name) for name in names}
    with CALIBRATION.refusing(files[0] if files else "the checkpoint"):
        head = CALIBRATION.head(metadata)
        CALIBRATION.check(metadata, tensors)
        return Calibration.of(head, tensors)


def attach(model: PreTrainedModel, config: HeadQConfig) -> None:
    """Give a model that has HeadQ the quantizer that ``save_pretrained`` asks, over the one of its weights."""
    below = getattr(model, "hf_quantizer", None)
    if isinstance(below, HeadQQuantizer):
        given = below.quantization_config
        if given.calibrated and config.calibration is None:  # it rests on too little, and is not used
            below.quantization_config = HeadQQuantizationConfig(config, weights=given.weights)
            model.config.quantization_config = below.quantization_config
        return
    quantizer = HeadQQuantizer(HeadQQuantizationConfig(config), pre_quantized=True)
    quantizer.below = below
    if below is not None and not plain(below):
        quantizer.set_inner(below)
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config


def plain(quantizer: HfQuantizer) -> bool:
    """Whether a GGUF file's quantizer has unpacked all weights while loading: no packed module is left."""
    return getattr(quantizer, "packed_modules", None) == {}


def detach(model: PreTrainedModel) -> None:
    """Leave a model with the quantizer that it had before HeadQ, or none."""
    quantizer = model.hf_quantizer
    below = quantizer.below or quantizer.inner
    if below is not None:
        model.hf_quantizer, model.config.quantization_config = below, below.quantization_config
        if "quantization_method" in vars(model):
            model.quantization_method = below.quantization_config.quant_method
        return
    for owner in (model, model.config):
        for name in ("hf_quantizer", "quantization_config", "quantization_method", "is_quantized"):
            if name in vars(owner):
                delattr(owner, name)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and "_is_quantized" in vars(module.config):
            del module.config._is_quantized


def note_weights(model: PreTrainedModel, config: Any) -> None:
    """Let ``save_pretrained`` know how ``quantize_`` has just quantized the weights."""
    if not torchao_weights(model):
        return
    inner = AutoHfQuantizer.from_config(TorchAoConfig(config), pre_quantized=True)
    above = getattr(model, "hf_quantizer", None)
    if isinstance(above, HeadQQuantizer):
        above.set_inner(inner)
    elif above is None or plain(above):
        vars(model).pop("_weight_conversions", None)
        model.hf_quantizer, model.config.quantization_config = inner, inner.quantization_config


def torchao_weights(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that torchao has quantized."""
    return [name for name, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)]


def check_weights_known(model: PreTrainedModel) -> None:
    """Raise ValueError where weights were quantized by nobody that transformers knows of."""
    names = torchao_weights(model)
    if names:
        raise ValueError(
            f"{names[0]} is a torchao weight, but its config is not known, so the model could not be loaded again; "
            "quantize the weights with headq_ao.quantize_, or with TorchAoConfig in from_pretrained"
        )


def untie(model: PreTrainedModel) -> None:
    """Tell the config where quantization has parted an output embedding from the input embedding it was tied to."""
    output, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    if output is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = output.weight is model.get_input_embeddings().weight
