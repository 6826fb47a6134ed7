"""How far codes are from what any code could do: ``python -m headq_ao.evals.rate_distortion --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import Calibration, HeadQConfig, headq_config
from headq_ao.calibration.bit_allocation import head_bits
from headq_ao.codecs.layer_codec import key_codec, value_codec
from headq_ao.codecs.linalg import eigh
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.table import text_table
from headq_ao.integrations.transformers.calibrate import layer_frames
from headq_ao.integrations.transformers.serving import serving_of
from headq_ao.layer_shape import LayerShape

RESULT = Path(__file__).resolve().parents[1] / "recipes" / "results" / "rate_distortion" / "smollm2.json"
PRESETS = ("balanced", "quality", "near_lossless")
SIDES = ("keys", "values")
N_SINK = HeadQConfig().n_sink
HEADER = ("preset", "side", "code bits", "beyond the bound", "least and most of a layer", "with the scale")
EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.rate_distortion
  python -m headq_ao.evals.rate_distortion --text bundled --rows 2 --json rates.json

Keys and values of text that the calibration has not seen are coded, and their errors taken in the metric that
codes are chosen in. Gaussian tokens with the covariance of that text would need R(D) bits a coordinate for so small
an error, whatever the code (reverse water-filling). Shown is what is spent beyond that, without and with the scale of
each token.
"""


def bound(eigenvalues: Tensor, distortion: float) -> float:
    """``R(D)`` in bits a coordinate, of Gaussian tokens whose covariance has these eigenvalues in the error's metric.

    Reverse water-filling: ``Σ min(θ, λ_i) = D``, ``R = ½ Σ log₂ max(λ_i / θ, 1)`` (Cover and Thomas, ch. 10).

    Example:
        >>> import torch
        >>> from headq_ao.evals.rate_distortion import bound
        >>> bound(torch.ones(4), 4 / 16)  # a sixteenth of the energy: two bits
        2.0
        >>> round(bound(torch.tensor([4.0, 1e-9]), 1.0), 4)  # one coordinate has it all
        0.5
    """
    values = eigenvalues.double().clamp(min=0).sort().values
    below = values.cumsum(0) - values  # what those that are drowned leave
    level = (distortion - below) / torch.arange(len(values), 0, -1, dtype=torch.float64)
    drowned = int((values < level).sum())
    if drowned == len(values):
        return 0.0
    water = level[drowned]
    return float(0.5 * (values[drowned:] / water).log2().sum() / len(values))


def measured(x: Tensor, codec: Any, side: str, bits: int) -> dict[str, Any]:
    """One head's rows ``[T, D]``, coded: bits spent, with the scale and without, and the bound for their error."""
    rows = x[None, None]
    found = codec.quantize(rows, True) if side == "keys" else codec.quantize(rows)
    error = (codec.dequantize(*found) - rows)[0, 0]
    encode, hessian = (t[0, 0].float() for t in (codec.encode, codec.hessian))
    if codec.unit is not None:
        error, x = error / codec.unit[0, 0], x / codec.unit[0, 0]
    error, y = error @ encode, x @ encode
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * hessian.diagonal().mean() * torch.eye(len(hessian)))
    shown = (y - y.mean(0)).double() @ root
    eigenvalues = eigh(shown.T @ shown / len(shown))[0]
    distortion = float((error.double() @ root).square().sum(1).mean())
    width = len(hessian)
    return {
        "bits": bits,
        "with_scale": bits + codec.scale_bits / width,
        "bound": bound(eigenvalues, distortion),
        "error": distortion / float(eigenvalues.sum()),
    }


@torch.no_grad()
def states(model: Any, rows: Tensor, n_sink: int) -> list[tuple[Tensor, Tensor]]:
    """Keys, in the frame that they are coded in, and values ``[Hkv, T, D]`` of each layer: all rows, without sinks."""
    caches = [model(input_ids=row[None], use_cache=True, logits_to_keep=1).past_key_values for row in rows]
    found = []
    for i, frame in enumerate(layer_frames(model, serving_of(model))):
        parts = []
        for k, v in ((cache.layers[i].keys, cache.layers[i].values) for cache in caches):
            k = k if frame is None else frame.into(k, frame.along(k.shape[2], n_sink, k.device))
            parts.append((k[0, :, n_sink:].float(), v[0, :, n_sink:].float()))
        k, v = (torch.cat(side, 1) for side in zip(*parts, strict=True))
        found.append((k, v))
    return found


def measure(
    shapes: Sequence[LayerShape], seen: Sequence[tuple[Tensor, Tensor]], config: HeadQConfig, calibration: Calibration
) -> list[dict[str, Any]]:
    """What :func:`measured` gives, of each layer, side and head, for the :func:`states` of a model of these layers."""
    of_heads = head_bits(config, calibration, shapes)
    found = []
    for i, (moments, bits) in enumerate(zip(calibration.layers, of_heads, strict=True)):
        codecs = key_codec(config, moments, bits.k), value_codec(config, shapes[i], moments).with_bits(bits.v)
        for side, codec, x, widths in zip(SIDES, codecs, seen[i], (bits.k, bits.v), strict=True):
            for h, b in enumerate(widths):
                one = measured(x[h], codec.part(slice(h, h + 1)), side, b)
                found.append({"layer": i, "side": side, "head": h} | one)
    return found


def distances(found: Sequence[dict[str, Any]], side: str, spent: str = "bits") -> list[float]:
    """By layer, the mean over heads of the bits spent beyond the bound."""
    layers = sorted({entry["layer"] for entry in found})
    of = [[e[spent] - e["bound"] for e in found if e["layer"] == i and e["side"] == side] for i in layers]
    return [sum(x) / len(x) for x in of]


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """One for each preset and side, under :data:`HEADER`."""
    rows = []
    for preset, found in result["presets"].items():
        for side in SIDES:
            codes, whole = distances(found, side), distances(found, side, "with_scale")
            bits = [e["bits"] for e in found if e["side"] == side]
            mean = sum(codes) / len(codes)
            span = f"{min(codes):.2f}, {max(codes):.2f}"
            spent = f"{sum(bits) / len(bits):.2f}"
            rows.append([preset, side, spent, f"{mean:.2f}", span, f"{sum(whole) / len(whole):.2f}"])
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.rate_distortion",
        description="Bits between HeadQ's codes and the Gaussian rate-distortion bound, by layer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=inputs.SMOLLM2, help="'smollm2', 'qwen2.5-coder-0.5b' or what transformers loads (smollm2)")
    add("--text", default="wikitext", help="'wikitext' or 'bundled': its calibration's and its held-out part")
    add("--wikitext", metavar="FOLDER", help="with wiki.valid.raw and wiki.test.raw (HEADQ_WIKITEXT)")
    add("--rows", type=int, default=4, help="of 1024 tokens of held-out text (4)")
    add("--calibration-tokens", type=int, default=4096, help="(4096)")
    add("--json", type=Path, default=RESULT, help="the result (recipes/results/rate_distortion/smollm2.json)")
    add("--threads", type=int, help="CPU threads (PyTorch's default)")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error(f"--rows must be at least 1, got {args.rows}")
    try:
        text = inputs.find_text(args.text, "report", args.wikitext)
        learnt = inputs.find_text(args.text, "calibrate", args.wikitext)
        if learnt.resolve() == text.resolve():
            raise ValueError(f"--text {args.text} has no part of its own to calibrate on; give 'wikitext' or 'bundled'")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = inputs.load(args.model, None, torch.float32)
    calibration = inputs.calibrate_on(model, tokenizer, learnt, args.calibration_tokens, not args.no_progress)
    rows = inputs.token_rows(tokenizer, text, args.rows, inputs.CALIBRATION_ROW)
    shapes, seen = serving_of(model).shapes, states(model, rows, N_SINK)
    presets = {
        name: measure(shapes, seen, headq_config(preset=name), calibration)
        for name in tqdm(PRESETS, desc="presets", unit="preset", disable=args.no_progress)
    }
    protocol = {"text": text.name, "rows": args.rows, "row_length": inputs.CALIBRATION_ROW, "calibration": learnt.name}
    result = {"model": args.model, "protocol": protocol, "presets": presets, "environment": environment()}
    write_json(args.json, result)
    print(text_table(HEADER, table_rows(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
