"""Size does not matter: keys and values a millionth or ten million times as large are read with the same error."""

import copy

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.allocate import output_errors
from headq_ao.cache_layer import HeadQCacheLayer
from headq_ao.calibration import MomentAccumulator
from headq_ao.layer_codec import LayerCodec
from headq_ao.models import LayerShape
from headq_ao.seen import seen_weights
from headq_ao.units import PLAIN, unit_of, unit_of_rows
from tests.test_invariants import (
    AFFINE,
    HKV,
    HQ,
    SMALL,
    ZEROS,
    D,
    T,
    assert_same_state,
    chunks,
    feed,
    reference_attention,
    relative,
    stored,
    stream,
)
from tests.test_memory import walked

SCALING, NEW = D**-0.5, 8
FACTORS = [1e-6, 4e4, 1e7]
CASES = {
    "default": ({}, False),
    "default, calibrated": ({}, True),
    "prompt": ({"adapt": "prompt"}, True),
    "fine": ({"k_bits": 8, "v_bits": 8}, False),
    "fine, calibrated": ({"k_bits": 8, "v_bits": 8}, True),
    "no whitening": ({"whitening": 0.0}, True),
    "side code": ({"rank": 8, "basis": "score_optimal"}, False),
    "side code, calibrated": ({"rank": 8, "basis": "score_optimal", "adapt": "prompt"}, True),
    "affine": (AFFINE, False),
    "affine, calibrated": (AFFINE | {"adapt": "prompt"}, True),
    "score_optimal": (AFFINE | {"basis": "score_optimal"}, False),
    "zero points": (ZEROS | {"v_group_size": 16}, False),
    "zero points, calibrated": (ZEROS | {"v_group_size": 16, "adapt": "prompt"}, True),
    "groups": (AFFINE | {"v_group_size": 16, "rank": 0}, False),
    "no gauge": ({"key_gauge": False}, False),
    "keys only": ({"v_bits": None}, False),
    "values only": ({"k_bits": None}, False),
    "values only, calibrated": ({"k_bits": None}, True),
    "window": ({}, False, 80),
    "window, calibrated": ({"adapt": "prompt"}, True, 80),
}


def sized(by_k, by_v, batch=1, tokens=T, seed=0, dtype=torch.float32, like=None):
    """A stream whose keys and values are so many times as large; its scores are those of factor 1."""
    q, k, v = stream(batch, tokens, seed, torch.float64, like=like)
    return [x.to(dtype) for x in (q / by_k, k * by_k, v * by_v)]


def moments(by_k, by_v):
    q, k, v = sized(by_k, by_v, tokens=512, seed=1, like=0)
    accumulator = MomentAccumulator(512)
    weights = (x[0].T for x in seen_weights(q, k, SCALING, n_sink=0))
    priority = torch.rand(512, generator=torch.Generator().manual_seed(0))
    accumulator.add(*(x[0].transpose(0, 1) for x in (q, k, v)), list(weights), priority)
    return accumulator.moments()


def make(case, by_k=1.0, by_v=1.0):
    options, calibrated, *window = CASES[case]
    config, shape = headq_config(**SMALL | options), LayerShape(HQ, HKV, D, *(window or [None]))
    codec = LayerCodec(config, shape, moments(by_k, by_v) if calibrated else None, torch.device("cpu"))
    return HeadQCacheLayer(config, shape), codec


def errors(case, by_k, by_v, dtype=torch.float32):
    """Of ``NEW`` queries behind a filled cache, a chunk and three single: the relative error of logits and output."""
    layer, codec = make(case, by_k, by_v)
    q, k, v = sized(by_k, by_v, 2, T + NEW, dtype=dtype)
    feed(layer, codec, *(x[:, :, :T] for x in (q, k, v)), [T])
    out = feed(layer, codec, *(x[:, :, T:] for x in (q, k, v)), [NEW - 3, 1, 1, 1], attend=True)
    exact = reference_attention(q[:, :, T:], k, v, SCALING, T, layer.sliding_window)
    of_out = relative(out, exact)
    if layer.sliding_window is not None:
        return of_out, of_out
    keys, _ = layer.dequantize(codec)
    grouped = q[:, :, T:].double().unflatten(1, (HKV, -1))
    logits, wanted = (torch.einsum("bhgsd,bhtd->bhgst", grouped, x.double()) for x in (keys, k))
    spread = wanted - wanted.mean(-1, keepdim=True)
    return ((logits - wanted).norm() / spread.norm()).item(), of_out


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_factor_1(case):
    """Up to what a last bit changes: an eigenvector, the tie of a code."""
    logits, out = errors(case, 1.0, 1.0)
    for factor in FACTORS:
        for by_k, by_v in ((factor, 1.0), (1.0, factor), (factor, 1 / factor)):
            of_logits, of_out = errors(case, by_k, by_v)
            assert of_logits == pytest.approx(logits, rel=0.04), (by_k, by_v)
            assert of_out == pytest.approx(out, rel=0.08), (by_k, by_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["default", "zero points", "default, calibrated"])
def test_other_dtypes_have_their_own_range(case, dtype):
    logits, out = errors(case, 1.0, 1.0, dtype)
    for factor in (2.0**-20, 2.0**23):
        of_logits, of_out = errors(case, factor, factor, dtype)
        assert of_logits == pytest.approx(logits, rel=0.02)
        assert of_out == pytest.approx(out, rel=0.03)


# Codes


@pytest.mark.parametrize("case", [c for c in CASES if "window" not in c])
def test_powers_of_two_change_no_code(case):
    """But the unit, all that is stored is the same, bit for bit."""
    q, k, v = sized(1.0, 1.0)
    states = []
    for factor in (2.0**-18, 2.0**20):
        layer, codec = make(case, factor, factor)
        feed(layer, codec, q / factor, k * factor, v * factor, [T])
        states.append((stored(layer), layer))
    (small, of_small), (large, of_large) = states
    units = {name for name in small if name.endswith("unit")}
    exact = {f"{side}0" for side in "kv" if CASES[case][0].get(f"{side}_bits", 2) is None}
    for name in small.keys() - units - exact:
        assert torch.equal(small[name], large[name]), name
    assert small.keys() == large.keys()
    for name in units:
        assert torch.equal(small[name] * 2.0**38, large[name])
    assert (of_small.value_codec is None) == (CASES[case][1] or CASES[case][0].get("v_bits", 2) is None)
    if of_small.value_codec is not None:
        assert torch.equal(of_small.value_codec.unit * 2.0**38, of_large.value_codec.unit)


@pytest.mark.parametrize("case", ["default", "prompt", "zero points", "values only", "window"])
@pytest.mark.parametrize("kind", ["token by token", 1, 2])
def test_codes_do_not_depend_on_calls(case, kind):
    layers = []
    for sizes in (chunks("one call"), chunks(kind)):
        layer, codec = make(case, 1e6, 1e-5)
        feed(layer, codec, *sized(1e6, 1e-5), sizes)
        layers.append(layer)
    assert_same_state(*layers)
    units = [None if layer.value_codec is None else layer.value_codec.unit for layer in layers]
    assert units[0] is units[1] is None or torch.equal(*units)


BATCH = ((1.0, 1.0), (1e6, 1.0), (1.0, 1e-6), (1e-6, 1e7))  # of keys and of values, by sequence


def mixed_batch(tokens=T):
    """Sequences of different sizes: ordinary ones beside others."""
    rows = [[x[b : b + 1] for x in sized(*by, batch=len(BATCH), tokens=tokens)] for b, by in enumerate(BATCH)]
    return [torch.cat(x) for x in zip(*rows, strict=True)]


def same_rows(batch, b, alone):
    """Whether row ``b`` of a batch stores what a cache of its own does."""
    for mine, own in ((batch.store_k, alone.store_k), (batch.store_v, alone.store_v)):
        for x, y in zip(mine.view(0, alone.rows[0].slots), own.view(0, alone.rows[0].slots), strict=True):
            assert torch.equal(x[b], y[0])
    for epoch, other in zip(batch.epochs, alone.epochs, strict=True):
        for name, x in other.codec.tensors().items() if other.codec is not None else ():
            mine = epoch.codec.tensors()[name]
            assert torch.equal(mine[b] if name in epoch.codec.own else mine[0], x[0]), name
        if other.codec is not None and other.codec.unit is None and epoch.codec.unit is not None:
            assert bool((epoch.codec.unit[b] == 1).all())
    for layer, at in ((batch, b), (alone, 0)):
        unit = None if layer.value_codec is None else layer.value_codec.unit[at].flatten().tolist()
        yield [1.0] * HKV if unit is None else unit


@pytest.mark.parametrize("case", ["default", "affine", "zero points"])
@pytest.mark.parametrize("lengths", [(300, 300, 300, 300), (300, 217, 180, 101), (101, 180, 300, 217)], ids=str)
def test_sequences_of_a_batch_have_their_own_units(case, lengths):
    """They come to it at the same time or one after the other, ordinary ones first or last; and are selected."""
    q, k, v = mixed_batch()
    spans = [(T - n, T) for n in lengths]
    batch, codec = make(case)
    feed(batch, codec, q, k, v, chunks(5), spans=spans)
    own = []
    for b, (a, z) in enumerate(spans):
        alone, codec = make(case)
        feed(alone, codec, *(x[b : b + 1, :, a:z] for x in (q, k, v)), chunks(6, z - a))
        mine, theirs = same_rows(batch, b, alone)
        assert mine == theirs
        own.append(alone)
    batch.batch_select_indices(torch.tensor([3, 0, 1]))
    for at, b in enumerate((3, 0, 1)):
        mine, theirs = same_rows(batch, at, own[b])
        assert mine == theirs


def test_a_crop_of_all_packed_rows_takes_a_new_unit():
    """What is packed next has nothing to do with what is gone."""
    layer, codec = make("default")
    feed(layer, codec, *sized(1.0, 1e6), [T])
    before = layer.value_codec.unit.clone()
    layer.crop(-(T - 4))
    q, k, v = sized(1.0, 1e-5, seed=3)
    feed(layer, codec, q, k, v, [T])
    assert bool((layer.value_codec.unit < before * 1e-8).all())


# Nothing changes where nothing must


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [0.02, 1.0, 20.0])
def test_ordinary_rows_have_no_unit(case, size):
    layer, codec = make(case, size, size)
    feed(layer, codec, *sized(size, size), [T])
    assert layer.value_codec is None
    assert all(epoch.codec is None or epoch.codec.unit is None for epoch in layer.epochs)
    assert not any("unit" in name for name, _ in codec.named_buffers())


def test_unit_of():
    rms = torch.tensor([0.0, float("inf"), float("nan"), *PLAIN, 1.0, 1e-30, 1e-6, 3e5, 1e7])
    unit = unit_of(rms)
    assert unit.tolist()[:6] == [1.0] * 6
    assert bool((torch.frexp(unit).mantissa == 0.5).all()), "powers of two"
    share = rms[6:] / unit[6:]
    assert bool(((share >= 0.5) & (share < 1)).all())
    assert unit_of_rows(torch.ones(1, 2, 4, 8)) is None
    assert unit_of_rows(torch.full((1, 2, 4, 8), 3e38, dtype=torch.bfloat16)).shape == (1, 2, 1)
    assert unit_of_rows(torch.full((1, 2, 4, 8), 3e38, device="meta")) is None


# Calibration


@pytest.mark.parametrize("factor", [1e-6, 1e7])
def test_bits_are_shared_alike(factor):
    """What bits of keys and values change in the output, as a share of its energy."""
    found = []
    for by in (1.0, factor):
        q, k, v = sized(by, by)
        m = moments(by, by)
        m.errors, m.energy = output_errors(m, q, k, v, SCALING, n_sink=4, window=None, every=4)
        found.append(torch.tensor([m.relative_errors(side) for side in (0, 1)]))
    torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0)


# Models


@pytest.fixture
def resized(tiny):
    """``resized(by_k, by_v)``: a model whose keys and values are so many times as large, its logits the same."""

    def make(by_k, by_v):
        model = tiny()
        with torch.no_grad():
            for layer in model.model.layers:
                a = layer.self_attn
                for projection, by in ((a.q_proj, 1 / by_k), (a.k_proj, by_k), (a.v_proj, by_v), (a.o_proj, 1 / by_v)):
                    projection.weight *= by
        return model

    return make


MODEL = {"epoch_tokens": 32, "residual_length": 32, "block_size": 16}


@torch.no_grad()
def logit_error(model, ids, config):
    exact = model(ids, use_cache=False).logits[:, 150:]
    quantize_(model, config)
    cache = HeadQCache(model)
    model(ids[:, :150], cache=cache)
    parts = [model(part, cache=cache).logits for part in ids[:, 150:].split([30] + [1] * 20, 1)]
    return relative(torch.cat(parts, 1), exact.double()), cache


@pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])
@pytest.mark.parametrize(
    "options", [{}, AFFINE, {"k_bits": 8, "v_bits": 8}, {"mean_bits": 3.0, "block_size": 32}], ids=str
)
def test_logits_of_a_model(resized, token_ids, options, calibrated):
    ids, found = token_ids(2, 200), []
    for by_k, by_v in ((1.0, 1.0), (1e7, 1e-6), (1e-6, 1e7)):
        model = resized(by_k, by_v)
        calibration = calibrate(model, [token_ids(2, 200, seed=9)], progress=False) if calibrated else None
        found.append(logit_error(model, ids, headq_config(**MODEL | options, calibration=calibration))[0])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.05)


def test_units_are_counted_saved_and_copied(resized, token_ids, tmp_path):
    ids, found = token_ids(2, 200), {}
    for by in (1.0, 1e6):
        model = resized(by, by)
        _, cache = logit_error(model, ids, headq_config(**MODEL))
        found[by] = cache.bits_report().bytes
        assert sum(found[by].values()) == cache.get_memory_footprint()
        if by != 1:
            cache.save(tmp_path / "c")
            others = [HeadQCache.load(tmp_path / "c", model), copy.deepcopy(cache)]
            for other in others:
                other.reorder_cache(torch.tensor([1, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))
            with torch.no_grad():
                more = token_ids(2, 30, seed=4)
                parts = more.split([9] + [1] * 21, 1)
                want, *got = [torch.cat([model(x, cache=c).logits for x in parts], 1) for c in (cache, *others)]
            assert all(torch.equal(x, want) for x in got)
            with torch.no_grad():
                model(token_ids(2, 40, seed=5), cache=cache)
            assert walked(cache, model) == cache.get_memory_footprint()
            report = cache.bits_report()
            assert report.value_bits_at_t > report.value_body_bits == 2.5
    heads, layers = 2, 2
    unit = 2 * heads * layers * 4  # bytes
    reader = 2 * heads * 32 * 32 * layers * 4  # a rotation by the unit, once rows are read
    assert found[1e6]["bases"] - found[1.0]["bases"] == 2 * unit + reader
