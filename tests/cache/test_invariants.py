"""The cache's invariants on streams, each with faults that its check must catch.

(a) a packed token is never coded again; (b) one stream of q, k, v gives the same codes whether it came in one call or
in many; (c) what is counted as read from packed tokens was read there.
"""

import dataclasses
import functools

import pytest
import torch

from headq_ao import headq_config, quantize_
from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.lengths import Counts
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.cache.pages import PagePool, PageTable
from headq_ao.cache.schedule import Span
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.planes import PlaneCodec
from headq_ao.evals.harness.scoring import exact_logprobs, score
from headq_ao.statistics.importance import importance_weights
from headq_ao.statistics.units import unit_of_rows
from tests.cache.fuzzing import Fuzz
from tests.cache.streams import HKV, D, Engine, HeadBits, chunks, moments, relative, softmax_attention, stream
from tests.pages import held, same_codes

T = 300
AFFINE = {"key_codec": "affine", "value_codec": "affine"}
MIXED = {"block_size": 32}  # values of odd bits pack in that many tokens
ZEROS = AFFINE | {"k_zero_point": True, "v_zero_point": True}
CASES = {
    "calibrated": ({}, True, None),
    "uncalibrated": ({}, False, None),
    "side code": ({"rank": 8, "basis": "score_optimal"}, False, None),
    "side code calibrated": ({"rank": 8}, True, None),
    "nearest codes": ({"error_feedback": False}, False, None),
    "affine calibrated": (AFFINE, True, None),
    "affine": (AFFINE, False, None),
    "affine score_optimal": (AFFINE | {"basis": "score_optimal"}, False, None),
    "affine random": (AFFINE | {"basis": "random"}, False, None),
    "three bits": ({"k_bits": 3, "v_bits": 3, "block_size": 32}, False, None),
    "keys only": ({"v_bits": None}, False, None),
    "keys only calibrated": ({"v_bits": None}, True, None),
    "values only": ({"k_bits": None}, False, None),
    "values only calibrated": ({"k_bits": None}, True, None),
    "zero points": (ZEROS | {"v_group_size": 16}, False, None),
    "zero points calibrated": (ZEROS, True, None),
    "biased scale": ({"unbiased_scale": False}, True, None),
    "affine, no side code": (AFFINE | {"rank": 0}, True, None),
    "window": ({}, False, 80),
    "window calibrated": ({}, True, 80),
    "affine window": (AFFINE, False, 80),
    "short window": ({}, False, 20),
    "no sink": ({"n_sink": 0}, False, None),
    "no sink calibrated": ({"n_sink": 0}, True, None),
    "bits by head": (MIXED | {"head_bits": HeadBits((3, 1), (2, 5))}, True, None),
    "bits by head, keys alone differ": (MIXED | {"head_bits": HeadBits((2, 4), (3, 3))}, True, None),
    "bits by head, eight of them": (MIXED | {"head_bits": HeadBits((8, 2), (8, 1))}, True, None),
    "bits by head, side code": (MIXED | {"head_bits": HeadBits((3, 2), (2, 2)), "rank": 8}, True, None),
    "bits by head, keys only": (MIXED | {"head_bits": HeadBits((4, 2), ()), "v_bits": None}, True, None),
    "bits by head, values only": (MIXED | {"head_bits": HeadBits((), (2, 3)), "k_bits": None}, True, None),
    "bits by head window": (MIXED | {"head_bits": HeadBits((3, 1), (1, 3))}, True, 80),
}
each_case = pytest.mark.parametrize("case", CASES)
PLAIN = ["calibrated", "uncalibrated", "window calibrated"]


def make(case, **more):
    options, calibrated, window = CASES[case] if isinstance(case, str) else case
    return Engine.make(options | more, calibrated, (window,))


@functools.cache
def whole(case, batch=1):
    """All of the stream in one call."""
    engine = make(case)
    engine.feed(*stream(batch), [T])
    return engine


def assert_same_state(one, other, b=0, c=0):
    """Sequence ``b`` of one engine is ``c`` of the other: codes, statistics, and what is in full precision."""
    x, y = one.layer, other.layer
    assert x.counts.total[b] == y.counts.total[c] and x.counts.packed[b] == y.counts.packed[c]
    packed = int(x.counts.packed[b]) if x.packs else 0
    begin = max(held(x, b)[0], held(y, c)[0])
    assert begin == 0 or x.is_sliding
    assert same_codes(x, y, b, c) == packed - begin
    names = x.codec.own_tensors().keys()
    if x.learned[b] and x.codec.warmup:
        assert names == y.codec.own_tensors().keys()
    for name in names if x.learned[b] else ():
        assert torch.equal(x.codec.own_tensors()[name][b], y.codec.own_tensors()[name][c]), name
    total, sinks = int(x.counts.total[b]), x.window.n_sink
    low = max(packed, int(x.counts.ring_low[b]), int(y.counts.ring_low[c]), total - sinks - x.window.ring)
    low = max(low, total - sinks - y.window.ring) if not x.packs else low
    position = torch.cat([torch.arange(min(sinks, total)), torch.arange(low, max(total - sinks, low)) + sinks])
    for name in ("k", "v"):
        a, d = (z.window.at(name, position.expand(z.batch.lengths.batch, -1)) for z in (x, y))
        assert torch.equal(a[b], d[c]), name


# (b) call boundaries do not matter


def check_boundaries(case, sizes):
    many = make(case)
    many.feed(*stream(), sizes)
    one = whole(case)
    if one.layer.packs:
        assert one.lengths.packed()[0] > 200
    assert_same_state(one, many)


@each_case
@pytest.mark.parametrize("kind", ["token by token", 1, 2])
def test_codes_do_not_depend_on_calls(case, kind):
    check_boundaries(case, chunks(kind))


def check_ragged(case, side):
    lengths, q_k_v = (T, 217, 101, 3), stream(4)
    spans = [(T - n, T) if side == "left" else (0, n) for n in lengths]
    for x in q_k_v:  # pads must not be read at all
        for b, (a, z) in enumerate(spans):
            x[b, :, :a] = x[b, :, z:] = float("nan")
    batch = make(case)
    out = batch.feed(*q_k_v, chunks(5), spans=spans)
    assert batch.lengths.totals() == list(lengths)
    for b, (a, z) in enumerate(spans):
        alone = make(case)
        alone.feed(*(x[b : b + 1, :, a:z] for x in q_k_v), chunks(6, z - a))
        assert_same_state(batch, alone, b)
        assert bool(torch.isfinite(out[b, :, a:z]).all())


@each_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_equals_sequences_alone(case, side):
    check_ragged(case, side)


def check_selected(case, at):
    order, q_k_v = [2, 0, 2], stream(3)
    batch = make(case)
    batch.feed(*(x[:, :, :at] for x in q_k_v), [at])
    batch.select(order)
    batch.feed(*(x[order][:, :, at:] for x in q_k_v), [60, *[1] * (T - at - 60)] if at < T - 60 else [T - at])
    for b, origin in enumerate(order):
        alone = make(case)
        alone.feed(*(x[origin : origin + 1] for x in q_k_v), [at, T - at])
        assert_same_state(batch, alone, b)


@each_case
@pytest.mark.parametrize("at", [50, 90, 250])
def test_selected_sequences_equal_their_own_streams(case, at):
    """Selecting sequences in mid-stream carries codes, window, awaited statistics and codecs along."""
    check_selected(case, at)


def rounded_in_bulk(monkeypatch):
    """A prefill is coded from bf16."""
    pack = PlaneCodec.pack

    def fault(self, kv, k, v, packed, most, *rest):
        if k is not None and k.shape[2] > 16:
            k, v = k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype)
        pack(self, kv, k, v, packed, most, *rest)

    monkeypatch.setattr(PlaneCodec, "pack", fault)


def padding_not_skipped(monkeypatch):
    """The first real slot of a call is not looked at."""
    monkeypatch.setattr(PackedLayer, "_start", lambda self: self.counts.none)
    paged = PackedLayer._paged
    monkeypatch.setattr(PackedLayer, "_paged", lambda self, *x: dataclasses.replace(paged(self, *x), new_start=None))


def too_few_pages(monkeypatch):
    """A table without room for all that is packed."""
    reserve = PageTable.reserve
    monkeypatch.setattr(PageTable, "reserve", lambda self, batch, tokens: reserve(self, batch, min(tokens, 150)))


def statistics_of_a_call(monkeypatch):
    """A sequence's statistics are taken from what the first call brought."""
    learn = LayerCodec._learn

    def fault(self, q, k, v, *rest):
        return learn(self, *(x[:, :, -40:] for x in (q, k, v)), *rest)

    monkeypatch.setattr(LayerCodec, "_learn", fault)
    first = PackedLayer._first
    monkeypatch.setattr(
        PackedLayer, "_first", lambda self, name, new, members, n: first(
            self, name, new, members, n if new is None or new.shape[2] < n else new.shape[2])
    )  # fmt: skip


def pages_in_the_making_are_shared(monkeypatch):
    """Selecting copies no page."""
    monkeypatch.setattr(PagePool, "copy", lambda self, pairs: None)


def statistics_stay_behind(monkeypatch):
    """Selecting does not carry codecs along."""
    monkeypatch.setattr(PlaneCodec, "index", lambda self, index: self)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (rounded_in_bulk, lambda: check_boundaries("calibrated", chunks(1))),
        (rounded_in_bulk, lambda: check_boundaries("uncalibrated", chunks(1))),
        (rounded_in_bulk, lambda: check_boundaries("window calibrated", chunks("token by token"))),
        (padding_not_skipped, lambda: check_ragged("calibrated", "left")),
        (padding_not_skipped, lambda: check_ragged("uncalibrated", "left")),
        (too_few_pages, lambda: check_boundaries("calibrated", chunks("token by token"))),
        (statistics_of_a_call, lambda: check_boundaries("uncalibrated", chunks("token by token"))),
        (pages_in_the_making_are_shared, lambda: check_selected("calibrated", 250)),
        (statistics_stay_behind, lambda: check_selected("uncalibrated", 250)),
    ],
)
def test_faults_at_call_boundaries_are_found(fault, check, monkeypatch):
    check()
    fault(monkeypatch)
    whole.cache_clear()
    with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
        check()
    whole.cache_clear()


@pytest.mark.parametrize("codec_name", ["visible", "affine"])
def test_statistics_ignore_sinks_and_what_follows_the_warm_up(codec_name):
    """Visible statistics see a sink in one way only: it draws attention from the keys that count."""
    changed, (q, k, v) = [], stream()
    for at in (2, 50, 4 + 64 + 10):  # a sink, a token of the warm-up, one behind it
        other = k.clone()
        other[:, :, at] += 100
        means = []
        for keys in (k, other):
            engine = make(({"key_codec": codec_name}, False, None))
            engine.feed(q, keys, v, [T])
            means.append(engine.layer.codec.keys.mean)
        changed.append(not torch.equal(*means))
    assert changed == [codec_name == "visible", True, False]


def test_statistics_are_those_of_the_stream():
    q, k, v = stream()
    engine = make((AFFINE | {"basis": "query_pca", "rank": 8}, False, None))
    engine.feed(q, k, v, chunks(1))
    own, (q, k) = engine.layer.codec.keys, (q.double(), k.double())
    unit = 1 if own.unit is None else own.unit[0].double()
    torch.testing.assert_close(own.mean[0].double() * unit, k[0, :, 4:68].mean(1), rtol=1e-3, atol=1e-3)
    for h in range(HKV):
        rows = q[0, 2 * h : 2 * h + 2, 4:68].flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        top, basis = vectors[:, -8:], own.side_encode[0, h].double()
        torch.testing.assert_close(top @ (top.T @ basis), basis, rtol=0, atol=2e-3)
        assert values[-1] > 0


@pytest.mark.parametrize(("scaling", "window"), [(None, None), (1.0, None), (None, 60)])
def test_visible_statistics_are_those_of_the_stream(scaling, window):
    """Mean, spread and seen directions of the first tokens, each weighted as attention sees it."""
    q, k, v = stream(dtype=torch.float64)
    engine, at = make(({"whitening": 0.5}, False, window)), 0
    for n in chunks(1):
        engine.call(*(x[:, :, at : at + n] for x in (q, k, v)), scaling=scaling)
        at += n
    own, (q, k) = engine.layer.codec.keys, (x[:, :, :68] for x in (q, k))
    assert unit_of_rows(k[:, :, 4:]) is None and own.unit is None
    of_q, of_k, _ = importance_weights(q, k, D**-0.5 if scaling is None else scaling, n_sink=4, window=window)
    for h in range(HKV):
        w = of_k[0, h, 4:]
        w = 0.25 + 0.75 * w / w.mean()
        mean = sum(w[j] * k[0, h, 4 + j] for j in range(64)) / 64
        torch.testing.assert_close(own.mean[0, h].double(), mean, rtol=1e-3, atol=1e-3)
        variance = sum(w[j] * (k[0, h, 4 + j] - mean) ** 2 for j in range(64)) / 64
        spread = (variance + 1e-4 * variance.mean()) ** 0.25
        spread = spread * (variance / spread.square()).mean().sqrt()  # so that coded rows have an RMS of 1
        torch.testing.assert_close(own.spread[0, h].double(), spread, rtol=1e-3, atol=1e-3)
        w = of_q[0, 2 * h : 2 * h + 2, 4:].flatten()
        w = 0.25 + 0.75 * w / w.mean()
        rows = q[0, 2 * h : 2 * h + 2, 4:68].flatten(0, 1)
        c_q = (rows * w[:, None]).T @ rows / len(rows)
        values, vectors = torch.linalg.eigh(c_q + 0.1 * c_q.trace() / D * torch.eye(D))
        floor = values[:16].mean()  # a codec of head_dim 32 keeps 16 directions
        kept = (vectors[:, 16:] * (values[16:] / floor - 1)) @ vectors[:, 16:].T
        factor = own.q_factor[0, h].double()
        torch.testing.assert_close(factor @ factor.T, kept, rtol=0, atol=2e-3 * float(kept.abs().max()))


# (a) a packed token is never coded again


class Coded:
    """Which body tokens codecs have been told to code, by layer and sequence."""

    def __init__(self, monkeypatch):
        self.calls = {}
        pack, plan = PlaneCodec.pack, PlaneCodec.plan

        def spy(codec, kv, k, v, packed, most, *rest):
            self.note(kv, packed)
            pack(codec, kv, k, v, packed, most, *rest)

        def spy_plan(codec, before, packed, *rest):
            made = plan(codec, before, packed, *rest)
            if made is None:
                return None

            def update(k, v):
                self.note(before, packed)
                made[0](k, v)

            update.moved = made[0].moved
            return update, made[1]

        monkeypatch.setattr(PlaneCodec, "pack", spy)
        monkeypatch.setattr(PlaneCodec, "plan", spy_plan)

    def note(self, kv, packed):
        spans = [range(a, b) for a, b in zip(kv.packed.tolist(), packed.tolist(), strict=True)]
        self.calls.setdefault(id(kv.pages), []).append(spans)

    def check(self, layer, b, limit=None):
        """Each token of a sequence that never changed its place was coded once, up to what is packed."""
        tokens = [j for spans in self.calls.get(id(layer.pool.tensors), []) for j in spans[b]]
        assert sorted(tokens) == sorted(set(tokens)), "a packed token was coded again"
        assert sorted(tokens) == list(range(layer.batch.lengths.packed()[b] if limit is None else limit))


def check_coded_once(case, monkeypatch):
    """Appends of any size, drafts that are rejected, and failures: every token is coded once."""
    coded, engine, (q, k, v) = Coded(monkeypatch), make(case), stream(2, 600)
    spans, at = [(0, 600), (130, 600)], 0
    for i, n in enumerate(chunks(4, 400)):
        part = slice(at, at + n)
        here = [Span(*(min(max(x - at, 0), n) for x in span)) for span in spans]
        engine.call(*(x[:, :, part] for x in (q, k, v)), here)
        at += n
        if i % 3 == 2 and at > 150:  # a draft, rejected but for its first token
            m = (2, 9, 16)[i % 9 // 3]
            engine.call(*(x[:, :, at : at + m] for x in (q, k, v)))
            engine.crop(m - 1)
            at += 1
        if i % 5 == 4:
            engine.batch.begin(2, 3)
            engine.layer.batch.take_back()
    engine.batch.settle()
    for b in (0, 1):
        coded.check(engine.layer, b)
        assert engine.lengths.packed()[b] > 200


@pytest.mark.parametrize("case", [c for c in CASES if c != "short window"])
def test_a_token_is_coded_once(case, monkeypatch):
    check_coded_once(case, monkeypatch)


def check_content_stays(case):
    """The bytes of packed tokens stay as they are, while more come and storage grows."""
    engine, (q, k, v) = make(case), stream(2, 500)
    spans, at, seen, capacities = [(0, 500), (130, 500)], 0, [None, None], set()
    for n in chunks(4, 500):
        here = [Span(*(min(max(x - at, 0), n) for x in span)) for span in spans]
        engine.call(*(x[:, :, at : at + n] for x in (q, k, v)), here)
        engine.batch.settle()
        at += n
        capacities.add(engine.layer.pool.pages)
        for b in (0, 1):
            now = held(engine.layer, b)
            if seen[b] is not None:
                assert unchanged(seen[b], now)
            seen[b] = now
    if engine.layer.packs:
        assert engine.lengths.packed()[0] >= 400 and engine.lengths.packed()[1] >= 240
        assert len(capacities) > 2, "storage did not grow: nothing was tested"


def unchanged(before, now):
    """Whether what two looks at :func:`tests.pages.held` have in common is the same."""
    (begin, x), (start, y) = before, now
    first = max(begin, start)
    last = max(min(begin + x[0].shape[1], start + y[0].shape[1]), first)
    return all(
        torch.equal(a[:, first - begin : last - begin], d[:, first - start : last - start])
        for a, d in zip(x, y, strict=True)
    )


@each_case
def test_packed_tokens_never_change(case):
    check_content_stays(case)


@pytest.mark.parametrize("case", PLAIN)
def test_deep_crop_codes_nothing_again(case, monkeypatch):
    engine = make(case)
    engine.feed(*stream(2), [T])
    before, coded = [held(engine.layer, b) for b in (0, 1)], Coded(monkeypatch)
    if engine.layer.is_sliding:
        with pytest.raises(RuntimeError, match="sliding-window"):
            engine.crop(150)
        engine.crop(16)
    else:
        engine.crop(150)
        assert engine.lengths.totals() == [150, 150] and engine.lengths.packed() == [146, 146]
    packed = engine.lengths.packed()
    for b in (0, 1):
        assert unchanged(before[b], held(engine.layer, b))
    engine.feed(*stream(2, 40, seed=3), [1] * 40)
    assert all(spans[b].start >= packed[b] for x in coded.calls.values() for spans in x for b in (0, 1))


def test_fuzzed_operations_change_no_packed_token(monkeypatch):
    """Whatever else is done between two looks: bytes stay, but of tokens that a crop has removed."""
    looked = 0
    for seed in range(30):
        fuzz = Fuzz(seed)
        for _ in range(fuzz.operations):
            before = looks(fuzz)
            fuzz.step()
            fuzz.check()
            order = fuzz.order or range(len(fuzz.twin.k))
            for old, new in zip(before, looks(fuzz), strict=True):
                for b, c in enumerate(order) if old and new else ():
                    assert unchanged(old[c], new[b]), fuzz.log
                    looked += 1
    assert looked > 200


def looks(fuzz):
    """:func:`tests.pages.held` of each sequence and layer, of tokens that a next query may see."""
    fuzz.engine.batch.settle()
    found = []
    for layer in fuzz.engine.layers:
        found.append([held(layer, b) for b in range(len(fuzz.twin.k))] if layer.is_initialized and layer.packs else [])
        for b, total in enumerate(fuzz.twin.totals if found[-1] and layer.is_sliding else ()):
            begin, parts = found[-1][b]
            low = max(begin, total - layer.sliding_window + 1 - layer.window.n_sink)
            found[-1][b] = low, [t[:, low - begin :] for t in parts]
    return found


def forgets_what_is_packed(monkeypatch):
    """After a crop within the window, tokens are packed that were."""
    crop = Counts.crop

    def fault(self, n_sink, slots, tokens):
        crop(self, n_sink, slots, tokens)
        self.packed.copy_((self.total - n_sink - 32).clamp(min=0))
        self.coded.copy_(self.packed)

    monkeypatch.setattr(Counts, "crop", fault)


def codes_one_more(monkeypatch):
    """The last packed token is coded once more, in each call."""
    monkeypatch.setattr(PackedLayer, "_coded", property(lambda self: (self.counts.coded - 1).clamp(min=0)))


def loses_pages(monkeypatch):
    """Growing pools forget their last page."""
    fit = PagePool.fit

    def fault(self, pages):
        grown = fit(self, pages)
        if grown and pages > 6:
            for t in self.tensors:
                t[4] = 0
        return grown

    monkeypatch.setattr(PagePool, "fit", fault)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (forgets_what_is_packed, lambda m: check_coded_once("calibrated", m)),
        (codes_one_more, lambda m: check_coded_once("calibrated", m)),
        (codes_one_more, lambda m: check_coded_once("uncalibrated", m)),
        (loses_pages, lambda m: check_content_stays("calibrated")),
        (loses_pages, lambda m: check_content_stays("uncalibrated")),
    ],
)
def test_coding_again_is_found(fault, check, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


# Attention


@pytest.mark.parametrize("case", [c for c in CASES if "window" not in c])
@pytest.mark.parametrize("new", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_equals_softmax_over_dequantized_tokens(case, new, dtype):
    """The compiled kernel maps queries to integers too: not fp32's error, but far below that of the codes."""
    engine = make(case)
    q, k, v = stream(2, T + new, dtype=dtype)
    engine.feed(*(x[:, :, :T] for x in (q, k, v)), [T])
    engine.batch.begin(2, new)
    engine.layer.update(k[:, :, T:], v[:, :, T:])
    keys, values = engine.layer.dequantize()
    assert keys.shape == values.shape == (2, HKV, T + new, D)
    n_sink, scaling = engine.lengths.schedule.n_sink, 0.13
    assert torch.equal(keys[:, :, -new:], k[:, :, T:])
    assert torch.equal(keys[:, :, :n_sink], k[:, :, :n_sink])
    out = engine.layer.attend(q[:, :, T:], scaling, k[:, :, T:], v[:, :, T:])
    assert out.dtype == dtype
    assert relative(out, softmax_attention(q[:, :, T:], keys, values, scaling, T)) <= 2e-3
    options = CASES[case][0]
    if options.get("k_bits", 2) or options.get("v_bits", 2):
        assert relative(out, softmax_attention(q[:, :, T:], k, v, scaling, T)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(dtype):
    engine = make("uncalibrated")
    q, k, v = stream(1, T + 1, dtype=dtype)
    engine.feed(*(x[:, :, :T] for x in (q, k, v)), chunks(2))
    engine.batch.begin(1, 1)
    engine.layer.update(k[:, :, T:], v[:, :, T:])
    out = engine.layer.attend(q[:, :, T:], D**-0.5, k[:, :, T:], v[:, :, T:])
    assert out.dtype == dtype
    expected = softmax_attention(q[:, :, T:], *engine.layer.dequantize(), D**-0.5, T)
    assert relative(out, expected) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", ["window", "window calibrated", "affine window", "short window"])
@pytest.mark.parametrize("new", [1, 9, 60])
@pytest.mark.parametrize(("k_bits", "bound"), [(None, 0.015), (8, 0.08)])
def test_attention_over_a_window(case, new, k_bits, bound):
    """Every query sees exactly its last ``window`` tokens, packed or not; sinks and older tokens are gone."""
    options, calibrated, window = CASES[case]
    if calibrated:
        calibrated = "alike"  # a whitening of other covariances costs bits
    engine = make((options, calibrated, window), k_bits=k_bits, v_bits=8)
    q, k, v = stream(1, 600)
    sizes = [40, *[1] * 70, 90, *[new] * ((400 - new) // new)]
    out = engine.feed(q, k, v, sizes)
    n = sum(sizes)
    expected = softmax_attention(*(x[:, :, :n] for x in (q, k, v)), D**-0.5, 0, window)
    error = (out - expected).norm(dim=(1, 3)) / expected.norm(dim=(1, 3))
    assert error.max() < bound
    if engine.layer.packs:
        assert engine.lengths.packed()[0] > engine.layer.table.columns * 16 > window, "pages were not used again"


@pytest.mark.parametrize(("options", "calibrated"), [({}, "alike"), (AFFINE, True)], ids=["visible", "affine"])
def test_attention_after_a_deep_crop(options, calibrated):
    """After a crop into packed tokens, attention reads those that are left and those that came after."""
    engine = make((options, calibrated, None), k_bits=8, v_bits=8)
    q, k, v = stream(2, 400)
    engine.feed(*(x[:, :, :T] for x in (q, k, v)), [T])
    engine.crop(145)
    kept = 155
    q, k, v = (torch.cat([x[:, :, :kept], x[:, :, T:]], 2) for x in (q, k, v))
    for at, n in ((kept, 1), (kept + 1, 60), (kept + 61, 1), (kept + 62, 38)):
        (out,) = engine.call(*(x[:, :, at : at + n] for x in (q, k, v)))
        expected = softmax_attention(q[:, :, at : at + n], k[:, :, : at + n], v[:, :, : at + n], D**-0.5, at)
        assert relative(out, expected) < 0.05


def test_a_rejected_draft_leaves_the_window_whole():
    """Attention behind a draft of 16 tokens that was rejected is that of a cache which never saw it, bit for bit."""
    q, k, v = stream(1, T + 33)
    plain, drafted = make("calibrated"), make("calibrated")
    for engine in (plain, drafted):
        engine.feed(*(x[:, :, :T] for x in (q, k, v)), [T])
    for begin in (1, 17):
        drafted.call(*(x[:, :, T + begin : T + begin + 16] for x in (q, k, v)))
        drafted.crop(16)
    outs = [engine.call(*(x[:, :, T : T + 1] for x in (q, k, v)))[0] for engine in (plain, drafted)]
    assert plain.layer.counts.read.tolist() == drafted.layer.counts.read.tolist() == [T - 4 - 32]
    assert drafted.lengths.packed()[0] == plain.lengths.packed()[0] + 15
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def test_two_deep_crops_and_selection():
    engine = make(({}, False, None), k_bits=8, v_bits=8)
    q, k, v = stream(2, 400)
    engine.feed(*(x[:, :, :T] for x in (q, k, v)), [T])
    engine.crop(100)
    engine.select([1, 0, 1])
    q, k, v = (x[[1, 0, 1]] for x in (q, k, v))
    engine.feed(*(x[:, :, T : T + 70] for x in (q, k, v)), [70])
    engine.crop(130)
    q, k, v = (torch.cat([x[:, :, :140], x[:, :, 390:]], 2) for x in (q, k, v))
    assert engine.lengths.totals() == [140] * 3
    (out,) = engine.call(*(x[:, :, 140:] for x in (q, k, v)))
    assert relative(out, softmax_attention(q[:, :, 140:], k, v, D**-0.5, 140)) < 0.02


@pytest.mark.parametrize(("calibrated", "head_dim"), [(False, 16), (False, D), (True, D)])
def test_non_finite_tokens_do_not_poison_other_sequences(calibrated, head_dim):
    q, k, v = stream(3, head_dim=head_dim)
    outs = []
    for bad in (None, float("nan"), float("inf")):
        keys, values, queries = k.clone(), v.clone(), q.clone()
        if bad is not None:
            keys[1, 0, 40, 3] = values[1, :, 30] = queries[1, :, 20] = bad
        engine = Engine.make({"check_finite": False}, calibrated, head_dim=head_dim)
        outs.append(engine.feed(queries, keys, values, [200, *[1] * 20, 80]))
    for poisoned in outs[1:]:
        assert torch.equal(poisoned[[0, 2]], outs[0][[0, 2]])
        assert not torch.isfinite(poisoned[1]).all()


# (c) what is counted as read from packed tokens was read there


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("calibrated", [False, True])
def test_reads_are_counted_by_hand(dtype, calibrated):
    """n_sink 4, a window of 32, 100 tokens: 64 packed; a step of its own serves one token in float32."""
    engine = make(({"epoch_tokens": 16}, calibrated, None))
    q, k, v = stream(1, 105, dtype=dtype)
    engine.batch.begin(1, 100)
    engine.layer.update(k[:, :, :100], v[:, :, :100])
    engine.layer.count_first()
    engine.layer.commit(q[:, :, :100])
    assert engine.layer.tokens_read == (0, 100 * 101 // 2)
    assert engine.lengths.packed() == [100 - 4 - 32]
    engine.call(*(x[:, :, 100:103] for x in (q, k, v)))
    assert engine.layer.tokens_read == (3 * 64, 5050 + 101 + 102 + 103)
    engine.call(*(x[:, :, 103:104] for x in (q, k, v)))
    packed = (64 if not calibrated else 67) + 3 * 64
    assert engine.layer.tokens_read == (packed, 5050 + 101 + 102 + 103 + 104)
    engine.call(*(x[:, :, 104:] for x in (q, k, v)))
    packed += 64 if not calibrated else 68
    assert engine.layer.tokens_read == (packed, 5050 + 101 + 102 + 103 + 104 + 105)


def test_reads_of_padded_sequences_by_hand():
    engine = make(({"epoch_tokens": 16}, False, None))
    q, k, v = stream(2, 101)
    engine.batch.begin(2, 100, [Span(0, 100), Span(70, 100)])
    engine.layer.update(k[:, :, :100], v[:, :, :100])
    engine.layer.count_first()
    engine.layer.commit(q[:, :, :100])
    assert engine.layer.tokens_read == (0, 5050 + 30 * 31 // 2)
    engine.call(*(x[:, :, 100:] for x in (q, k, v)))
    assert engine.layer.tokens_read == (64, 5050 + 465 + 101 + 31)


def test_reads_of_a_window_by_hand():
    """Window 50, 100 tokens: query 100 sees positions 51 to 100, of which 51 to 67 are packed."""
    engine = make(({"epoch_tokens": 16}, False, 50))
    q, k, v = stream(1, 101)
    engine.batch.begin(1, 100)
    engine.layer.update(k[:, :, :100], v[:, :, :100])
    engine.layer.count_first()
    engine.layer.commit(q[:, :, :100])
    assert engine.layer.tokens_read == (0, sum(min(i, 50) for i in range(1, 101)))
    engine.call(*(x[:, :, 100:] for x in (q, k, v)))
    assert engine.layer.tokens_read == (17, sum(min(i, 50) for i in range(1, 101)) + 50)


def check_reads(case):
    """Spoiling the pages that were counted as read changes what attention gives, and nothing else in them does: tokens
    that the ring still has do not count."""
    engine = make(case)
    q, k, v = stream(1, T + 1)
    engine.feed(*(x[:, :, :T] for x in (q, k, v)), [T])
    layer, outs, counted = engine.layer, [], []
    packed = engine.lengths.packed()[0]
    assert packed == (T - 4 - 32 if CASES[case][1] else (T - 4 - 32) // 16 * 16)
    pages, window = [t.clone() for t in layer.pool.tensors], [layer.window.k.clone(), layer.window.v.clone()]
    for spoil in ("nothing", "pages", "ring"):
        for t, kept in zip(layer.pool.tensors, pages, strict=True):
            t.copy_(kept)
        if spoil == "pages":
            for t in layer.pool.tensors:
                t.copy_(t.flip(-1))
        for t, kept in zip((layer.window.k, layer.window.v), window, strict=True):
            t.copy_(kept)
            if spoil == "ring":  # the packed tokens that it still has
                slots = 4 + torch.arange(packed - 16, packed) % layer.window.ring
                t[:, :, slots] = 1e4
        before = layer.tokens_read
        engine.batch.begin(1, 1)
        layer.update(k[:, :, T:], v[:, :, T:])
        outs.append(layer.attend(q[:, :, T:], D**-0.5, k[:, :, T:], v[:, :, T:]))
        counted.append(tuple(x - y for x, y in zip(layer.tokens_read, before, strict=True)))
        engine.crop(1)
    sliding = layer.sliding_window or T + 1
    assert counted == [(packed - max(T + 1 - sliding - 4, 0), min(T + 1, sliding))] * 3
    assert not torch.equal(outs[1], outs[0]), "what was counted was not read"
    torch.testing.assert_close(outs[2], outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", PLAIN)
def test_counted_reads_are_of_pages(case):
    check_reads(case)


def reads_the_ring(monkeypatch):
    """Attention reads the ring, and counts as before."""
    attend = PlaneCodec.attend

    def fault(self, q, scaling, kv, visible, sliding, reads):
        out = attend(self, q, scaling, kv, visible, sliding, reads)
        ring = kv.window_k.shape[2] - kv.n_sink
        low = kv.packed.minimum((kv.total - kv.n_sink - ring).clamp(min=0))
        attend(self, q, scaling, kv, visible, sliding, None)
        return (attend(self, q, scaling, dataclasses.replace(kv, packed=low), visible, sliding, None), out)[0]

    monkeypatch.setattr(PlaneCodec, "attend", fault)
    monkeypatch.setattr(PlaneCodec, "plan", lambda self, *rest: None)


def counts_all(monkeypatch):
    """Tokens in full precision count as packed ones."""
    monkeypatch.setattr(PackedLayer, "tokens_read", property(lambda self: (int(self.reads[1]), int(self.reads[1]))))


def reads_no_page(monkeypatch):
    """Pages are neither read nor counted."""
    monkeypatch.setattr(Batch, "settle", lambda self: None)
    paged = PackedLayer._reading
    monkeypatch.setattr(PackedLayer, "_reading", lambda self: dataclasses.replace(paged(self), packed=self.counts.none))
    monkeypatch.setattr(PlaneCodec, "plan", lambda self, *rest: None)


@pytest.mark.parametrize("fault", [reads_the_ring, counts_all, reads_no_page])
@pytest.mark.parametrize("case", ["calibrated", "uncalibrated"])
def test_reads_that_were_not_of_pages_are_found(case, fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_reads(case)


@pytest.mark.parametrize("case", PLAIN)
def test_counted_reads_are_visible_tokens(case):
    """Whatever the calls are: all tokens that queries see, by a count of their positions."""
    engine, (q, k, v), expected = make(case), stream(2), [0, 0]
    spans, at, sliding = [(0, T), (77, T)], 0, CASES[case][2] or T
    for n in chunks(7):
        here = [Span(*(min(max(x - at, 0), n) for x in span)) for span in spans]
        before = engine.lengths.totals() or [0, 0]
        engine.call(*(x[:, :, at : at + n] for x in (q, k, v)), here)
        read = engine.layer.counts.read.tolist()
        for b, span in enumerate(here):
            for p in range(before[b], before[b] + span.length):
                seen = range(max(p - sliding + 1, 0), p + 1)
                expected[0] += sum(4 <= x < 4 + read[b] for x in seen)
                expected[1] += len(seen)
        at += n
    assert engine.layer.tokens_read == tuple(expected) and expected[0] > 0


def test_an_evaluation_fails_where_nothing_packed_was_read(tiny, token_ids, monkeypatch):
    """The same rows are scored through the cache, and refused where its counts say that no page was read."""
    model, rows = tiny(layers=1), token_ids(1, 200)
    exact = {n: exact_logprobs(model, rows[:, :m], n, False) for n, m in ((150, 200), (30, 60))}
    quantize_(model, headq_config(epoch_tokens=32, residual_length=32, block_size=16))
    given = {"prefill": 150, "chunk": 25, "progress": False}
    assert 0 < score(model, rows, exact[150], **given).packed_fraction < 1
    with pytest.raises(NothingPackedError):
        score(model, rows[:, :60], exact[30], prefill=30, chunk=10, progress=False)
    reads_no_page(monkeypatch)
    with pytest.raises(NothingPackedError):
        score(model, rows, exact[150], **given)


def test_moments_are_of_the_stream():
    """What calibrated cases stand on: two streams of different statistics."""
    assert not torch.allclose(moments(0).c_q, moments(1).c_q)
