"""The cache layer's invariants, on float64 streams: no call boundary and no later token changes a packed row."""

import dataclasses
import hashlib
import random

import pytest
import torch

from headq_ao import headq_config
from headq_ao.allocate import HeadBits
from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.calibration import MomentAccumulator
from headq_ao.layer_codec import LayerCodec
from headq_ao.layer_state import Incoming
from headq_ao.models import LayerShape
from headq_ao.seen import seen_weights
from headq_ao.state import Span

HQ, HKV, D, T = 4, 2, 32, 300
SMALL = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
AFFINE = {"key_codec": "affine", "value_codec": "affine"}
MIXED = {"block_size": 32}  # values of odd bits pack in that many tokens
ZEROS = AFFINE | {"k_zero_point": True, "v_zero_point": True}
CASES = {
    "calibrated": ({"adapt": "off"}, True, None),
    "prompt": ({"adapt": "prompt"}, True, None),
    "uncalibrated": ({}, False, None),
    "side code": ({"rank": 8, "basis": "score_optimal"}, False, None),
    "side code prompt": ({"rank": 8}, True, None),
    "nearest codes": ({"error_feedback": False}, False, None),
    "affine calibrated": (AFFINE | {"adapt": "off"}, True, None),
    "affine prompt": (AFFINE, True, None),
    "affine": (AFFINE, False, None),
    "affine score_optimal": (AFFINE | {"basis": "score_optimal"}, False, None),
    "affine random": (AFFINE | {"basis": "random"}, False, None),
    "three bits": ({"k_bits": 3, "v_bits": 3, "block_size": 32}, False, None),
    "keys only": ({"v_bits": None}, False, None),
    "values only": ({"k_bits": None}, False, None),
    "values only calibrated": ({"k_bits": None}, True, None),
    "zero points": (ZEROS | {"v_group_size": 16}, False, None),
    "zero points prompt": (ZEROS, True, None),
    "biased scale": ({"unbiased_scale": False}, False, None),
    "affine, no side code": (AFFINE | {"rank": 0}, True, None),
    "window": ({}, False, 80),
    "window prompt": ({}, True, 80),
    "affine window": (AFFINE, False, 80),
    "affine window prompt": (AFFINE, True, 80),
    "short window": ({}, False, 20),
    "no sink": ({"n_sink": 0}, False, None),
    "bits by head": (MIXED | {"head_bits": HeadBits((3, 1), (2, 5))}, True, None),
    "bits by head, keys alone differ": (MIXED | {"head_bits": HeadBits((2, 4), (3, 3))}, True, None),
    "bits by head, eight of them": (MIXED | {"head_bits": HeadBits((8, 2), (8, 1))}, True, None),
    "bits by head prompt": (MIXED | {"head_bits": HeadBits((1, 2), (1, 1)), "adapt": "prompt"}, True, None),
    "bits by head, side code": (MIXED | {"head_bits": HeadBits((3, 2), (2, 2)), "rank": 8}, True, None),
    "bits by head, keys only": (MIXED | {"head_bits": HeadBits((4, 2), ()), "v_bits": None}, True, None),
    "bits by head, values only": (MIXED | {"head_bits": HeadBits((), (2, 3)), "k_bits": None}, True, None),
    "bits by head window": (MIXED | {"head_bits": HeadBits((3, 1), (1, 3))}, True, 80),
}


def stream(batch=1, tokens=T, seed=0, dtype=torch.float64, head_dim=D, like=None):
    """Queries, keys and values; ``like``: with the means and covariances of the stream of that seed."""
    g = torch.Generator().manual_seed(seed if like is None else like)
    mix = torch.randn(head_dim, head_dim, generator=g, dtype=torch.float64)
    mean = torch.randn(HKV, 1, head_dim, generator=g, dtype=torch.float64) * 3
    g.manual_seed(seed + 100)

    def draw(heads):
        return torch.randn(batch, heads, tokens, head_dim, generator=g, dtype=torch.float64) @ mix / 4

    return [x.to(dtype) for x in (draw(HQ), draw(HKV) + mean, draw(HKV))]


def moments(like=1):
    q, k, v = (x.float() for x in stream(tokens=512, seed=1, like=like))
    accumulator = MomentAccumulator(512)
    weights = (x[0].T for x in seen_weights(q, k, D**-0.5, n_sink=0))
    accumulator.add(*(x[0].transpose(0, 1) for x in (q, k, v)), list(weights), torch.rand(512))
    return accumulator.moments()


def make(options=None, calibrated=False, window=None, head_dim=D):
    """``calibrated``: False, True (on a stream of other means and covariances) or "alike" (on one of the same)."""
    options = SMALL | (options or {})
    bits = options.pop("head_bits", None)
    config, shape = headq_config(**options), LayerShape(HQ, HKV, head_dim, window)
    like = {"alike": 0, True: 1}.get(calibrated)
    codec = LayerCodec(config, shape, None if like is None else moments(like), torch.device("cpu"), bits=bits)
    return HeadQCacheLayer(config, shape), codec


def feed(layer, codec, q, k, v, sizes, attend=False, spans=None):
    """Run a stream through a layer as attention does; outputs of all calls where ``attend``."""
    outs, at = [], 0
    for n in sizes:
        part = slice(at, at + n)
        if spans is not None:
            layer.incoming.seen, layer.incoming.length = at, n
            layer.incoming.spans = [Span(min(max(a - at, 0), n), min(max(b - at, 0), n)) for a, b in spans]
        layer.update(k[:, :, part], v[:, :, part])
        if attend:
            outs.append(layer.attend(q[:, :, part], D**-0.5, codec))
        layer.commit(q[:, :, part], codec)
        at += n
    return torch.cat(outs, 2) if attend else None


def chunks(kind, tokens=T):
    if kind == "one call":
        return [tokens]
    if kind == "token by token":
        return [1] * tokens
    generator, sizes = random.Random(kind), []
    while sum(sizes) < tokens:
        sizes.append(min(generator.choice([1, 1, 2, 3, 7, 16, 33, 64, 100]), tokens - sum(sizes)))
    return sizes


def stored(layer, b=0):
    """Everything kept of row ``b``'s packed tokens: codes, scales, zeros, and the statistics they were coded with."""
    end, state = layer.rows[b].slots, {}
    for side, store in (("k", layer.store_k), ("v", layer.store_v)):
        for i, x in enumerate(store.view(0, end)):
            state[f"{side}{i}"] = x[b]
    for e, epoch in enumerate(layer.epochs):
        if epoch.codec is not None:
            for name, x in epoch.codec.tensors().items():
                state[f"epoch {e} {name}"] = x[b] if name in epoch.codec.own else x[0]
    return state


def aligned(layer, state, newest):
    """``state`` from slot ``newest`` on: window layers let go of old blocks at their own pace."""
    skip = newest - layer.rows[0].dropped
    units = {"k": layer.store_k.units, "v": layer.store_v.units}
    return {name: x[:, skip // units[name[0]][int(name[1:])] :] if name[0] in "kv" else x for name, x in state.items()}


def assert_same_state(one, other):
    assert dataclasses.replace(one.rows[0], dropped=0, slots=0, packed=0) == dataclasses.replace(
        other.rows[0], dropped=0, slots=0, packed=0
    )
    newest = max(one.rows[0].dropped, other.rows[0].dropped)
    a, b = aligned(one, stored(one), newest), aligned(other, stored(other), newest)
    names = {n for n in a if not n.startswith("epoch")} | {n for n in b if not n.startswith("epoch")}
    for name in names:
        assert torch.equal(a[name], b[name]), name
    statistics = [{k: v for k, v in x.items() if k.startswith("epoch")} for x in (a, b)]
    last = min(len(one.epochs), len(other.epochs))
    assert last
    assert [e.ready for e in one.epochs[-last:]] == [e.ready for e in other.epochs[-last:]]
    if len(one.epochs) == len(other.epochs):
        assert statistics[0].keys() == statistics[1].keys()
        for name, x in statistics[0].items():
            assert torch.equal(x, statistics[1][name]), name
    held = one.rows[0].exact
    assert held == other.rows[0].exact
    for x, y in zip(one.exact.tensors(), other.exact.tensors(), strict=True):
        assert torch.equal(x[:, :, :held], y[:, :, :held])


# (b) call boundaries do not matter


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["token by token", 1, 2, 3])
def test_codes_do_not_depend_on_calls(case, kind):
    options, calibrated, window = CASES[case]
    one, codec = make(options, calibrated, window)
    feed(one, codec, *stream(), chunks("one call"))
    many, codec = make(options, calibrated, window)
    feed(many, codec, *stream(), chunks(kind))
    if not one._never_packs:
        assert one.rows[0].slots > 0
    assert_same_state(one, many)


@pytest.mark.parametrize("adapt", ["off", "prompt"])
def test_long_prefill_is_encoded_in_pieces_of_the_same_rows(adapt, monkeypatch):
    """A prefill longer than ``ENCODE_TOKENS`` is coded piecewise."""
    monkeypatch.setattr("headq_ao.closing.ENCODE_TOKENS", 48)
    pieces, codec = make({"adapt": adapt}, True)
    feed(pieces, codec, *stream(), [T])
    monkeypatch.undo()
    whole, codec = make({"adapt": adapt}, True)
    feed(whole, codec, *stream(), [T])
    assert_same_state(whole, pieces)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batch_equals_rows_alone(case, side):
    options, calibrated, window = CASES[case]
    lengths, q_k_v = (T, 217, 101, 3), stream(4)
    spans = [(T - n, T) if side == "left" else (0, n) for n in lengths]
    for x in q_k_v:  # pads must not be read at all
        for b, (a, z) in enumerate(spans):
            x[b, :, :a] = x[b, :, z:] = float("nan")
    batch, codec = make(options, calibrated, window)
    feed(batch, codec, *q_k_v, chunks(5), spans=spans)
    for b, (a, z) in enumerate(spans):
        alone, codec = make(options, calibrated, window)
        feed(alone, codec, *(x[b : b + 1, :, a:z] for x in q_k_v), chunks(6, z - a))
        assert batch.rows[b].tokens == alone.rows[0].tokens == z - a
        newest = max(batch.rows[b].dropped, alone.rows[0].dropped)
        for store, other in ((batch.store_k, alone.store_k), (batch.store_v, alone.store_v)):
            if not alone.rows[0].slots:
                continue
            x = store.view(newest - batch.rows[b].dropped, batch.rows[b].slots)
            y = other.view(newest - alone.rows[0].dropped, alone.rows[0].slots)
            for i, j in zip(x, y, strict=True):
                assert torch.equal(i[b], j[0])
        for e, epoch in enumerate(alone.epochs):
            if epoch.codec is None or len(alone.epochs) != len(batch.epochs):
                continue
            for name, x in epoch.codec.tensors().items():
                mine = batch.epochs[e].codec.tensors()[name]
                assert torch.equal(mine[b] if name in epoch.codec.own else mine[0], x[0]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [50, 90, 250])
def test_selected_rows_equal_their_own_streams(case, at):
    """Selecting rows in mid-stream carries codes, exact rows, awaited statistics and codecs along."""
    options, calibrated, window = CASES[case]
    order, q_k_v = [2, 0, 2], stream(3)
    batch, codec = make(options, calibrated, window)
    feed(batch, codec, *(x[:, :, :at] for x in q_k_v), [at])
    batch.batch_select_indices(torch.tensor(order))
    feed(batch, codec, *(x[order][:, :, at:] for x in q_k_v), [60, *[1] * (T - at - 60)] if at < T - 60 else [T - at])
    for b, source in enumerate(order):
        alone, codec = make(options, calibrated, window)
        feed(alone, codec, *(x[source : source + 1] for x in q_k_v), [at, T - at])
        assert batch.rows[b].tokens == alone.rows[0].tokens
        newest = max(batch.rows[b].dropped, alone.rows[0].dropped)
        for store, other in ((batch.store_k, alone.store_k), (batch.store_v, alone.store_v)):
            x = store.view(newest - batch.rows[b].dropped, batch.rows[b].slots)
            y = other.view(newest - alone.rows[0].dropped, alone.rows[0].slots)
            assert all(torch.equal(i[b], j[0]) for i, j in zip(x, y, strict=True))
        held = alone.rows[0].exact
        assert torch.equal(batch.exact.k[b, :, :held], alone.exact.k[0, :, :held])
        assert torch.equal(batch.exact.v[b, :, :held], alone.exact.v[0, :, :held])


@pytest.mark.parametrize("codec_name", ["visible", "affine"])
def test_statistics_ignore_sinks_and_what_follows_the_epoch(codec_name):
    """Visible statistics see a sink in one way only: it draws attention from the keys that count."""
    changed, (q, k, v) = [], stream()
    for at in (2, 50, 4 + 64 + 10):  # a sink, a token of the epoch, one behind it
        other = k.clone()
        other[:, :, at] += 100
        means = []
        for keys in (k, other):
            layer, codec = make({"key_codec": codec_name})
            feed(layer, codec, q, keys, v, [T])
            means.append(layer.epochs[0].codec.mean)
        changed.append(not torch.equal(*means))
    assert changed == [codec_name == "visible", True, False]


def test_statistics_are_those_of_the_stream():
    q, k, v = stream()
    layer, codec = make(AFFINE | {"basis": "query_pca", "rank": 8})
    feed(layer, codec, q, k, v, chunks(1))
    own = layer.epochs[0].codec
    torch.testing.assert_close(own.mean[0].double(), k[0, :, 4:68].mean(1), rtol=1e-3, atol=1e-3)
    for h in range(HKV):
        rows = q[0, 2 * h : 2 * h + 2, 4:68].flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        top = vectors[:, -8:]
        basis = own.side_encode[0, h].double()
        torch.testing.assert_close(top @ (top.T @ basis), basis, rtol=0, atol=2e-3)
        assert values[-1] > 0


@pytest.mark.parametrize(("scaling", "window"), [(None, None), (1.0, None), (None, 60)])
def test_visible_statistics_are_those_of_the_stream(scaling, window):
    """Mean, spread and seen directions of the epoch's rows, each row weighted as attention sees it."""
    q, k, v = stream()
    layer, codec = make({"whitening": 0.5}, window=window)
    at = 0
    for n in chunks(1):
        layer.update(k[:, :, at : at + n], v[:, :, at : at + n])
        layer.commit(q[:, :, at : at + n], codec, scaling)
        at += n
    own, (q, k) = layer.epochs[0].codec, (x[:, :, :68] for x in (q, k))
    of_q, of_k, _ = seen_weights(q, k, D**-0.5 if scaling is None else scaling, n_sink=4, window=window)
    for h in range(HKV):
        w = of_k[0, h, 4:]
        w = 0.25 + 0.75 * w / w.mean()
        mean = sum(w[j] * k[0, h, 4 + j] for j in range(64)) / 64
        torch.testing.assert_close(own.mean[0, h].double(), mean, rtol=1e-3, atol=1e-3)
        variance = sum(w[j] * (k[0, h, 4 + j] - mean) ** 2 for j in range(64)) / 64
        spread = (variance + 1e-4 * variance.mean()) ** 0.25
        torch.testing.assert_close(own.spread[0, h].double(), spread / spread.log().mean().exp(), rtol=1e-3, atol=1e-3)
        w = of_q[0, 2 * h : 2 * h + 2, 4:].flatten()
        w = 0.25 + 0.75 * w / w.mean()
        rows = q[0, 2 * h : 2 * h + 2, 4:68].flatten(0, 1)
        c_q = (rows * w[:, None]).T @ rows / len(rows)
        values, vectors = torch.linalg.eigh(c_q + 0.1 * c_q.trace() / D * torch.eye(D))
        floor = values[:16].mean()  # a codec of head_dim 32 keeps 16 directions
        kept = (vectors[:, 16:] * (values[16:] / floor - 1)) @ vectors[:, 16:].T
        seen = own.seen[0, h].double()
        torch.testing.assert_close(seen @ seen.T, kept, rtol=0, atol=2e-3 * float(kept.abs().max()))


@pytest.mark.parametrize("codec_name", ["visible", "affine"])
def test_the_gauge_of_a_calibration_is_refined(codec_name):
    q, k, v = stream()
    prompt, codec = make({"adapt": "prompt", "prior_tokens": 100, "key_codec": codec_name}, True)
    feed(prompt, codec, q, k, v, chunks(1))
    prior = moments().k_mean if codec_name == "affine" else moments().seen("k")[0]
    expected = (prior.double() * 100 + k[0, :, 4:68].sum(1)) / 164
    torch.testing.assert_close(prompt.epochs[1].codec.mean[0].double(), expected, rtol=1e-3, atol=1e-3)


def test_deep_crop_does_not_count_tokens_twice():
    """Tokens that are folded again after a deep crop weigh as many tokens as were folded."""
    q, k, v = stream()
    layer, codec = make({"adapt": "prompt", "prior_tokens": 0}, True)
    feed(layer, codec, q[:, :, :90], k[:, :, :90], v[:, :, :90], [90])
    layer.crop(-80)
    assert (layer.rows[0].tokens, layer.rows[0].packed, layer.rows[0].slots) == (10, 6, 16)
    feed(layer, codec, q[:, :, 10:], k[:, :, 10:], v[:, :, 10:], [290])
    folded = torch.cat([k[0, :, 4:52], k[0, :, 10:58]], 1)
    torch.testing.assert_close(layer.epochs[1].codec.mean[0].double(), folded.mean(1), rtol=1e-3, atol=1e-3)


# (a) a closed block never changes


def block_digests(layer, b=0):
    """A digest of each closed block of row ``b`` by its absolute slot."""
    block, row, digests = layer.config.block_size, layer.rows[b], {}
    for slot in range(0, row.slots, block):
        h = hashlib.sha256()
        for store in (layer.store_k, layer.store_v):
            for x in store.view(slot, slot + block):
                h.update(x[b].contiguous().view(torch.uint8).numpy().tobytes())
        digests[row.dropped + slot] = h.hexdigest()
    return digests


@pytest.mark.parametrize("case", CASES)
def test_closed_blocks_never_change(case):
    options, calibrated, window = CASES[case]
    layer, codec = make(options, calibrated, window)
    q, k, v = stream(2, 500)
    spans, seen, at, capacities = [(0, 500), (130, 500)], [{}, {}], 0, set()
    for n in chunks(4, 500):
        layer.incoming.seen, layer.incoming.length = at, n
        layer.incoming.spans = [Span(min(max(a - at, 0), n), min(max(b - at, 0), n)) for a, b in spans]
        layer.update(k[:, :, at : at + n], v[:, :, at : at + n])
        layer.attend(q[:, :, at : at + n], D**-0.5, codec)
        layer.commit(q[:, :, at : at + n], codec)
        at += n
        capacities.add(layer.store_k.capacity)
        for b in (0, 1):
            now = block_digests(layer, b)
            for slot, digest in now.items():
                assert seen[b].setdefault(slot, digest) == digest, f"block at slot {slot} of row {b} changed"
    if not layer._never_packs:
        assert len(seen[0]) * layer.config.block_size >= 400 and len(seen[1]) * layer.config.block_size >= 240
        assert len(capacities) > 3, "storage did not grow: nothing was tested"


def test_deep_crop_re_encodes_nothing():
    layer, codec = make(calibrated=True)
    q, k, v = stream(2)
    feed(layer, codec, q, k, v, [T])
    before = [block_digests(layer, b) for b in (0, 1)]
    layer.crop(-150)
    assert [r.tokens for r in layer.rows] == [150, 150]
    for b in (0, 1):
        after = block_digests(layer, b)
        assert 0 < len(after) < len(before[b])
        assert all(before[b][slot] == digest for slot, digest in after.items())


# Attention


def reference_attention(q, keys, values, scaling, first, window=None):
    """Softmax attention in float64; query ``i`` stands at position ``first + i``."""
    q, keys, values = q.double(), keys.double(), values.double()
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
    scores = q @ keys.transpose(-1, -2) * scaling
    i, j = torch.arange(first, first + q.shape[2])[:, None], torch.arange(keys.shape[2])[None]
    visible = (j <= i) if window is None else (j <= i) & (j > i - window)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", [c for c in CASES if "window" not in c])
@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_equals_softmax_over_dequantized_rows(case, new, dtype, reference_ops):
    check_attention(case, new, dtype, 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if "window" not in c])
@pytest.mark.parametrize("new", [1, 9])
def test_attention_of_the_default_kernel(case, new):
    """The compiled kernel maps queries to integers too: not fp32's error, but far below that of the codes."""
    check_attention(case, new, torch.float32, 2e-3)


def check_attention(case, new, dtype, bound):
    options, calibrated, _ = CASES[case]
    layer, codec = make(options, calibrated)
    q, k, v = stream(2, T + new, dtype=dtype)
    feed(layer, codec, q[:, :, :T], k[:, :, :T], v[:, :, :T], [T])
    layer.update(k[:, :, T:], v[:, :, T:])
    keys, values = layer.dequantize(codec)
    assert keys.shape == values.shape == (2, HKV, T + new, D)
    n_sink, scaling = layer.config.n_sink, 0.13
    assert torch.equal(keys[:, :, -new:], k[:, :, T:])
    assert torch.equal(keys[:, :, :n_sink], k[:, :, :n_sink])
    out = layer.attend(q[:, :, T:], scaling, codec)
    assert out.dtype == dtype
    assert relative(out, reference_attention(q[:, :, T:], keys, values, scaling, T)) <= bound
    if options.get("k_bits", 2) or options.get("v_bits", 2):
        assert relative(out, reference_attention(q[:, :, T:], k, v, scaling, T)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(dtype):
    layer, codec = make()
    q, k, v = stream(1, T + 1, dtype=dtype)
    feed(layer, codec, q[:, :, :T], k[:, :, :T], v[:, :, :T], chunks(2))
    layer.update(k[:, :, T:], v[:, :, T:])
    out = layer.attend(q[:, :, T:], D**-0.5, codec)
    assert out.dtype == dtype
    layer.dtype = torch.float32  # rows in full, to compare with
    keys, values = (torch.cat([x.float()], 2) for x in layer.dequantize(codec))
    expected = reference_attention(q[:, :, T:], keys, values, D**-0.5, T)
    assert relative(out, expected) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", ["window", "window prompt", "affine window", "affine window prompt", "short window"])
@pytest.mark.parametrize("new", [1, 9, 60])
@pytest.mark.parametrize(("k_bits", "bound"), [(None, 0.015), (8, 0.08)])
def test_attention_over_a_window(case, new, k_bits, bound):
    """Every query sees exactly its last ``window`` tokens, packed or not; sinks and older tokens are gone."""
    options, calibrated, window = CASES[case]
    if calibrated and "affine" not in case:
        calibrated = "alike"  # a whitening of other covariances costs bits
    layer, codec = make(options | {"k_bits": k_bits, "v_bits": 8}, calibrated, window)
    q, k, v = stream(1, 600)
    sizes = [40, *[1] * 70, 90, *[new] * ((400 - new) // new)]
    out = feed(layer, codec, q, k, v, sizes, attend=True)
    n = sum(sizes)
    expected = reference_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], D**-0.5, 0, window)
    error = (out - expected).norm(dim=(1, 3)) / expected.norm(dim=(1, 3))
    assert error.max() < bound
    assert layer.rows[0].dropped > 100


@pytest.mark.parametrize(("options", "calibrated"), [({}, "alike"), (AFFINE, True)], ids=["visible", "affine"])
def test_attention_over_holes(options, calibrated):
    """After a crop into packed rows, attention reads the rows that are left and those that came after."""
    layer, codec = make(options | {"k_bits": 8, "v_bits": 8}, calibrated)
    q, k, v = stream(2, 400)
    feed(layer, codec, q[:, :, :T], k[:, :, :T], v[:, :, :T], [T])
    layer.crop(-145)
    kept = 155
    k, v, q = (torch.cat([x[:, :, :kept], x[:, :, T:]], 2) for x in (k, v, q))
    for at, n in ((kept, 1), (kept + 1, 60), (kept + 61, 1), (kept + 62, 38)):
        layer.update(k[:, :, at : at + n], v[:, :, at : at + n])
        out = layer.attend(q[:, :, at : at + n], D**-0.5, codec)
        layer.commit(q[:, :, at : at + n], codec)
        expected = reference_attention(q[:, :, at : at + n], k[:, :, : at + n], v[:, :, : at + n], D**-0.5, at)
        assert relative(out, expected) < 0.05
    assert layer.valid is not None and not bool(layer.valid[0, : layer.rows[0].slots].all())
    assert layer.rows[0].packed == int(layer.valid[0, : layer.rows[0].slots].sum())
    with pytest.raises(ValueError, match="no deep crop"):
        layer.dequantize(codec)


def test_holes_are_read_as_the_dequantized_rows_that_are_left():
    layer, codec = make()
    q, k, v = stream(1, T + 40)
    feed(layer, codec, q[:, :, :T], k[:, :, :T], v[:, :, :T], [T])
    keys, values = layer.dequantize(codec)
    layer.crop(-117)
    new = slice(T, T + 40)
    layer.update(k[:, :, new], v[:, :, new])
    out = layer.attend(q[:, :, new], 0.2, codec)
    keys, values = (torch.cat([x[:, :, : T - 117], y[:, :, new]], 2) for x, y in ((keys, k), (values, v)))
    assert relative(out, reference_attention(q[:, :, new], keys, values, 0.2, T - 117)) <= 1e-6


def test_two_deep_crops_and_selection():
    layer, codec = make({"k_bits": 8, "v_bits": 8})
    q, k, v = stream(2, 400)
    feed(layer, codec, q[:, :, :T], k[:, :, :T], v[:, :, :T], [T])
    layer.crop(-100)
    layer.batch_select_indices(torch.tensor([1, 0, 1]))
    k, v, q = (x[[1, 0, 1]] for x in (k, v, q))
    feed(layer, codec, *(x[:, :, T : T + 70] for x in (q, k, v)), [70])
    layer.crop(-130)
    rows = [torch.cat([x[:, :, :140], x[:, :, 390:]], 2) for x in (q, k, v)]
    assert [r.tokens for r in layer.rows] == [140] * 3
    layer.update(rows[1][:, :, 140:], rows[2][:, :, 140:])
    out = layer.attend(rows[0][:, :, 140:], D**-0.5, codec)
    assert relative(out, reference_attention(rows[0][:, :, 140:], rows[1], rows[2], D**-0.5, 140)) < 0.02


@pytest.mark.parametrize(("calibrated", "head_dim"), [(False, 16), (False, D), (True, D)])
def test_non_finite_rows_do_not_poison_others(calibrated, head_dim):
    q, k, v = stream(3, head_dim=head_dim)
    outs = []
    for bad in (None, float("nan"), float("inf")):
        keys, values, queries = k.clone(), v.clone(), q.clone()
        if bad is not None:
            keys[1, 0, 40, 3] = values[1, :, 30] = queries[1, :, 20] = bad
        layer, codec = make({"check_finite": False}, calibrated, head_dim=head_dim)
        outs.append(feed(layer, codec, queries, keys, values, [200, *[1] * 20, 80], attend=True))
    for poisoned in outs[1:]:
        assert torch.equal(poisoned[[0, 2]], outs[0][[0, 2]])
        assert not torch.isfinite(poisoned[1]).all()


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_rows_are_refused_by_sequence_and_slot(name, bad):
    layer, codec = make()
    q, k, v = stream(3)
    feed(layer, codec, q[:, :, :50], k[:, :, :50], v[:, :, :50], [50])
    (k if name == "keys" else v)[2, 1, 57, 3] = bad
    with pytest.raises(ValueError, match=f"{name} must be finite.* in sequence 2 from slot 50 on"):
        layer.update(k[:, :, 50:60], v[:, :, 50:60])
    assert layer.seen == 50, "a refused call must not enter the cache"


def test_wrong_shapes_are_refused():
    layer, _ = make()
    _, k, v = stream()
    with pytest.raises(ValueError, match=r"caches 2 heads of 32, got keys \(1, 1, 300, 32\)"):
        layer.update(k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match=r"caches 2 heads of 32"):
        layer.update(k, v[..., :16])


# (c) packed_fraction counts real reads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reads_are_counted_by_hand(dtype):
    """n_sink 4, residual 32, blocks of 16, 100 tokens: 64 packed (four blocks) and 36 exact; one token has a path of
    its own in float32."""
    layer, codec = make({"epoch_tokens": 16})
    q, k, v = stream(1, 104, dtype=dtype)
    layer.update(k[:, :, :100], v[:, :, :100])
    layer.count_exact_reads()
    layer.commit(q[:, :, :100], codec)
    assert layer.rows_read == [0, 100 * 101 // 2]
    assert layer.rows[0].packed == (100 - 4 - 32) // 16 * 16 == 64
    layer.update(k[:, :, 100:103], v[:, :, 100:103])
    layer.attend(q[:, :, 100:103], 1.0, codec)
    assert layer.rows_read == [3 * 64, 5050 + 101 + 102 + 103]
    layer.commit(q[:, :, 100:103], codec)
    layer.update(k[:, :, 103:], v[:, :, 103:])
    layer.attend(q[:, :, 103:], 1.0, codec)
    assert layer.rows_read == [4 * 64, 5050 + 101 + 102 + 103 + 104]


def test_reads_of_padded_rows_by_hand():
    layer, codec = make({"epoch_tokens": 16})
    q, k, v = stream(2, 101)
    feed(layer, codec, q[:, :, :100], k[:, :, :100], v[:, :, :100], [100], spans=[(0, 100), (70, 100)])
    layer.count_exact_reads()
    assert layer.rows_read == [0, 5050 + 30 * 31 // 2]
    layer.incoming = Incoming()
    layer.update(k[:, :, 100:], v[:, :, 100:])
    layer.attend(q[:, :, 100:], 1.0, codec)
    assert layer.rows_read == [64, 5050 + 465 + 101 + 31]


def test_reads_of_a_window_by_hand():
    """Window 50, 100 tokens: query 100 sees positions 51 to 100, of which 51 to 67 are packed."""
    layer, codec = make({"epoch_tokens": 16}, window=50)
    q, k, v = stream(1, 101)
    layer.update(k[:, :, :100], v[:, :, :100])
    layer.count_exact_reads()
    layer.commit(q[:, :, :100], codec)
    assert layer.rows_read == [0, sum(min(i, 50) for i in range(1, 101))]
    assert layer.rows[0].packed + layer.rows[0].dropped == 64
    layer.update(k[:, :, 100:], v[:, :, 100:])
    layer.attend(q[:, :, 100:], 1.0, codec)
    assert layer.rows_read == [17, sum(min(i, 50) for i in range(1, 101)) + 50]


@pytest.mark.parametrize("case", ["uncalibrated", "prompt", "window"])
def test_counted_reads_are_visible_slots(case, monkeypatch):
    """What is counted is what ``decode_attention`` and ``attend_runs`` were asked to read."""
    options, calibrated, window = CASES[case]
    layer, codec = make(options, calibrated, window)
    asked = [0, 0]
    from headq_ao import reading

    decode, attend = reading.decode_attention, reading.attend_runs

    def count(slots, start, stop, packed):
        n = int(((torch.arange(slots) >= start[..., None]) & (torch.arange(slots) < stop[..., None])).sum())
        asked[0] += n if packed else 0
        asked[1] += n

    def spy(query, keys, values, start, stop, valid=None):
        slots = keys.scale.shape[2] if keys.exact is None else keys.exact.shape[2]
        count(slots, start, stop, keys.exact is None)
        return decode(query, keys, values, start, stop, valid)

    def spy_attend(query, start, stop, valid, runs, exact):
        count(runs[0][1].scale.shape[2], start, stop, True)
        count(exact.k.shape[2], exact.start, exact.stop, False)
        return attend(query, start, stop, valid, runs, exact)

    monkeypatch.setattr(reading, "decode_attention", spy)
    monkeypatch.setattr(reading, "attend_runs", spy_attend)
    feed(layer, codec, *stream(2), chunks(7), attend=True, spans=[(0, T), (77, T)])
    assert layer.rows_read == asked
    assert asked[0] > 0
