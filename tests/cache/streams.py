"""Streams of queries, keys and values through packed layers, as an engine drives them, for tests."""

import dataclasses
import functools
import random
from dataclasses import dataclass

import torch

from headq_ao import headq_config
from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.schedule import Span, schedule_of
from headq_ao.calibration.observers import MomentAccumulator
from headq_ao.codecs.base import HeadBits
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.rotation import Rotation
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.importance import importance_weights

HQ, HKV, D = 4, 2, 32
CPU = torch.device("cpu")


def stream(batch=1, tokens=300, seed=0, dtype=torch.float32, head_dim=D, like=None):
    """Queries, keys and values ``[B, H, T, D]``; ``like``: with the moments of the stream of that seed."""
    g = torch.Generator().manual_seed(seed if like is None else like)
    mix = torch.randn(head_dim, head_dim, generator=g, dtype=torch.float64)
    mean = torch.randn(HKV, 1, head_dim, generator=g, dtype=torch.float64) * 3
    g.manual_seed(seed + 100)

    def draw(heads):
        return torch.randn(batch, heads, tokens, head_dim, generator=g, dtype=torch.float64) @ mix / 4

    return [x.to(dtype) for x in (draw(HQ), draw(HKV) + mean, draw(HKV))]


def sized(by_k, by_v, batch=1, tokens=300, seed=0, dtype=torch.float32, head_dim=D, like=None):
    """A stream whose keys and values are so many times as large; its scores are those of factor 1."""
    q, k, v = stream(batch, tokens, seed, torch.float64, head_dim, like)
    return [x.to(dtype) for x in (q / by_k, k * by_k, v * by_v)]


@functools.cache
def moments(like=1, head_dim=D, by_k=1.0, by_v=1.0):
    """Statistics of a stream, as a calibration takes them, of keys and values so many times as large."""
    q, k, v = sized(by_k, by_v, tokens=512, seed=1, like=like, head_dim=head_dim)
    accumulator = MomentAccumulator(512)
    weights = (x[0].T for x in importance_weights(q, k, head_dim**-0.5, n_sink=0))
    g = torch.Generator().manual_seed(0)
    accumulator.add(*(x[0].transpose(0, 1) for x in (q, k, v)), list(weights), torch.rand(512, generator=g))
    return accumulator.moments()


@functools.cache
def rotation(head_dim, slow=100):
    """Pairs that turn a little from segment to segment, the less the later."""
    angle = 1 / slow / (1 + torch.arange(head_dim // 2).double())
    return Rotation(torch.cat([-angle, angle]), torch.arange(head_dim).roll(head_dim // 2))


@functools.cache
def source(
    options: tuple[tuple[str, object], ...], like: int | None, window: int | None, head_dim: int, bits, segment, *by
):
    """The model's part of a layer's codec; ``like``: the stream that it is calibrated on, None: none; ``by``: how many
    times as large its keys and values are; ``segment``: tokens of a segment whose frame keys are coded in, 0: none."""
    config = headq_config(**dict(options))
    held = None if like is None else dataclasses.replace(moments(like, head_dim, *by), segment_tokens=segment)
    turns = rotation(head_dim) if segment else None
    made = LayerCodec(
        config, LayerShape(HQ, HKV, head_dim, window), held, CPU, bits=bits, rotation=turns, positions=200
    )
    made.segment_tokens = segment
    return made


@dataclass
class Engine:
    """A batch of sequences in packed layers."""

    batch: Batch
    layers: list[PackedLayer]

    @classmethod
    def make(cls, options=None, calibrated=False, windows=(None,), head_dim=D, capacity=None, by=(1.0, 1.0), segment=0):
        """``calibrated``: False, True (on a stream of other means and covariances) or "alike" (on one of the same);
        ``by``: of keys and values so many times as large; ``segment``: see :func:`source`."""
        options = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16} | (options or {})
        bits = options.pop("head_bits", None)
        like = {"alike": 0, True: 1, False: None}[calibrated]
        found = [source(tuple(sorted(options.items())), like, w, head_dim, bits, segment, *by) for w in windows]
        config = found[0].config
        batch = Batch(schedule_of(config, found), config.block_size, capacity)
        shapes = [LayerShape(HQ, HKV, head_dim, window) for window in windows]
        batch.layers = [PackedLayer(s, x, batch, config.check_finite) for s, x in zip(shapes, found, strict=True)]
        return cls(batch, batch.layers)

    @property
    def layer(self) -> PackedLayer:
        """The first one."""
        return self.layers[0]

    @property
    def lengths(self):
        """Of its sequences."""
        return self.batch.lengths

    def call(self, q, k, v, spans=None, scaling=None, attend=True):
        """One model call; what attention gives in each layer, where ``attend``."""
        self.batch.begin(k.shape[0], k.shape[2], spans)
        scaling, outs = k.shape[-1] ** -0.5 if scaling is None else scaling, []
        for layer in self.layers:
            layer.update(k, v)
            try:
                if attend:
                    outs.append(layer.attend(q, scaling, k, v))
                else:
                    layer.commit(q, scaling)
            except BaseException:
                layer.batch.take_back()
                raise
        return outs

    def feed(self, q, k, v, sizes, spans=None, attend=True):
        """Calls of those sizes; the outputs of the first layer, where ``attend``. ``spans``: of the whole stream."""
        outs, at = [], 0
        for n in sizes:
            part = slice(at, at + n)
            here = None if spans is None else [Span(*(min(max(x - at, 0), n) for x in span)) for span in spans]
            outs += self.call(*(x[:, :, part] for x in (q, k, v)), here, attend=attend)[:1]
            at += n
        self.batch.settle()
        return torch.cat(outs, 2) if attend else None

    def crop(self, slots):
        """Forget slots, as a cache does."""
        self.batch.settle()
        if slots >= self.lengths.seen:
            return self.clear()
        for layer in self.layers:
            layer.check_crop(slots)
        return self.batch.crop(slots)

    def clear(self):
        """Forget everything."""
        self.batch.clear()
        for layer in self.layers:
            layer.clear()

    def select(self, order):
        """Keep those sequences, in that order."""
        copies = self.batch.select(order)
        for layer in self.layers:
            layer.select(torch.tensor(order), copies[layer.table_key] if layer.packs else ())


def chunks(kind, tokens=300):
    """Sizes of calls: one, as many as tokens, or random ones of that seed."""
    if kind == "one call":
        return [tokens]
    if kind == "token by token":
        return [1] * tokens
    generator, sizes = random.Random(kind), []
    while sum(sizes) < tokens:
        sizes.append(min(generator.choice([1, 1, 2, 3, 7, 16, 33, 64, 100]), tokens - sum(sizes)))
    return sizes


def softmax_attention(q, keys, values, scaling, first, window=None):
    """``[.., Hq, S, D]`` in float64; query ``i`` stands at position ``first + i``."""
    q, keys, values = q.double(), keys.double(), values.double()
    keys, values = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (keys, values))
    scores = q @ keys.transpose(-1, -2) * scaling
    i, j = torch.arange(first, first + q.shape[-2])[:, None], torch.arange(keys.shape[-2])[None]
    visible = (j <= i) if window is None else (j <= i) & (j > i - window)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values


def relative(a, b):
    """Of the norm of ``b``."""
    return ((a.double() - b).norm() / b.norm()).item()


__all__ = [
    "CPU",
    "HKV",
    "HQ",
    "D",
    "Engine",
    "HeadBits",
    "chunks",
    "moments",
    "relative",
    "sized",
    "softmax_attention",
    "stream",
]
