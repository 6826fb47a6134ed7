"""Random operations on a packed cache beside a dense twin, for tests: what they hold must be the same."""

import copy
import itertools
import json
import random

import torch

from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.schedule import Span
from headq_ao.cache.serialize import batch_from_data, batch_to_data, layer_from_tensors, layer_to_tensors
from tests.cache.streams import CPU, HKV, HQ, Engine, softmax_attention

DIM = 16
NEAR = {torch.float32: 0.06, torch.bfloat16: 0.08}  # of the norm of a token, and of an output, at 8 bits
MOST_SEQUENCES, MOST_TOKENS = 5, 260


class PlantedError(Exception):
    """Planted."""


class Twin:
    """Keys and values of each sequence, ``[Hkv, n, D]``, and the padding behind the last of them."""

    def __init__(self):
        self.k, self.v, self.pads, self.slots = [], [], [], 0

    @property
    def totals(self):
        return [x.shape[1] for x in self.k]

    def append(self, k, v, spans):
        if not self.k:
            self.k, self.v, self.pads = ([x[b, :, :0] for b in range(len(k))] for x in (k, v, k))
            self.pads = [0] * len(k)
        for b, span in enumerate(spans):
            part = slice(span.start, span.stop)
            self.k[b], self.v[b] = torch.cat([self.k[b], k[b, :, part]], 1), torch.cat([self.v[b], v[b, :, part]], 1)
            self.pads[b] = k.shape[2] - span.stop if span.length else self.pads[b] + k.shape[2]
        self.slots += k.shape[2]

    def crop(self, slots):
        left = [n - min(max(slots - p, 0), n) for n, p in zip(self.totals, self.pads, strict=True)]
        self.k, self.v = ([x[:, :n] for x, n in zip(side, left, strict=True)] for side in (self.k, self.v))
        self.pads, self.slots = [max(p - slots, 0) for p in self.pads], self.slots - slots
        if self.slots <= 0:
            self.__init__()

    def select(self, order):
        self.k, self.v, self.pads = ([x[b] for b in order] for x in (self.k, self.v, self.pads))


class Fuzz:
    """One sequence of operations; all its choices are the seed's."""

    def __init__(self, seed, operations=14):
        self.random, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.seed, self.operations, self.log = seed, operations, []
        pick = self.random.choice
        self.dtype = pick([torch.float32] * 5 + [torch.bfloat16])
        self.windows = pick([(None,), (None,), (None, 40), (40,), (70, None), (12, None)])
        self.calibrated = pick(["alike", "alike", False])
        self.options = {
            "k_bits": 8, "v_bits": 8, "residual_length": pick([16, 24]), "block_size": pick([16, 32]),
            "n_sink": pick([0, 4]), "epoch_tokens": pick([32, 32, 80]),
        }  # fmt: skip
        if self.calibrated and self.random.random() < 0.2:
            self.options |= {"key_codec": "affine", "value_codec": "affine", "rank": 0}
        self.capacity = pick([None, None, None, MOST_TOKENS + 60])
        self.segment = pick([0, 32, 64])
        self.near = 1.5 * NEAR[self.dtype]  # of an output
        if self.segment and self.options.get("key_codec") == "affine":
            # the stream's mean stands still, so in the frames it turns, and an affine codec has its whole length in
            # the range of 8 bits: 0.9 % of a key instead of 0.3 %, which the scores show
            self.near *= 2
        g = torch.Generator().manual_seed(0)  # of the calibration's stream: tests/cache/streams.py
        self.mix = torch.randn(DIM, DIM, generator=g, dtype=torch.float64)
        self.mean = torch.randn(HKV, 1, DIM, generator=g, dtype=torch.float64) * 3
        self.engine, self.twin, self.outputs = self.make(), Twin(), []

    def make(self):
        return Engine.make(self.options, self.calibrated, self.windows, DIM, self.capacity, segment=self.segment)

    def run(self):
        """All operations; what attention gave, to compare runs with."""
        try:
            for _ in range(self.operations):
                self.step()
                self.check()
        except BaseException as error:
            setting = (self.windows, self.calibrated, self.options, str(self.dtype), self.capacity, self.segment)
            lines = [
                f"{n} times {line}" for line, n in ((x, len(list(same))) for x, same in itertools.groupby(self.log))
            ]
            told = "\n  ".join([str(setting), *lines])
            raise AssertionError(f"seed {self.seed}: {error!r} after\n  {told}") from error
        return self.outputs

    def step(self):
        """One operation; ``order``: which sequences are now where, where it has changed that."""
        self.order = None
        names = ["append"] * 4 + ["decode"] * 4 + ["draft"] * 3 + ["crop", "select", "save", "deepcopy", "fail"]
        name = self.random.choice(names)
        if not self.twin.k or (max(self.twin.totals) > MOST_TOKENS and name in ("append", "decode", "draft")):
            name = "append" if not self.twin.k else "crop"
        if self.capacity is not None and self.twin.slots > MOST_TOKENS and name != "crop":
            name = "crop"
        getattr(self, name)()

    # -- operations

    def append(self):
        """One chunk, of any length, with padding or without."""
        n = self.random.choice([1, 2, 5, 15, 16, 17, 18, 33, 50, 90])
        n = n if self.capacity is None else min(n, self.capacity - self.twin.slots)
        if not self.twin.k:
            n = self.random.choice([1, 3, 20, 60, 120])
        self.call(n, self.spans(n))

    def decode(self):
        for _ in range(self.random.choice([1, 3, 9, 20])):
            self.call(1)

    def draft(self):
        """A draft of at most as many tokens as the ring has slots for, and some of them rejected: always possible."""
        n = self.random.randint(1, 16)
        self.call(n)
        rejected = self.random.randint(1, n)
        self.log.append(f"reject {rejected}")
        if rejected < self.twin.slots:
            self.engine.crop(rejected)
            self.twin.crop(rejected)

    def crop(self):
        n = self.random.choice([1, 5, 17, 30, 80, self.twin.slots // 2, self.twin.slots])
        n = max(min(n, self.twin.slots), 1)
        self.log.append(f"crop {n}")
        before = self.engine.lengths.totals()
        try:
            self.engine.crop(n)
        except RuntimeError as error:
            if "sliding-window" not in str(error) or not any(self.windows):
                raise
            assert self.engine.lengths.totals() == before
            if max(self.twin.totals) > MOST_TOKENS:
                n = self.twin.slots
                self.engine.clear()
                self.twin.crop(n)
            return
        self.twin.crop(n)

    def select(self):
        batch = len(self.twin.k)
        kind = self.random.choice(["reorder", "repeat", "any"])
        if kind == "reorder":
            order = self.random.sample(range(batch), batch)
        elif kind == "repeat" and batch * 2 <= MOST_SEQUENCES:
            order = [b for b in range(batch) for _ in range(2)]
        else:
            order = self.random.choices(range(batch), k=self.random.randint(1, MOST_SEQUENCES))
        self.log.append(f"select {order}")
        self.engine.select(order)
        self.twin.select(order)
        self.order = order

    def save(self):
        """Through plain data, and into a cache that is new."""
        self.log.append("save and load")
        engine = self.engine
        engine.batch.settle()
        data = json.loads(json.dumps(batch_to_data(engine.batch)))
        layers = [layer_to_tensors(layer) for layer in engine.layers]
        made = self.make()
        batch_from_data(made.batch, data)
        for layer, (tensors, description) in zip(made.layers, layers, strict=True):
            layer_from_tensors(
                layer, json.loads(json.dumps(description)), {n: t.clone() for n, t in tensors.items()}, CPU
            )
        assert [x.tokens_read for x in made.layers] == [x.tokens_read for x in engine.layers]
        self.engine = made

    def deepcopy(self):
        """Go on with the copy, spoil the other."""
        self.log.append("deepcopy")
        old = self.engine
        self.engine = copy.deepcopy(old)
        assert not storages(old) & storages(self.engine)
        for layer, made in zip(old.layers, self.engine.layers, strict=True):
            assert made.source is layer.source, "the model's part is not copied"
            for t in own(layer):
                t.fill_(1)
        for t in old.batch.tensors():
            t.zero_()

    def fail(self):
        """A call that fails somewhere leaves everything as it was."""
        n, engine = self.random.choice([1, 1, 4, 16, 17, 40]), self.engine
        where, how = self.random.randrange(len(engine.layers)), self.random.choice(["nan", "pack", "attend"])
        self.log.append(f"fail in {where} by {how}, {n} tokens")
        q, k, v = self.tokens(n)
        layer, batch = engine.layers[where], len(self.twin.k)
        if self.capacity is not None and self.twin.slots + n > self.capacity:
            return
        try:
            engine.batch.begin(batch, n)
            for i, x in enumerate(engine.layers):
                if x is layer and how == "nan":
                    bad = k.clone()
                    bad[-1, 0, -1, 3] = float("nan")
                    x.update(bad, v)
                    raise AssertionError("nan was taken")
                if x is layer and how == "pack":
                    x.batch.take_back()
                    raise PlantedError
                x.update(k, v)
                if x is layer:
                    x.batch.take_back()
                    raise PlantedError
                x.attend(q, DIM**-0.5, k, v)
                del i
        except (PlantedError, ValueError):
            pass
        if engine.batch.broken:
            assert (n > 16 and any(self.windows)) or not self.calibrated
            self.log.append("broken: start again")
            engine.clear()
            self.twin = Twin()

    # -- parts

    def tokens(self, n):
        batch = len(self.twin.k) or self.random.choice([1, 1, 2, 3])

        def draw(heads):
            return torch.randn(batch, heads, n, DIM, generator=self.g, dtype=torch.float64) @ self.mix / 4

        return [x.to(self.dtype) for x in (draw(HQ), draw(HKV) + self.mean, draw(HKV))]

    def spans(self, n):
        """Padding in a third of the chunks."""
        if self.random.random() < 0.66 or n < 2:
            return None
        return lambda batch: [Span(*sorted(self.random.choices([0, n // 3, n // 2, n], k=2))) for _ in range(batch)]

    def call(self, n, spans=None):
        q, k, v = self.tokens(n)
        spans = None if spans is None else spans(len(k))
        self.log.append(f"call {n} of {len(k)}" + ("" if spans is None else f", {[(s.start, s.stop) for s in spans]}"))
        if spans is not None:
            for x in (q, k, v):
                for b, s in enumerate(spans):
                    x[b, :, : s.start] = x[b, :, s.stop :] = float("nan")
        before = self.twin.totals or [0] * len(k)
        outs = self.engine.call(q, k, v, spans)
        real = [Span(0, n)] * len(k) if spans is None else spans
        self.twin.append(k, v, real)
        for layer, out in zip(self.engine.layers, outs, strict=True):
            assert out.dtype == self.dtype
            for b, span in enumerate(real):
                if span.length:
                    part = slice(span.start, span.stop)
                    want = softmax_attention(
                        q[b, :, part], self.twin.k[b], self.twin.v[b], DIM**-0.5, before[b], layer.sliding_window
                    )
                    found = out[b, :, part].double()
                    error = (found - want).norm(dim=(0, 2)) / want.norm(dim=(0, 2))
                    assert error.max() < self.near, f"attention of sequence {b}: {error.max()}"
                    self.outputs.append(out[b, :, part])

    def check(self):
        """Lengths, and every token that a next query may read."""
        lengths, twin = self.engine.lengths, self.twin
        self.engine.batch.settle()
        assert lengths.totals() == twin.totals and lengths.seen == twin.slots
        if not twin.k:
            return
        assert lengths.trailing_pads() == twin.pads
        for layer in self.engine.layers:
            assert layer.seen == lengths.seen
            self.check_layer(layer)

    def check_layer(self, layer: PackedLayer):
        counts, sinks, window = layer.counts, layer.batch.lengths.schedule.n_sink, layer.window
        totals, packed, low = counts.total.tolist(), counts.packed.tolist(), counts.ring_low.tolist()
        assert totals == self.twin.totals and packed == layer.batch.lengths.packed()
        most = max(packed) if layer.packs else 0
        decoded = None
        if most:
            decoded = layer.codec.decode(layer._paged(counts.packed, counts.total), 0, most)
        for b, n in enumerate(totals):
            if not n:
                continue
            ring = window.ring
            oldest = 0 if layer.sliding_window is None else max(n - layer.sliding_window + 1 - sinks, 0)
            begin = low[b] if layer.packs else max(oldest, 0)
            last = max(n - sinks, 0)
            body = torch.arange(min(max(begin, n - sinks - ring, 0), last), last) + sinks
            if layer.packs:
                assert low[b] <= packed[b], "tokens that are nowhere"
            position = torch.cat([torch.arange(min(sinks, n)), body])
            for name, mine in (("k", self.twin.k[b]), ("v", self.twin.v[b])):
                held = window.at(name, position.expand(len(totals), -1))[b]
                assert torch.equal(held, mine[:, position].to(held.dtype)), f"{name} of sequence {b}: the window"
            if decoded is not None and oldest < packed[b]:
                for name, found, mine in zip("kv", decoded, (self.twin.k[b], self.twin.v[b]), strict=True):
                    x, y = found[b, :, oldest : packed[b]], mine[:, sinks + oldest : sinks + packed[b]].float()
                    error = (x - y).norm(dim=-1) / y.norm(dim=-1)
                    where = f"{error.max(0)[0].argmax() + oldest} of {packed[b]}"
                    assert error.max() < NEAR[self.dtype], f"{name} of sequence {b}: pages, {error.max()} at {where}"


def storages(engine):
    """Where its tensors lie, those of codecs left out: they are never written."""
    tensors = engine.batch.tensors() + [t for layer in engine.layers for t in own(layer)]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def own(layer):
    """A layer's tensors without those of codecs."""
    return [*layer.pool.tensors, *layer.window.tensors(), layer.reads] if layer.is_initialized else []


def run(seed, operations=14):
    """One sequence of operations."""
    return Fuzz(seed, operations).run()


__all__ = ["Batch", "Fuzz", "run"]
