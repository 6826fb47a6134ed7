"""Files of what a baseline has to train for a model: where they lie, what they are checked against, how one goes on.

A trained file is a safetensors file (:mod:`headq_ao.files`) whose head holds the model's fingerprint, how it was
trained, and where and when.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headq_ao.calibration.artifact import differences
from headq_ao.calibration.observers import RECORDER, AttentionObserver
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment
from headq_ao.files import FileKind
from headq_ao.integrations.transformers.models import execution_device, fingerprint
from headq_ao.integrations.transformers.own_config import OwnConfigs
from headq_ao.integrations.transformers.serving import serving_of
from headq_ao.ops.cpu_build import cache_folder


@dataclass
class Seen(AttentionObserver):
    """What the attention of each layer reads of a text, in half precision.

    Attributes:
        parts: of each layer, ``q [B, Hq, T, D]``, ``k`` and ``v`` ``[B, Hkv, T, D]``, one entry a call.
        queries: whether queries are kept.
        scaling: of the scores, of each layer.
    """

    parts: dict[int, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    queries: bool = True
    scaling: dict[int, float] = field(default_factory=dict)

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
        sinks: Tensor | None = None, softcap: float | None = None,
    ) -> None:  # fmt: skip
        """See :class:`headq_ao.calibration.observers.AttentionObserver`."""
        kept = (q, k, v) if self.queries else (q[:, :, :0], k, v)
        self.parts.setdefault(layer, []).append(tuple(x.detach().half().cpu() for x in kept))
        self.scaling[layer] = scaling

    def layers(self) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor], float]]:
        """Number, ``q``, ``k``, ``v`` of all texts ``[B, H, T, D]``, and the scaling, of each layer."""
        for number in sorted(self.parts):
            q, k, v = (torch.cat(x) for x in zip(*self.parts[number], strict=True))
            yield number, (q, k, v), self.scaling[number]


@torch.no_grad()
def watch(model: PreTrainedModel, rows: Sequence[Tensor], queries: bool, progress: bool) -> Seen:
    """Run a model over texts ``[T]`` of equal length, and keep what its attention reads.

    Raises:
        ValueError: where its attention does not go through transformers' interface.
    """
    serving = serving_of(model)
    if serving.fallback is not None:
        raise ValueError(f"what attention reads cannot be seen here: {serving.fallback}")
    seen, configs = Seen(queries=queries), OwnConfigs(model)
    token = RECORDER.set(seen)
    try:
        model.set_attn_implementation("headq")
        for row in tqdm(rows, desc="read the text", unit="row", disable=not progress):
            model(input_ids=row[None].to(execution_device(model)), use_cache=False)
    finally:
        RECORDER.reset(token)
        configs.put_back(model)
    return seen


@dataclass
class Trained:
    """A trained file in the making: what is done is kept beside it, so that a run that was cut off goes on.

    Args:
        kind: of the file.
        path: of it.
        head: fingerprint and settings; work is taken up again where they are the same.
    """

    kind: FileKind
    path: Path
    head: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)

    @property
    def partial(self) -> Path:
        """What is kept until the file is whole."""
        return self.path.with_name(self.path.name + ".partial")

    def take_up(self) -> None:
        """Go on from what an earlier run of the same head has left."""
        try:
            head, tensors = self.kind.load(self.partial)
        except (FileNotFoundError, ValueError):
            return
        if not differences(self.head["fingerprint"], head["fingerprint"]) and head["settings"] == self.head["settings"]:
            self.tensors, self.done = tensors, list(head["done"])

    def add(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a layer."""
        self.tensors |= {f"{layer}.{name}": t for name, t in tensors.items()}
        self.done.append(layer)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.kind.save(self.partial, self.head | {"done": self.done}, self.tensors)

    def finish(self) -> None:
        """Write the file, and remove what was kept."""
        self.kind.save(self.path, self.head | {"environment": environment()}, self.tensors)
        self.partial.unlink(missing_ok=True)


def new_file(kind: FileKind, model: PreTrainedModel, path: Path | None, settings: Mapping[str, Any]) -> Trained:
    """What an earlier run with those settings has left, or an empty one."""
    identity = fingerprint(model)
    found = Trained(
        kind, default_path(kind, identity) if path is None else path,
        {"fingerprint": identity, "settings": json.loads(json.dumps(settings))},
    )  # fmt: skip
    found.take_up()
    return found


def default_path(kind: FileKind, identity: Mapping[str, Any]) -> Path:
    """Where a model's file lies when nobody names one: a name made of type and shapes, in the cache folder."""
    shapes = {name: x for name, x in identity.items() if name != "weights"}
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_folder() / "baselines" / f"{kind.name.replace(' ', '_')}-{digest}.safetensors"


def of_layer(
    kind: FileKind, path: str | None, identity: Mapping[str, Any] | None, index: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a layer, from a trained file.

    Args:
        kind: of the file.
        path: of it; None: where :func:`default_path` says.
        identity: fingerprint of the model.
        index: of the layer.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is of another kind, version or model, or damaged.
    """
    if identity is None:
        raise ValueError(f"a {kind.name} belongs to a model, and only shapes are known here")
    file = default_path(kind, identity) if path is None else Path(path)
    head, tensors = _loaded(kind, file)
    if wrong := differences(identity, head["fingerprint"]):
        raise ValueError(f"{file.name} was trained on another model: {wrong}; {kind.remedy}")
    start = f"{index}."
    return head["settings"], {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


_files: dict[tuple[str, float], tuple[dict[str, Any], dict[str, Tensor]]] = {}


def _loaded(kind: FileKind, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The file, read and checked once for all layers."""
    key = (str(file.absolute()), file.stat().st_mtime if file.is_file() else 0.0)
    if key not in _files:
        found = kind.load(file)
        _files.clear()
        _files[key] = found
    return _files[key]


def command(parser: argparse.ArgumentParser, what: str, tokens: int) -> argparse.ArgumentParser:
    """The parser of a command ``train``, with what every one asks; ``tokens``: of the text, where nobody says."""
    made = parser.add_subparsers(dest="command", required=True).add_parser("train", help=f"train {what}")
    option = made.add_argument
    option("model", help="'smollm2', 'qwen2.5-coder-0.5b' or a transformers model path")
    option("-o", "--out", type=Path, metavar="FILE", help="default: in the cache folder, where the method looks for it")
    option("--text", default="wikitext", help="'wikitext' (default: its validation split), 'bundled' or a text file")
    option("--seed", type=int, default=0, help="of all that is random (0)")
    option("--threads", type=int, help="CPU threads (PyTorch's default)")
    option("--no-progress", action="store_true", help="no progress bars")
    option("--tokens", type=int, default=tokens, help=f"of the text ({tokens})")
    return made


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, list[Tensor], str]:
    """What those arguments name: the model in fp32, rows of the text ``[T]``, and the text's name."""
    if args.threads:
        torch.set_num_threads(args.threads)
    text = inputs.find_text(args.text, "calibrate")
    model, tokenizer = inputs.load(args.model, None, torch.float32)
    rows = inputs.token_rows(tokenizer, text, args.tokens // inputs.CALIBRATION_ROW, inputs.CALIBRATION_ROW)
    return model, list(rows), text.name
