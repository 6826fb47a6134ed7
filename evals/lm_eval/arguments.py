"""``--model_args`` of the model ``"headq"``: read and checked before a model is loaded."""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from headq_ao.calibration.artifact import Calibration
from headq_ao.config import OLD_NAMES, HeadQConfig, headq_config
from headq_ao.evals.models import smollm2

SMOLLM2 = "smollm2"

# lm-eval's "hf" hands what it does not know to from_pretrained; of that, these are known here.
FROM_PRETRAINED = ("cache_dir", "device_map", "local_files_only", "token", "use_safetensors", "variant")
REFUSED = {
    "autogptq": "its model is no transformers model; load GPTQ weights through transformers",
    "backend": "HeadQ packs the cache of causal LMs only",
    "cache_bytes": "lm-eval says how many sequences share a batch; give mean_bits, which headq estimate --budget names",
    "gptqmodel": "its model is no transformers model; load GPTQ weights through transformers",
    "logits_cache": "requests that share a context share its rows in the cache instead",
    "peft": "an adapter hides the model that HeadQ hooks into; merge it into the weights first",
    "tp_plan": "each process has the whole model; a launcher's processes split the documents instead",
}


class ModelArgumentError(ValueError):
    """A model argument is unknown, does not fit, or names something that is not there."""


@dataclass
class Settings:
    """How requests are scored.

    Args:
        config: of the packed cache; None: the exact cache, fed in the same way.
        calibration_text: a text to calibrate on, or None.
        calibration_tokens: of that text.
        chunk_size: tokens per call once a prompt is in the cache.
        prefill: tokens of a prompt that go in at once, by exact attention, before chunks; None: all but the last, which
            is what ``generate`` does. The last one always goes in with the first chunk, because its query predicts the
            first scored token.
        min_context: tokens that each prompt is filled up to with neutral text in front.
    """

    config: HeadQConfig | None
    calibration_text: Path | None = None
    calibration_tokens: int = 4096
    chunk_size: int = 64
    prefill: int | None = None
    min_context: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the config's fields, a calibration as the meta data that it carries."""
        out = {name: getattr(self, name) for name in ("chunk_size", "prefill", "min_context")}
        out = {"quantized": self.config is not None, **out, "config": None}
        if self.config is not None:
            out["config"] = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
            if isinstance(self.config.calibration, Calibration):
                out["config"]["calibration"] = self.config.calibration.meta
        return out


OWN = tuple(f.name for f in dataclasses.fields(Settings) if f.name not in ("config", "calibration_text"))
CONFIG = tuple(
    f.name for f in dataclasses.fields(HeadQConfig) if f.name not in ("version", "cache_bytes", "batch_size")
)


def hf_names() -> tuple[str, ...]:
    """The arguments of lm-eval's ``"hf"`` model that ``"headq"`` takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in inspect.signature(HFLM.__init__).parameters.values() if p.kind in kinds]
    return tuple(n for n in names if n not in REFUSED and n != "self") + FROM_PRETRAINED


def split_arguments(arguments: dict[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Model arguments as settings and, with short names resolved, as arguments of lm-eval's ``"hf"`` model.

    Args:
        arguments: as lm-eval's command line parses them; ``"none"`` is None and ``-1.0`` is -1.

    Raises:
        ModelArgumentError: on an unknown or unfit argument, or a file that is not there.

    Example:
        >>> from headq_ao.evals.lm_eval.arguments import split_arguments
        >>> settings, hf = split_arguments({"pretrained": "some/model", "v_bits": "none", "chunk_size": 1})
        >>> settings.config.v_bits, settings.chunk_size, hf
        (None, 1, {'pretrained': 'some/model'})
    """
    for name, why in REFUSED.items():
        if arguments.get(name) not in (None, False, "default"):
            raise ModelArgumentError(f"{name} does not go with model=headq: {why}")
    names = hf_names()
    known = {*names, *REFUSED, *OWN, *CONFIG, *OLD_NAMES, "preset", "quantized"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ModelArgumentError(
            f"unknown model argument {', '.join(unknown)}; of the cache there are preset, {', '.join(CONFIG)}; of the "
            f"evaluation quantized, {', '.join(OWN)}; of the model {', '.join(names)}"
        )
    hf = {name: value for name, value in arguments.items() if name in names}
    rest = {name: plain(value) for name, value in arguments.items() if name in known and name not in names}
    own = {name: rest[name] for name in OWN if name in rest}
    options = {name: rest[name] for name in ("preset", *CONFIG, *OLD_NAMES) if name in rest}
    text = options.pop("calibration", None) if is_text(options.get("calibration")) else None
    if "calibration_tokens" in own and text is None:
        raise ModelArgumentError("calibration_tokens goes with calibration=TEXT_FILE")
    check_numbers(own)
    config = make_config(rest.get("quantized", True), options, text)
    if config is not None and plain(hf.get("mixed_precision_dtype")) is not None:
        raise ModelArgumentError(
            "mixed_precision_dtype would cast the cache's own arithmetic too; load the model in that dtype, as in "
            "dtype=bfloat16"
        )
    return Settings(config, None if text is None else Path(text), **own), resolve_model(hf)


def plain(value: Any) -> Any:
    """lm-eval reads ``none`` as text and ``-1`` as a float; here they are None and -1."""
    if isinstance(value, str) and value.lower() == "none":
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_text(calibration: Any) -> bool:
    """Whether a calibration is to be made, on a text file, not loaded."""
    return isinstance(calibration, str) and not calibration.endswith(".safetensors")


def check_numbers(own: dict[str, Any]) -> None:
    """Raise on a number that is none or out of range."""
    for name, value in own.items():
        least = 0 if name == "min_context" else 1
        if name == "prefill" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")


def make_config(quantized: Any, options: dict[str, Any], text: str | None) -> HeadQConfig | None:
    """The cache's config, its calibration loaded; None for the exact cache."""
    if not isinstance(quantized, bool):
        raise ModelArgumentError(f"quantized must be true or false, got {quantized!r}")
    if not quantized:
        if options or text is not None:
            given = ", ".join([*options, *(["calibration"] if text is not None else [])])
            raise ModelArgumentError(f"quantized=false is the exact cache, which has no options; take out {given}")
        return None
    if options.get("k_bits", 2) is None and options.get("v_bits", 2) is None:
        raise ModelArgumentError("k_bits and v_bits are both none; say quantized=false for the exact cache")
    if text is not None and not Path(text).is_file():
        raise ModelArgumentError(
            f"no calibration file {text!r}; give a .safetensors that Calibration.save wrote, or a text file"
        )
    try:
        config = headq_config(**options)
        if isinstance(config.calibration, str):
            config = dataclasses.replace(config, calibration=Calibration.load(config.calibration))
    except (ValueError, FileNotFoundError) as error:
        raise ModelArgumentError(str(error)) from error
    return config


def resolve_model(hf: dict[str, Any]) -> dict[str, Any]:
    """``pretrained=smollm2`` or ``pretrained=file.gguf`` as a folder and ``gguf_file``."""
    name = hf.get("pretrained")
    if name is None:
        raise ModelArgumentError("pretrained is missing; name a model, as in --model_args pretrained=smollm2")
    if not isinstance(name, str):
        return hf
    if name == SMOLLM2:
        try:
            return hf | {"pretrained": str(smollm2.package_folder()), "gguf_file": smollm2.GGUF}
        except ModuleNotFoundError as error:
            raise ModelArgumentError(str(error)) from error
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ModelArgumentError(f"no GGUF file {name!r}")
        return hf | {"pretrained": str(Path(name).parent), "gguf_file": Path(name).name}
    if hf.get("gguf_file") is not None and Path(name).is_dir() and not (Path(name) / hf["gguf_file"]).is_file():
        raise ModelArgumentError(f"{name} has no file {hf['gguf_file']}")
    return hf
