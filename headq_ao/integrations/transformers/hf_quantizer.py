"""``save_pretrained`` and ``from_pretrained`` of a model with HeadQ, through transformers' quantizer interface."""

import copy
import dataclasses
from typing import Any

import safetensors
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.utils import TorchAOBaseTensor
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer, register_quantization_config
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from headq_ao.calibration.artifact import CALIBRATION, Calibration
from headq_ao.config import CONFIG_VERSION, HeadQConfig
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.models import kv_heads_here
from headq_ao.integrations.transformers.own_config import OwnConfigs

METHOD = "headq"
PREFIX = "headq_calibration."  # of the calibration's tensors in a checkpoint
OF_THE_WEIGHTS = (  # what loading asks of a quantizer about weights: HeadQ leaves them to the one below it
    "update_dtype", "update_device_map", "param_element_size", "get_new_dtype", "adjust_max_memory",
    "param_needs_quantization", "get_quantize_ops", "get_load_operations", "get_weight_conversions",
    "update_weight_conversions", "validate_environment", "update_attn_implementation",
)  # fmt: skip
MARKS = ("hf_quantizer", "is_quantized", "quantization_method")  # by which transformers knows a quantized model
IGNORED_KEYS = "_keys_to_ignore_on_load_unexpected"


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A config as torchao writes it, of this version, which says what one of version 1 took for granted.

    Example:
        >>> from headq_ao.integrations.transformers.hf_quantizer import upgraded
        >>> upgraded({"_type": "HeadQConfig", "_version": 1, "_data": {"version": 1}})["_data"]
        {'scale_bits': 16, 'version': 2}
    """
    data = config.get("_data")
    if config.get("_version") != 1 or not isinstance(data, dict):
        return config
    return config | {"_version": CONFIG_VERSION, "_data": {"scale_bits": 16} | data | {"version": CONFIG_VERSION}}


@register_quantization_config(METHOD)
class HeadQQuantizationConfig(QuantizationConfigMixin):
    """transformers' ``quantization_config`` of a model with HeadQ.

    It has the attributes of ``weights`` too, for those who ask a quantized model about its weights.

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
        made = config_from_dict(upgraded(config)) if isinstance(config, dict) else config
        if not isinstance(made, HeadQConfig):
            raise ValueError(f"config must come from headq_config, got a {type(made).__name__}")
        self.quant_method = quant_method
        self.config = made
        self.weights = AutoQuantizationConfig.from_dict(weights) if isinstance(weights, dict) else weights
        self.calibrated = calibrated or made.calibration is not None

    def __getattr__(self, name: str) -> Any:
        weights = vars(self).get("weights")
        if weights is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(weights, name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json; a calibration goes into the weights file instead."""
        return {
            "quant_method": self.quant_method,
            "config": config_to_dict(dataclasses.replace(self.config, calibration=None)),
            "calibrated": self.calibrated,
            "weights": None if self.weights is None else self.weights.to_dict(),
        }


class HeadQQuantizer(HfQuantizer):
    """Puts HeadQ on a model as it is loaded, and its calibration into a checkpoint as it is saved.

    What concerns weights is left to ``inner``, the quantizer of the weights, where there is one. HeadQ alone changes no
    weight: a model without quantized ones is none that transformers should call quantized, and may be cast and trained.

    A model that is loaded gets another one from ``quantize_``, as any model does; the one that loads is a
    :class:`headq_ao.integrations.transformers.loading.HeadQLoader`.
    """

    def __init__(self, quantization_config: HeadQQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)
        self.inner: HfQuantizer | None = None
        self.before: dict[str, Any] = {}  # the model's marks before HeadQ, for restore_
        self.configs: OwnConfigs | None = None
        if quantization_config.weights is not None:
            self.set_inner(AutoHfQuantizer.from_config(quantization_config.weights, pre_quantized=self.pre_quantized))

    def set_inner(self, inner: HfQuantizer) -> None:
        """Take over the quantizer of the weights."""
        self.inner = inner
        self.quantization_config.weights = inner.quantization_config
        for name in OF_THE_WEIGHTS:
            if hasattr(inner, name):  # get_new_dtype and quantized_element_size: of later versions of transformers
                setattr(self, name, getattr(inner, name))

    @property
    def below(self) -> HfQuantizer | None:
        """The quantizer that the model had before."""
        return self.before.get("hf_quantizer")

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
    def is_qat_trainable(self) -> bool:
        """As for the weights: whether all of them may be trained."""
        return self.inner is None or self.inner.is_qat_trainable

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

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        """What is done to a model before its weights are loaded: all of the weights' quantizer, and HeadQ's checks.

        Raises:
            ValueError: when the checkpoint's calibration is missing or damaged, or heads cannot be divided.
        """
        if self.inner is not None:
            self.inner.preprocess_model(model, dtype=dtype, **kwargs)
        processes = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        if processes > 1:
            kv_heads_here(model, layer_shapes(model.config), 0, processes)
        ours = self.quantization_config
        if self.pre_quantized and ours.calibrated:
            calibration = read_calibration(kwargs.get("checkpoint_files") or [])
            ours.config = dataclasses.replace(ours.config, calibration=calibration)
        self.ignored_keys = vars(model).get(IGNORED_KEYS)
        known = getattr(model, IGNORED_KEYS) or ()
        setattr(model, IGNORED_KEYS, {*known, "^" + PREFIX.replace(".", r"\.")})

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Make of a loaded model what it would be without HeadQ."""
        if self.ignored_keys is None:
            delattr(model, IGNORED_KEYS)
        else:
            setattr(model, IGNORED_KEYS, self.ignored_keys)
        mark(model, self.inner)
        if self.inner is not None:
            self.inner.postprocess_model(model, **kwargs)
        forget_one_way_conversions(model)
        align_weights(model)


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
    """Give a model configs of its own and the quantizer that ``save_pretrained`` asks, over the one of its weights."""
    quantizer = HeadQQuantizer(HeadQQuantizationConfig(config), pre_quantized=True)
    quantizer.before = {name: vars(model)[name] for name in MARKS if name in vars(model)}
    if quantizer.below is not None and not plain(quantizer.below):
        quantizer.set_inner(quantizer.below)
    quantizer.configs = OwnConfigs(model)
    mark(model, quantizer)


def mark(model: PreTrainedModel, quantizer: HfQuantizer | None) -> None:
    """Give a model its quantizer, and call it quantized as transformers does where its weights are.

    Its configs must be its own.
    """
    weights = quantizer.inner if isinstance(quantizer, HeadQQuantizer) else quantizer
    for owner, names in ((model, MARKS), (model.config, ("quantization_config",))):
        for name in names:
            vars(owner).pop(name, None)
    if quantizer is not None:
        model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    if weights is not None:
        model.is_quantized, model.quantization_method = True, weights.quantization_config.quant_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("_is_quantized", None)
            if weights is not None:
                module.config._is_quantized = True


def plain(quantizer: HfQuantizer) -> bool:
    """Whether a GGUF file's quantizer has unpacked all weights while loading: no packed module is left."""
    return getattr(quantizer, "packed_modules", None) == {}


def detach(model: PreTrainedModel, attention: Any = None) -> None:
    """Leave a model as it was before HeadQ, but for weights that were quantized since and for an ``attention``
    implementation that was set since."""
    quantizer = model.hf_quantizer
    since = quantizer.inner if quantizer.inner is not quantizer.below else None
    quantizer.configs.give_up(model, keep=since is not None or attention is not None)
    if attention is not None:
        model.set_attn_implementation(attention)
    if since is not None:
        mark(model, since)
        return
    for name in MARKS:
        vars(model).pop(name, None)
    vars(model).update(quantizer.before)


def note_weights(model: nn.Module, config: Any) -> None:
    """Let ``save_pretrained`` know how ``quantize_`` has just quantized the weights of a transformers model."""
    if not isinstance(model, PreTrainedModel) or not torchao_weights(model):
        return
    inner = AutoHfQuantizer.from_config(TorchAoConfig(config), pre_quantized=True)
    above = getattr(model, "hf_quantizer", None)
    if isinstance(above, HeadQQuantizer):
        above.set_inner(inner)
        mark(model, above)
    elif above is None or plain(above):
        vars(model).pop("_weight_conversions", None)
        OwnConfigs(model)
        mark(model, inner)
    untie(model)


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
