"""What a vLLM engine is told about HeadQ, and the codecs of its layers.

``--additional-config '{"headq": {"calibration": FILE, "preset": NAME, ...}}'``, with any option of
:func:`headq_ao.headq_config`, or the environment variable ``HEADQ_CALIBRATION``; a checkpoint that was saved with a
calibration needs neither.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from headq_ao.calibration.artifact import Calibration
from headq_ao.calibration.bit_allocation import head_bits
from headq_ao.calibration.rope import rotation_of
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.planes import PlaneCodec
from headq_ao.codecs.rotation import POSITIONS, Rotation
from headq_ao.config import HeadQConfig, headq_config
from headq_ao.integrations.config_only.shapes import config_fingerprint, layer_shapes, text_config
from headq_ao.integrations.transformers.hf_quantizer import METHOD, HeadQQuantizationConfig, read_calibration
from headq_ao.integrations.transformers.models import (
    attention_modules,
    cached_checkpoint,
    meta_model,
    rotary_embedding,
)
from headq_ao.layer_shape import LayerShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VARIABLE = "HEADQ_CALIBRATION"
UNIT = 32  # tokens that no page cuts
WINDOW = "window"  # the name that engines give to residual_length
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
HOW = (
    f'name one of this model by --additional-config \'{{"headq": {{"calibration": FILE}}}}\' or {VARIABLE}=FILE; '
    "`headq calibrate MODEL -o FILE` makes it, and a checkpoint that save_pretrained wrote from a calibrated model has "
    "its own"
)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class Settings:
    """HeadQ in one engine: a config with its calibration, and the shapes and bits of the model's layers."""

    config: HeadQConfig
    calibration: Calibration
    shapes: tuple[LayerShape, ...]
    bits: tuple[Any, ...]
    rotations: tuple[Rotation | None, ...]
    positions: int

    def codec(self, layer: int, rank: int, size: int) -> PlaneCodec:
        """The codec of a layer's KV heads on one of ``size`` tensor-parallel ranks."""
        shape = self.shapes[layer]
        if shape.n_kv_heads % size:
            raise ValueError(
                f"HeadQ cannot divide {shape.n_kv_heads} KV heads among {size} tensor-parallel ranks; use a size that "
                "divides them"
            )
        codec = self._part(layer, rank, size)
        codec.put_together()
        return codec

    def _part(self, layer: int, rank: int, size: int) -> PlaneCodec:
        held = self.shapes[layer].n_kv_heads // size
        return dataclasses.replace(self._start(layer, slice(rank * held, (rank + 1) * held)), kv_heads=held)

    def _start(self, layer: int, heads: slice) -> PlaneCodec:
        return LayerCodec(
            self.config, self.shapes[layer], self.calibration.layers[layer], torch.device("cpu"), heads=heads,
            bits=self.bits[layer], rotation=self.rotations[layer], positions=self.positions,
        ).start(1, torch.float32)  # fmt: skip

    def page_bytes(self, codec: PlaneCodec, layer: int, rank: int, size: int, tokens: int, dtype: torch.dtype) -> int:
        """What a page of ``tokens`` of a layer takes, sinks of that dtype included: on the one of ``size`` ranks whose
        heads have the most bits, for an engine's pages are of one size on all of them; ``codec``: of this rank."""
        others = (self._part(layer, other, size) for other in range(size) if other != rank)
        return max(c.layout(tokens).bytes_of_page(self.config.n_sink, dtype) for c in (codec, *others))

    def bytes_of_token(self) -> float:
        """What a packed token takes in all layers, its codes and scales."""
        pages = (self._start(i, slice(None)).layout(UNIT) for i in range(len(self.shapes)))
        return sum(page.bytes_of_page(0, torch.float32) for page in pages) / UNIT


def layer_number(name: str) -> int:
    """The number of an attention layer from the name that vLLM gives it.

    Raises:
        ValueError: where the name has none.
    """
    found = LAYER.search(name)
    if found is None:
        raise ValueError(f"HeadQ cannot tell which layer of the model {name!r} is")
    return int(found[1])


def settings(vllm_config: "VllmConfig") -> Settings:
    """The settings of an engine, read once.

    Raises:
        ValueError: where there is no calibration, it is of another model, or an option is none.
        FileNotFoundError: where a named file does not exist.
    """
    model = vllm_config.model_config
    given = (getattr(vllm_config, "additional_config", None) or {}).get("headq", {})
    if not isinstance(given, dict):
        raise ValueError(f"additional_config['headq'] must be an object of options, got {given!r}")
    return _settings(json.dumps(given, sort_keys=True), os.environ.get(VARIABLE), _Hashed(model))


class _Hashed:
    """A model config as an argument of a cached function: the same for the same checkpoint."""

    def __init__(self, model_config: Any) -> None:
        self.model_config = model_config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and other.model_config.model == self.model_config.model

    def __hash__(self) -> int:
        return hash(self.model_config.model)


@functools.lru_cache(maxsize=8)
def _settings(given: str, variable: str | None, model: _Hashed) -> Settings:
    options = json.loads(given)
    folder = _folder(str(model.model_config.model), getattr(model.model_config, "revision", None))
    saved, config = _of_checkpoint(folder, model.model_config.hf_config)
    if WINDOW in options:
        options["residual_length"] = options.pop(WINDOW)
    calibration = options.pop("calibration", None) or variable or saved
    if calibration is None:
        raise ValueError(f"HeadQ's attention backend needs a calibration; {HOW}")
    known = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
    if options or config is None:
        config = headq_config(options.pop("preset", None), **options)
    config = dataclasses.replace(config, calibration=known)
    shapes = _checked(config, known, model.model_config, folder)
    hf_config = model.model_config.hf_config
    rotations = _rotations(hf_config, shapes) if any(x.segment_tokens for x in known.layers) else (None,) * len(shapes)
    most = getattr(text_config(hf_config), "max_position_embeddings", None) or POSITIONS
    return Settings(config, known, shapes, tuple(head_bits(config, known, shapes)), rotations, most)


def _folder(model: str, revision: str | None) -> Path | None:
    """Where a model's files lie: a folder, or the hub's cache; None where they are not on this machine yet."""
    if Path(model).is_dir():
        return Path(model)
    return cached_checkpoint(model, revision)


def _of_checkpoint(folder: Path | None, hf_config: Any) -> tuple[Calibration | None, HeadQConfig | None]:
    """The calibration and config that a checkpoint was saved with."""
    saved = getattr(hf_config, "quantization_config", None)
    saved = saved if isinstance(saved, dict) or saved is None else saved.to_dict()
    if not saved or saved.get("quant_method") != METHOD:
        return None, None
    config = HeadQQuantizationConfig.from_dict(saved).config
    files = [] if folder is None else sorted(str(f) for f in folder.glob("*.safetensors"))
    return read_calibration(files) if saved.get("calibrated") and files else None, config


def _checked(config: HeadQConfig, known: Calibration, model_config: Any, folder: Path | None) -> tuple[LayerShape, ...]:
    """The shapes of the model's layers, once everything fits.

    Raises:
        ValueError: naming what does not.
    """
    problems = {
        "codec": config.codec is not None,
        "adapt": config.adapt != "off",
        "cache_bytes (vLLM shares out its memory itself)": config.cache_bytes is not None,
        "k_bits=None or v_bits=None": config.k_bits is None or config.v_bits is None,
    }
    wrong = [name for name, is_given in problems.items() if is_given]
    if wrong:
        raise ValueError(
            f"vLLM serves HeadQ's own calibrated codec with both sides packed; leave out {', '.join(wrong)}"
        )
    shapes = tuple(layer_shapes(model_config.hf_config))
    if any(shape.chunked for shape in shapes):
        raise ValueError(f"{model_config.hf_config.model_type}: vLLM serves no layers of chunked attention with HeadQ")
    known.check_model(config_fingerprint(model_config.hf_config, shapes) | _weights(folder))
    if not known.suffices:
        raise ValueError(f"{known.shortage()}: vLLM serves no uncalibrated cache")
    return shapes


def _rotations(hf_config: Any, shapes: Sequence[LayerShape]) -> tuple[Rotation | None, ...]:
    """How each layer turns its keys with their position: of transformers' own model, without its weights."""
    model = meta_model(hf_config)
    made = rotary_embedding(model)
    embedding = None if made is None else type(made)(made.config)
    modules = attention_modules(model, len(shapes))
    return tuple(rotation_of(embedding, module, shape) for module, shape in zip(modules, shapes, strict=True))


def _weights(folder: Path | None) -> dict[str, Any]:
    """What tells the weights of a checkpoint from those of another, as
    :func:`headq_ao.integrations.transformers.models.fingerprint` does; nothing where no file shows it."""
    for file in [] if folder is None else sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118, not a dict
                if name.endswith(EMBEDDINGS):
                    rows = f.get_slice(name)
                    count = rows.get_shape()[0] // 16
                    parts = [rows[i * count : i * count + min(count, 64)] for i in range(16)]
                    if all(x.is_floating_point() for x in parts):
                        return {"weights": [float(x.float().square().mean().sqrt()) for x in parts]}
    return {}
