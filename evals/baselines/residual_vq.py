"""Residual vector quantization of keys before RoPE and of values (2410.15704), and the training of its codebooks.

Command line: ``python -m headq_ao.evals.baselines.residual_vq train MODEL``.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headq_ao.calibration.rope import rotation_of
from headq_ao.codecs.registry import LayerContext, register
from headq_ao.codecs.rotation import Rotation
from headq_ao.codecs.tokenwise import Form, Held, TokenCodec
from headq_ao.evals.baselines import training
from headq_ao.evals.baselines.bitstream import pack_stream, stream_bytes, unpack_stream
from headq_ao.files import FileKind
from headq_ao.integrations.transformers.models import rotary_embedding
from headq_ao.integrations.transformers.serving import serving_of

CODEBOOKS = FileKind(
    "residual vq", 1, "train it with python -m headq_ao.evals.baselines.residual_vq train MODEL (--out FILE)"
)
WIDTH = 32  # coordinates that are coded together
ENTRIES = 2048  # of a codebook
BOOKS = 8
DECAY = 0.99
STARTS, START_SAMPLES = 4, 16384  # rounds of k-means, and on how many of the samples
BATCH = 256  # samples of one step of the moving averages, which see each sample once
TILE = 1024  # vectors that are compared with a codebook at a time: their distances stay in a processor's cache
MOST_SAMPLES = 100_000
EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.baselines.residual_vq train smollm2
  python -m headq_ao.evals.baselines.residual_vq train path/to/model -o books.safetensors --text my.txt
  python -m headq_ao.evals.perplexity --method residual_vq --set books=6 --set codebooks=books.safetensors

A run that was cut off goes on with the next layer. The codebooks belong to the model and are not charged to a cache:
2 · 8 · 2048 · 32 numbers a layer."""


def vectors(x: Tensor, strided: bool) -> Tensor:
    """Tokens ``[.., D]`` as ``[.., D / 32, 32]``: every (D / 32)-th coordinate together, or neighbours."""
    found: Tensor = x.unflatten(-1, (WIDTH, -1)).mT if strided else x.unflatten(-1, (-1, WIDTH))
    return found


def tokens(x: Tensor, strided: bool) -> Tensor:
    """:func:`vectors`, undone."""
    return x.mT.flatten(-2) if strided else x.flatten(-2)


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Of vectors ``[n, w]``, the numbers of the nearest of ``book [entries, w]``, int64."""
    half = book.square().sum(-1) / 2
    return torch.cat([torch.addmm(half, part, book.T, alpha=-1).min(1).indices for part in x.split(TILE)])


def encode(x: Tensor, books: Tensor) -> Tensor:
    """Numbers ``[.., K]`` of the entries of ``books [K, entries, w]`` that together come near ``x [.., w]``: each is
    the nearest to what those before have left."""
    rest, found = x.reshape(-1, x.shape[-1]), []
    for book in books:
        found.append(nearest(rest, book))
        rest = rest - book[found[-1]]
    return torch.stack(found, -1).view(*x.shape[:-1], len(books))


def decode(codes: Tensor, books: Tensor) -> Tensor:
    """``Σ_i books[i, codes_i]``, ``[.., w]``."""
    return sum((book[codes[..., i]] for i, book in enumerate(books)), codes.new_zeros((), dtype=books.dtype))


class ResidualVQ(TokenCodec):
    """Each token over its standard deviation, in groups of 32 coordinates, each the sum of an entry of every codebook.

    Keys are coded as they were before RoPE and rotated when they are read: ``k̂ = R_p σ Σ_i book_i[c_i]``.

    Args:
        layer: its layer.
        keys, values: codebooks ``[K, entries, 32]``; no values: they stay in full precision.

    Raises:
        ValueError: where groups of 32 do not make up a head.
    """

    def __init__(self, layer: LayerContext, keys: Tensor, values: Tensor | None) -> None:
        if layer.shape.head_dim % WIDTH or layer.shape.dims[0] != layer.shape.dims[1]:
            raise ValueError(f"groups of {WIDTH} coordinates must make up a head, got head_dim {layer.shape.head_dim}")
        self.rotation = layer.rotation
        self.bits = max(math.ceil(math.log2(keys.shape[1])), 1)
        books = {"key_books": keys, "value_books": values}
        self.fixed = {name: t[None].float() for name, t in books.items() if t is not None}

    @property
    def count(self) -> int:
        """Codes of a token."""
        return self.shape.head_dim // WIDTH * self.fixed["key_books"].shape[1]

    def forms(self) -> dict[str, Form]:
        """See :class:`TokenCodec`."""
        size, found = stream_bytes(self.count, self.bits), dict[str, Form]()
        for side in ("key", "value"):
            if f"{side}_books" in self.fixed:
                found[f"{side}.codes"] = Form(side, (size,), torch.uint8)
                found[f"{side}.scale"] = Form(side, (), torch.float16)
            else:
                found[f"{side}.exact"] = Form(side, (self.shape.head_dim,))
        return found

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """See :class:`TokenCodec`."""
        k = k.float() if self.rotation is None else self.rotation.at(k.float(), -position)
        found: dict[str, Tensor] = {}
        for side, x in (("key", k), ("value", v.float())):
            if f"{side}_books" not in self.fixed:
                found[f"{side}.exact"] = v
                continue
            scale = x.std(-1, correction=0).half()
            y = vectors(x / scale.float().clamp(min=1e-6)[..., None], side == "key")
            codes = encode(y, self.fixed[f"{side}_books"][0])
            found |= {f"{side}.codes": pack_stream(codes.flatten(-2), self.bits), f"{side}.scale": scale}
        return found

    def _decoded(self, side: str, held: Held) -> Tensor:
        books = self.fixed[f"{side}_books"][0]
        codes = unpack_stream(held[f"{side}.codes"], self.bits, self.count).unflatten(-1, (-1, len(books)))
        return tokens(decode(codes, books), side == "key") * held[f"{side}.scale"].float()[..., None]

    def decode_keys(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        k = self._decoded("key", held)
        return k if self.rotation is None else self.rotation.at(k, held.position)

    def decode_values(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._decoded("value", held) if "value_books" in self.fixed else held["value.exact"].float()


@register("residual_vq")
def residual_vq(
    layer: LayerContext, *, books: int = BOOKS, codebooks: str | None = None, values: bool = True
) -> TokenCodec:
    """The first ``books`` of a model's codebooks, of the file ``codebooks``; None: the one in the cache folder.
    Without ``values`` these stay in full precision."""
    settings, tensors = training.of_layer(CODEBOOKS, codebooks, layer.fingerprint, layer.index)
    if not 1 <= books <= settings["books"]:
        raise ValueError(f"books must be 1 to the {settings['books']} that were trained, got {books}")
    return ResidualVQ(layer, tensors["key"][:books], tensors["value"][:books] if values else None)


def k_means(x: Tensor, entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``entries`` centres ``[entries, w]`` of samples ``x [n, w]``, and how many samples are near to each; those that
    nothing is near to go to a sample."""
    centres = x[torch.randperm(len(x), generator=generator)[:entries]]
    for _ in range(STARTS):
        at = nearest(x, centres)
        count = torch.bincount(at, minlength=entries)
        total = torch.zeros_like(centres).index_add_(0, at, x)
        others = x[torch.randint(len(x), (entries,), generator=generator)]
        centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], others)
    return centres, count


def moving_average(x: Tensor, centres: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Centres after a pass over the samples in which each follows those near to it: ``n ← γ n + (1 − γ) n'``,
    ``s ← γ s + (1 − γ) s'``, ``c = s / n``; ``count``: samples that were near to each before."""
    share = count.float() * (BATCH / count.sum())
    total = centres * share[:, None]
    for batch in x[torch.randperm(len(x), generator=generator)].split(BATCH):
        at = nearest(batch, centres)
        share = torch.lerp(torch.bincount(at, minlength=len(centres)).float(), share, DECAY)
        total = torch.lerp(torch.zeros_like(total).index_add_(0, at, batch), total, DECAY)
        centres = torch.where(share[:, None] > 1e-3, total / share.clamp(min=1e-3)[:, None], centres)
    return centres


def fit(x: Tensor, books: int, entries: int, seed: int) -> Tensor:
    """Codebooks ``[K, entries, w]`` of samples ``x [n, w]``, one after the other, each of what those before leave.

    Raises:
        ValueError: where there are fewer samples than entries.
    """
    if len(x) < entries:
        raise ValueError(f"{entries} entries need as many samples, got {len(x)}; train on more text")
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(books):
        start = k_means(x[: max(START_SAMPLES, entries)], entries, generator)
        book = moving_average(x, *start, generator).half().float()
        found.append(book)
        x = x - book[nearest(x, book)]
    return torch.stack(found)


def samples(x: Tensor, strided: bool, seed: int) -> Tensor:
    """Vectors ``[n, 32]`` of tokens ``[.., D]``, each over its standard deviation."""
    x = x.float().flatten(0, -2)
    x = vectors(x / x.std(-1, correction=0).half().float().clamp(min=1e-6)[:, None], strided).flatten(0, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:MOST_SAMPLES]]


def train(
    model: PreTrainedModel, rows: Sequence[Tensor], *, out: Any = None, books: int = BOOKS, entries: int = ENTRIES,
    seed: int = 0, n_sink: int = 4, progress: bool = True, source: str | None = None,
) -> training.Trained:  # fmt: skip
    """Train the codebooks of all layers on texts ``[T]``, and write them.

    Raises:
        ValueError: on a model without an attention that can be watched, or too little text.
    """
    settings = {"books": books, "entries": entries, "tokens": sum(map(len, rows)), "seed": seed, "source": source}
    file = training.new_file(CODEBOOKS, model, out, settings)
    serving, embedding = serving_of(model), rotary_embedding(model)
    seen = training.watch(model, rows, False, progress)
    for number, (_, k, v), _ in tqdm(
        seen.layers(), desc="train", unit="layer", total=len(seen.parts), disable=not progress
    ):
        if number in file.done:
            continue
        rotation: Rotation | None = rotation_of(embedding, serving.modules[number], serving.shapes[number])
        k = k.float()
        if rotation is not None:
            k = rotation.at(k, -torch.arange(k.shape[2]).expand(len(k), -1))
        sides = (("key", k, True), ("value", v, False))
        made = {n: fit(samples(x[:, :, n_sink:], s, seed), books, entries, seed) for n, x, s in sides}
        file.add(number, {name: book.half() for name, book in made.items()})
    file.finish()
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.baselines.residual_vq",
        description="Train the codebooks of --method residual_vq for a model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train_ = training.command(parser, "the codebooks", 8192)
    train_.add_argument("--books", type=int, default=BOOKS, help=f"trained for a layer's keys, and values ({BOOKS})")
    args = parser.parse_args(argv)
    model, rows, source = training.load(args)
    progress = not args.no_progress
    file = train(model, rows, out=args.out, books=args.books, seed=args.seed, progress=progress, source=source)
    print(f"written: {file.path.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
