"""An engine's pages: requests of unequal lengths, with blocks that both groups of pages share."""

import dataclasses
import itertools
import random
import zlib

import pytest
import torch

from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import GroupLayout, PageLayout
from headq_ao.ops.paged_attention import long_chunk, reference
from headq_ao.ops.requests import LayerPages, Requests
from headq_ao.ops.types import Readers
from tests.ops.cache_update.streams import encoder_of
from tests.ops.frames import some_frame

WINDOW, PAGE, WINDOW_PAGE = 24, 32, 8
FORMS = {
    "2 bits": [(2, 2, 2)],
    "mixed": [(2, 1, 1), (3, 2, 1), (1, 4, 1)],
    "8 bits": [(8, 8, 2)],
}


class Engine:
    """Blocks of memory, each a packed page or a page of the newest tokens, as vLLM hands them out."""

    def __init__(self, form, dim=32, group=2, dtype=torch.float32, sinks=4, blocks=200, sliding=0, frame=None):
        torch.manual_seed(1)
        groups, self.encoders, first, maps = [], ([], []), 0, []
        for key_bits, value_bits, heads in FORMS[form]:
            keys, key_side = encoder_of("byte", True, heads, dim, key_bits, frame=frame)
            values, value_side = encoder_of("byte", False, heads, dim, value_bits)
            groups.append(GroupLayout(first, heads, key_side, value_side))
            self.encoders[0].append(keys)
            self.encoders[1].append(values)
            first += heads
            # s = σ Σ_i Δ (c_i − top/2) q̃_i + q·μ
            decode = torch.linalg.inv(keys.encode) * keys.step.transpose(-1, -2)
            tilde = decode.transpose(-1, -2)  # q̃ = q decodeᵀ
            middle = -(2**key_bits - 1) / 2 * tilde.sum(-1, keepdim=True)
            maps.append(torch.cat([tilde, middle, torch.zeros_like(middle), keys.mean[..., None]], -1))
        self.layout, self.heads, self.dim, self.dtype = PageLayout(PAGE, dim, dim, tuple(groups)), first, dim, dtype
        read = torch.cat([torch.linalg.inv(e.encode).mT * e.step[..., None, :] for e in self.encoders[1]], 1)
        mean = torch.cat([e.mean for e in self.encoders[1]], 1)
        self.readers = Readers(torch.cat(maps, 1)[None], read.mT.contiguous().mT, mean, frame)
        size = max(self.layout.bytes_of_page(sinks, dtype), WINDOW_PAGE * first * 2 * dim * dtype.itemsize)
        size = -(-size // PAGE) * PAGE
        memory = torch.randint(0, 256, (blocks, 2 * size), dtype=torch.uint8)  # what was never written
        raw = memory[:, size : 2 * size].view(blocks, 1, PAGE, size // PAGE)
        newest = memory[:, : WINDOW_PAGE * first * 2 * dim * dtype.itemsize].view(dtype)
        newest = newest.unflatten(1, (first, WINDOW_PAGE, 2 * dim))
        self.memory, self.q_heads = memory, first * group
        self.pages = LayerPages(
            raw, newest, self.layout, sinks, self.readers, self.encoders, self.q_heads, sliding=sliding
        )
        self.free = list(range(1, blocks))
        random.Random(2).shuffle(self.free)
        self.requests, self.shared = {}, set()
        self.sinks, self.sliding = sinks, sliding

    def tokens(self, name, begin, end):
        """Queries, keys and values of a request at those positions: the same whenever they are asked for."""
        made = []
        for position in range(begin, end):
            g = torch.Generator().manual_seed(zlib.crc32(f"{name} {position}".encode()))
            x = torch.randn(self.q_heads + 2 * self.heads, self.dim, generator=g)
            made.append(x * (3.0 if position == 0 else 1.0))
        q, k, v = torch.stack(made).split([self.q_heads, self.heads, self.heads], 1)
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def step(self, new, long=16, pages=None):
        """``new``: request to its number of new tokens. Outputs by request."""
        pages = pages or self.pages
        rows, bounds, each = [], [0], []
        for i, (name, n) in enumerate(new.items()):
            r = self.requests.setdefault(name, {"held": 0, "table": [], "window": []})
            total = r["held"] + n
            while len(r["table"]) * PAGE < total:
                r["table"].append(self.free.pop())
            while len(r["window"]) * WINDOW_PAGE < total:
                r["window"].append(self.free.pop())
            for j in range(max(r["held"] - WINDOW + 1, 0) // WINDOW_PAGE):  # let go
                if r["window"][j] and r["window"][j] not in self.shared:
                    self.free.append(r["window"][j])
                    r["window"][j] = 0
            rows.append(self.tokens(name, r["held"], total))
            if n > long:
                each.append((i, bounds[-1], bounds[-1] + n))
            bounds.append(bounds[-1] + n)
        q, k, v = (torch.cat(x) for x in zip(*rows, strict=True))
        width = max(len(self.requests[n]["table"]) for n in new), max(len(self.requests[n]["window"]) for n in new)
        tables = [torch.zeros(len(new), w + 1, dtype=torch.int32) for w in width]
        for i, name in enumerate(new):
            for table, own in zip(tables, ("table", "window"), strict=True):
                table[i, : len(self.requests[name][own])] = torch.tensor(self.requests[name][own])
        held = torch.tensor([self.requests[n]["held"] for n in new])
        of = Requests(
            torch.tensor(bounds), held, (held - WINDOW + 1).clamp(min=0), held + torch.tensor(list(new.values())),
            *tables, max(new.values()), max((n for n in new.values() if n <= long), default=0), tuple(each),
            recent=WINDOW - 1,
        )  # fmt: skip
        out = torch.full_like(q, float("nan"))
        pages.step(q, k, v, out, self.dim**-0.5, of)
        for name, n in new.items():
            self.requests[name]["held"] += n
        return {name: out[a:b] for name, (a, b) in zip(new, itertools.pairwise(bounds), strict=True)}

    def bytes_of(self, name):
        """What stands in the pages of a request, as the tokens that they hold."""
        held, table = self.requests[name]["held"], torch.tensor(self.requests[name]["table"])
        found = []
        for group in self.layout.split(self.pages.kv.pages):
            for side, keys in ((group.keys, True), (group.values, False)):
                of = reference.by_sequence
                planes = [of(p, table[None]) for p in side.planes]
                codes = unpack_keys(planes, side.bits) if keys else unpack_values(planes, side.bits[0])
                found.append(codes.flatten(2, 3)[:, :, :held])
                found.append(of(side.scale, table[None]).flatten(2, 3)[:, :, :held])
        return found

    def dense(self, name, begin, end):
        """Attention over everything in full precision."""
        q, _, _ = self.tokens(name, begin, end)
        _, k, v = self.tokens(name, 0, end)
        k, v = (x.float().repeat_interleave(self.q_heads // self.heads, 1) for x in (k, v))
        s = torch.einsum("qhd,khd->hqk", q.float(), k) * self.dim**-0.5
        at, p = torch.arange(begin, end)[:, None], torch.arange(end)
        hidden = (p > at) | ((p <= at - self.sliding) if self.sliding else torch.zeros(1, dtype=torch.bool))
        return torch.einsum("hqk,khd->qhd", s.masked_fill(hidden, float("-inf")).softmax(-1), v)


SCHEDULE = [
    {"a": 70, "b": 5}, {"a": 1, "b": 1, "c": 40}, {"a": 1, "b": 2, "c": 1}, {"c": 50, "d": 3}, {"b": 1, "a": 3, "d": 1},
    {"a": 1, "b": 1, "c": 1, "d": 1}, {"b": 90, "a": 1, "c": 33, "d": 1}, {"a": 1, "b": 1, "c": 1, "d": 1},
]  # fmt: skip


def compiled(engine):
    return engine.pages.planned


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("frame", [None, some_frame(32, PAGE, 3)], ids=["no frame", "frame"])
@pytest.mark.parametrize("sliding", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_nearly_dense(planned, sliding, dtype, frame):
    engine = Engine("8 bits", dtype=dtype, sliding=sliding, frame=frame)
    if planned and not compiled(engine):
        pytest.skip("no compiler")
    engine.pages.planned = planned
    for new in SCHEDULE:
        before = {n: engine.requests.get(n, {"held": 0})["held"] for n in new}
        for name, out in engine.step(new).items():
            expected = engine.dense(name, before[name], before[name] + new[name])
            error = (out.float() - expected).abs().max() / expected.abs().max()
            assert error < 0.05, (name, before[name], new[name], error)


@pytest.mark.parametrize("frame", [None, some_frame(32, PAGE, 3)], ids=["no frame", "frame"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_read_and_write_what_the_operators_do(form, dtype, frame):
    both = Engine(form, dtype=dtype, frame=frame), Engine(form, dtype=dtype, frame=frame)
    if not compiled(both[0]):
        pytest.skip("no compiler")
    both[1].pages.planned = False
    for new in SCHEDULE:
        one, other = (e.step(new) for e in both)
        for name in new:
            scale = other[name].float().abs().max()
            limit = 2e-3 if dtype == torch.float32 else 2e-2
            assert (one[name].float() - other[name].float()).abs().max() < limit * scale, (name, new)
    for name in both[0].requests:
        assert all(map(torch.equal, both[0].bytes_of(name), both[1].bytes_of(name)))


@pytest.mark.parametrize("form", FORMS)
def test_codes_do_not_depend_on_how_tokens_come(form):
    ways = [[120], [1] * 120, [64, 1, 1, 30, 24], [7] * 17 + [1]]
    found = []
    for i, way in enumerate(ways):
        engine = Engine(form)
        for n in way:
            engine.step({"a": n} if i % 2 else {"other": 1, "a": n})
        found.append(engine.bytes_of("a"))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("frame", [None, some_frame(32, PAGE, 3)], ids=["no frame", "frame"])
@pytest.mark.parametrize("sliding", [0, 40])
@pytest.mark.parametrize("form", FORMS)
def test_what_a_token_reads_does_not_depend_on_how_tokens_come(form, sliding, frame, planned):
    """Alone or in chunks, with others or not: at 2 bits a code in place of a number would show."""
    ways = [[1] * 120, [120], [20, 100], [64, 1, 1, 30, 24], [7] * 17 + [1]]
    found = []
    for i, way in enumerate(ways):
        engine = Engine(form, sliding=sliding, frame=frame)
        if planned and not compiled(engine):
            pytest.skip("no compiler")
        engine.pages.planned = planned
        found.append(torch.cat([engine.step({"a": n} if i % 2 else {"other": 1, "a": n})["a"] for n in way]))
    for way, other in zip(ways[1:], found[1:], strict=True):
        if planned:  # sums in the same order: a last bit would round the next layer's codes to other neighbours
            assert torch.equal(found[0], other), way
        torch.testing.assert_close(found[0], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frame", [None, some_frame(32, PAGE, 3)], ids=["no frame", "frame"])
def test_long_chunks_in_half_precision_read_what_single_tokens_do(frame, monkeypatch):
    monkeypatch.setattr(long_chunk, "LEAST_QUERIES", 33)
    monkeypatch.setattr(long_chunk, "TILE", 64)
    monkeypatch.setattr(long_chunk, "BLOCK", 16)
    for way in [[200], [3, 197], [90, 110], [40, 33, 127]]:
        engines = [Engine("mixed", dtype=torch.bfloat16, frame=frame) for _ in range(2)]
        found, expected = (
            torch.cat([engine.step({"a": n})["a"] for n in sizes]).float()
            for engine, sizes in zip(engines, (way, [1] * 200), strict=True)
        )
        error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert error.max() < 1e-2, (way, int(error.argmax()))


def test_a_rejected_draft_leaves_no_trace():
    drafted, plain = Engine("mixed"), Engine("mixed")
    for engine in (drafted, plain):
        engine.step({"a": 70})
    drafted.step({"a": 5})
    drafted.requests["a"]["held"] -= 4  # one of five was right
    plain.step({"a": 1})
    for _ in range(8):
        one, other = drafted.step({"a": 1}), plain.step({"a": 1})
        assert torch.equal(one["a"], other["a"])
    assert all(map(torch.equal, drafted.bytes_of("a"), plain.bytes_of("a")))


def test_a_sleep_takes_all_that_there_is_of_a_request():
    """An engine that sleeps gives its pages up, and wakes with others in their place, at their addresses or not."""
    engine = Engine("mixed")
    before = torch.cat([engine.step({"a": n})["a"] for n in (70, 1, 1)])
    engine.memory.random_(0, 256)
    engine.requests.clear()
    engine.free = list(range(len(engine.memory) - 1, 0, -1))
    after = torch.cat([engine.step({"a": n})["a"] for n in (70, 1, 1)])
    assert torch.equal(before, after)


def test_requests_that_begin_alike_share_pages():
    engine = Engine("mixed")
    engine.step({"a": 64})
    first = engine.requests["a"]
    engine.shared |= set(first["window"])
    engine.requests["b"] = {"held": 64, "table": list(first["table"]), "window": list(first["window"])}
    alone = Engine("mixed")
    alone.tokens = lambda name, begin, end: engine.tokens("a" if begin < 64 else "b", begin, end)
    alone.step({"b": 64})
    for _ in range(40):
        together = engine.step({"a": 1, "b": 1})["b"]
        torch.testing.assert_close(together, alone.step({"b": 1})["b"], rtol=1e-4, atol=1e-5)
    assert engine.requests["a"]["table"][2] != engine.requests["b"]["table"][2]
    assert all(map(torch.equal, engine.bytes_of("b"), alone.bytes_of("b")))


def test_sinks_are_read_in_full_precision():
    """With one bit and a large first token, an output that heeds it is right only with exact sinks."""
    with_sinks, without = Engine("mixed"), Engine("mixed", sinks=0)
    errors = []
    for engine in (with_sinks, without):
        engine.step({"a": 100})
        out = engine.step({"a": 1})["a"]
        errors.append(float((out - engine.dense("a", 100, 101)).square().sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("path", ["portable", "avx2"])
def test_other_paths_of_the_kernel(path, monkeypatch):
    best = Engine("mixed")
    if not compiled(best):
        pytest.skip("no compiler")
    expected = [best.step(new) for new in SCHEDULE]
    monkeypatch.setenv("HEADQ_CPU_ISA", path)
    other = Engine("mixed")
    try:
        found = [other.step(new) for new in SCHEDULE]
    except ValueError as error:
        pytest.skip(str(error))
    for one, two in zip(expected, found, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-3)


def test_page_in_one_piece():
    layout = PageLayout(32, 32, 32, Engine("mixed").layout.groups)
    size = layout.bytes_of_page(4, torch.bfloat16)
    raw = torch.zeros(3, size, dtype=torch.uint8)
    tensors, sink_k, sink_v = layout.views(raw, 4, torch.bfloat16)
    spans = []
    for x in [*tensors, sink_k, sink_v]:
        x.fill_(1)
        begin = x.data_ptr() - raw.data_ptr()
        spans.append((begin, begin + x[0].numel() * x.element_size()))
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(sorted(spans))) and max(spans)[1] <= size
    assert all(a.shape == b.shape for a, b in zip(tensors, layout.allocate(3, torch.bfloat16, raw.device), strict=True))
    with pytest.raises(ValueError, match="raw must be uint8"):
        layout.views(raw[:, :-16], 4, torch.bfloat16)
    with pytest.raises(ValueError, match="multiples of 2 bytes"):
        layout.views(torch.zeros(3, size + 1, dtype=torch.uint8)[:, :size], 4, torch.bfloat16)
    assert dataclasses.replace(layout, page_tokens=64).bytes_of_page(0, torch.float32) > size - 4 * 4 * 32 * 2 * 2
