"""KVLinC-like (2510.05373): 2-bit keys per channel and rotated values per token, and a trained linear correction.

Command line: ``python -m headq_ao.evals.baselines.kvlinc train MODEL``.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headq_ao.codecs.registry import LayerContext, register
from headq_ao.codecs.tokenwise import Held, TokenCodec
from headq_ao.evals.baselines import training
from headq_ao.evals.baselines.codecs import Affine, Frame
from headq_ao.evals.baselines.methods import Pair
from headq_ao.files import FileKind

ARGUMENTS = ("key", "residual")
MAPS = {
    argument: FileKind(
        f"kvlinc {argument} maps",
        1,
        f"train it with python -m headq_ao.evals.baselines.kvlinc train MODEL --argument {argument} (--out FILE)",
    )
    for argument in ARGUMENTS
}
FEATURES = 128  # of each of the two softmaxes of a map
GROUP = 128  # tokens of a channel, or coordinates of a token, that share a scale
WINDOW = 128  # newest tokens that training keeps in full precision
STEPS, RATE, TOKENS = 400, 0.01, 16384
QUERIES = 32  # of a block of GROUP positions that a training step looks at
EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.baselines.kvlinc train smollm2
  python -m headq_ao.evals.baselines.kvlinc train path/to/model -o maps.safetensors --text my.txt --argument residual
  python -m headq_ao.evals.perplexity --method kvlinc --set maps=maps.safetensors --set residual_length=128

A run that was cut off goes on with the next layer. The maps belong to the model; the state of a sequence, 256 · (d + 1)
numbers in half precision for each head, is charged to its cache."""


def features(x: Tensor, weight: Tensor) -> Tensor:
    """``φ(x) = [softmax(x W₁); softmax(x W₂)]`` of ``x [.., n, d]`` and ``weight [.., 2, d, F]``: ``[.., n, 2F]``."""
    return (x.unsqueeze(-3) @ weight).softmax(-1).transpose(-3, -2).flatten(-2)


def base(layer: LayerContext, k_bits: int, v_bits: int) -> tuple[Affine, Affine]:
    """Keys per channel over 128 tokens, values per token in a Hadamard basis over at most 128 coordinates."""
    return Affine(k_bits, GROUP, per_channel=True), Affine(v_bits, min(GROUP, layer.shape.head_dim), rotate=True)


class KVLinC(Pair):
    """The base, and for all tokens that it packed one more term of attention, constant in size:

    ``o = (Σ_j exp(s_j) v̂_j + φ_q(q) S) / (Σ_j exp(s_j) + φ_q(q) P)``, ``S = Σ_j φ_k(·)ᵀ v_j``, ``P = Σ_j φ_k(·)``.

    Args:
        layer: its layer.
        keys, values: the base.
        maps: ``query [Hq, 2, D, F]`` and ``key [Hkv, 2, D, F]``.
        argument: what φ_k sees: the ``"key"``, or its ``"residual"`` ``k − k̂``.
    """

    accumulates = True

    def __init__(
        self, layer: LayerContext, keys: Affine, values: Affine, maps: Mapping[str, Tensor], argument: str
    ) -> None:
        super().__init__(layer, keys, values)
        self.argument = argument
        self.fixed = {f"{name}_map": maps[name][None].float() for name in ("query", "key")}

    def state(self, device: torch.device) -> dict[str, Tensor]:
        """See :class:`TokenCodec`."""
        d, heads, f = self.shape.head_dim, self.shape.n_kv_heads, 2 * self.fixed["key_map"].shape[-1]
        return {
            "key.sum": torch.zeros(self.batch, heads, f, dtype=torch.float16, device=device),
            "value.sum": torch.zeros(self.batch, heads, f, d, dtype=torch.float16, device=device),
        }

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """See :class:`TokenCodec`; the tokens are added to the state."""
        coded, x = super().encode(k, v, position), k.float()
        if self.argument == "residual":
            x = x - self.decode_keys(Held(coded, position))
        phi = features(x, self.fixed["key_map"]) * (position >= 0)[:, None, :, None]
        for name, more in (("key.sum", phi.sum(2)), ("value.sum", phi.mT @ v.float())):
            held = self.own[name]
            held.copy_(held.float() + more)
        return coded

    def extra(self, q: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :class:`TokenCodec`."""
        heads = self.shape.n_kv_heads
        weight = self.fixed["query_map"].unflatten(1, (heads, -1)).to(q.dtype)
        phi = features(q, weight)
        mass = (phi @ self.own["key.sum"].to(q.dtype)[:, :, None, :, None]).squeeze(-1)
        out = phi @ self.own["value.sum"].to(q.dtype)[:, :, None]
        return out / mass.clamp(min=1e-30).unsqueeze(-1), mass.log()


@register("kvlinc_base")
def kvlinc_base(layer: LayerContext, *, k_bits: int = 2, v_bits: int = 2) -> TokenCodec:
    """KVLinC without its correction."""
    return Pair(layer, *base(layer, k_bits, v_bits))


@register("kvlinc")
def kvlinc(
    layer: LayerContext, *, argument: Literal["key", "residual"] = "key", maps: str | None = None, k_bits: int = 2,
    v_bits: int = 2,
) -> TokenCodec:  # fmt: skip
    """The base with its trained correction, of the file ``maps``; None: the one in the cache folder."""
    if argument not in ARGUMENTS:
        raise ValueError(f"argument must be 'key' or 'residual', got {argument!r}")
    _, tensors = training.of_layer(MAPS[argument], maps, layer.fingerprint, layer.index)
    return KVLinC(layer, *base(layer, k_bits, v_bits), tensors, argument)


@dataclass(frozen=True)
class Blocks:
    """Attention of one text with the base alone, at some queries of each block of 128 positions.

    Attributes:
        q: scaled queries ``[Hkv, G, blocks, n, D]``.
        top: the highest score of each ``[Hkv, G, blocks, n]``.
        weighted, mass: ``Σ exp(s − top) v̂`` and ``Σ exp(s − top)`` over what is packed at that block and the window.
        wanted: exact attention ``[Hkv, G, blocks, n, D]``.
        seen: what φ_k sees of the packed tokens ``[Hkv, blocks, 128, D]``.
        v: their values.
    """

    q: Tensor
    top: Tensor
    weighted: Tensor
    mass: Tensor
    wanted: Tensor
    seen: Tensor
    v: Tensor

    def loss(self, of_q: Tensor, of_k: Tensor) -> Tensor:
        """Squared error of the corrected output over the energy of the exact one; maps as in :class:`KVLinC`."""
        phi = features(self.q.flatten(2, 3), of_q.unflatten(0, self.q.shape[:2])).unflatten(2, self.q.shape[2:4])
        keys = features(self.seen.flatten(1, 2), of_k).unflatten(1, self.seen.shape[1:3])
        share = (-self.top).exp()[..., None]
        of_v, of_one = (keys.mT @ self.v).cumsum(1), keys.sum(2).cumsum(1)[..., None]
        weighted = self.weighted + share * (phi @ of_v[:, None])
        out = weighted / (self.mass[..., None] + share * (phi @ of_one[:, None]))
        error: Tensor = (out - self.wanted).square().sum() / self.wanted.square().sum()
        return error


def blocks(q: Tensor, k: Tensor, v: Tensor, scaling: float, n_sink: int, argument: str, seed: int) -> Blocks:
    """Of one text, ``q [Hq, T, D]``, ``k`` and ``v`` ``[Hkv, T, D]``.

    Raises:
        ValueError: where it is too short for a packed group and a window.
    """
    heads, t, d = k.shape
    count = (t - n_sink - WINDOW) // GROUP
    if count < 1:
        raise ValueError(f"texts must have at least {n_sink + WINDOW + GROUP} tokens, got {t}")
    q, body = q.unflatten(0, (heads, -1)) * scaling, slice(n_sink, n_sink + count * GROUP)
    sides = Affine(2, GROUP, per_channel=True), Affine(2, min(GROUP, d), rotate=True)
    near = [k.clone(), v.clone()]
    for x, codec in zip(near, sides, strict=True):
        x[:, body] = codec.decode(codec.encode(x[None, :, body], Frame()), Frame())[0]
    generator, at = torch.Generator().manual_seed(seed), torch.arange(t)
    parts: list[tuple[Tensor, ...]] = []
    for end in range(n_sink + GROUP, n_sink + count * GROUP + 1, GROUP):
        first = end + WINDOW - 1
        at_q = (first + torch.randperm(min(GROUP, t - first), generator=generator)[:QUERIES]).sort().values
        mine, later = q[:, :, at_q], at > at_q[:, None]
        exact = (mine @ k[:, None].mT).masked_fill(later, float("-inf")).softmax(-1) @ v[:, None]
        packed = at < end
        packed[:n_sink] = False
        k_hat, v_hat = (torch.where(packed[:, None], x_hat, x) for x_hat, x in zip(near, (k, v), strict=True))
        s = (mine @ k_hat[:, None].mT).masked_fill(later, float("-inf"))
        top = s.amax(-1)
        a = (s - top[..., None]).exp()
        parts.append((mine, top, a @ v_hat[:, None], a.sum(-1), exact))
    few = min(p[0].shape[2] for p in parts)
    stacked = [torch.stack([x[:, :, :few] for x in xs], 2) for xs in zip(*parts, strict=True)]
    seen = k[:, body] - near[0][:, body] if argument == "residual" else k[:, body]
    return Blocks(*stacked, *(x.unflatten(1, (-1, GROUP)) for x in (seen, v[:, body])))


def distil(texts: Sequence[Blocks], steps: int, seed: int) -> tuple[dict[str, Tensor], tuple[float, float, float]]:
    """Maps of a layer, and on the last text, which is left out of the training where there are several, the loss
    without them, with the first ones and with the last."""
    heads, group, d = texts[0].q.shape[0], texts[0].q.shape[1], texts[0].q.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    of_q = torch.randn(heads * group, 2, d, FEATURES, generator=generator)
    of_k = torch.randn(heads, 2, d, FEATURES, generator=generator) / d**0.5
    weights = [of_q.requires_grad_(), of_k.requires_grad_()]
    optimizer = torch.optim.Adam(weights, RATE)

    last, texts = texts[-1], texts[:-1] or texts

    def held_out() -> float:
        with torch.no_grad():
            return float(last.loss(of_q, of_k))

    alone = (last.weighted / last.mass[..., None] - last.wanted).square().sum() / last.wanted.square().sum()
    first = held_out()
    with torch.enable_grad():
        for step in range(steps):
            loss = texts[step % len(texts)].loss(of_q, of_k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    made = {"query": of_q.detach().half(), "key": of_k.detach().half()}
    return made, (float(alone), first, held_out())


def train(
    model: PreTrainedModel, rows: Sequence[Tensor], *, out: Any = None, argument: str = "key", steps: int = STEPS,
    seed: int = 0, n_sink: int = 4, progress: bool = True, source: str | None = None,
) -> training.Trained:  # fmt: skip
    """Train the maps of all layers on texts ``[T]``, the model frozen, and write them.

    Raises:
        ValueError: on a model without an attention that can be watched, texts that are too short, or another argument.
    """
    if argument not in ARGUMENTS:
        raise ValueError(f"argument must be 'key' or 'residual', got {argument!r}")
    tokens = sum(map(len, rows))
    settings = {"argument": argument, "steps": steps, "rate": RATE, "tokens": tokens, "seed": seed, "source": source}
    file = training.new_file(MAPS[argument], model, out, settings)
    seen = training.watch(model, rows, True, progress)
    bar = tqdm(seen.layers(), desc="train", unit="layer", total=len(seen.parts), disable=not progress)
    for number, tensors, scaling in bar:
        if number in file.done:
            continue
        texts = [blocks(q, k, v, scaling, n_sink, argument, seed) for q, k, v in _texts(tensors)]
        made, losses = distil(texts, steps, seed)
        bar.set_postfix_str("error {:.4f} without, {:.4f} then {:.4f} with".format(*losses))
        file.add(number, made | {"losses": torch.tensor(losses)})
    file.finish()
    return file


def _texts(tensors: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``q``, ``k``, ``v`` of each text, fp32."""
    for q, k, v in zip(*tensors, strict=True):
        yield q.float(), k.float(), v.float()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.baselines.kvlinc",
        description="Train the feature maps of --method kvlinc for a model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_ = training.command(parser, "the maps", TOKENS)
    train_.add_argument("--argument", choices=ARGUMENTS, default="key", help="what the map of keys sees (key)")
    train_.add_argument("--steps", type=int, default=STEPS, help=f"of Adam, for each layer ({STEPS})")
    args = parser.parse_args(argv)
    model, rows, source = training.load(args)
    file = train(
        model, rows, out=args.out, argument=args.argument, steps=args.steps, seed=args.seed,
        progress=not args.no_progress, source=source,
    )  # fmt: skip
    losses = torch.stack([t for name, t in file.tensors.items() if name.endswith(".losses")]).mean(0).tolist()
    print("error of a text left out: {:.4f} without, {:.4f} then {:.4f} with the maps".format(*losses), file=sys.stderr)
    print(f"written: {file.path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
