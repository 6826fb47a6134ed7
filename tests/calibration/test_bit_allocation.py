"""How a budget of bits is shared between heads and sides, against a search; what heads of different bits store."""

import itertools

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.calibration.bit_allocation import allocate_bits, head_bits, output_errors
from headq_ao.calibration.observers import MomentAccumulator
from headq_ao.codecs.base import MOST_BYTE_BITS, HeadBits
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.linalg import centred_moment
from headq_ao.codecs.rotation import Rotation
from headq_ao.codecs.whitened import whitened_codec, whitened_value_codec
from headq_ao.config import HeadQConfig
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.importance import RECENT, importance_weights

LEVELS = [1, 2, 3, 4]


@pytest.fixture
def made(tiny, token_ids):
    """A model of several layers with 2 KV heads each, and its calibration."""
    model = tiny("llama")
    return model, calibrate(model, list(token_ids(4, 256, seed=1).split(1)), progress=False)


@pytest.mark.parametrize("mean", [1.0, 1.3, 2.0, 2.75, 3.5, 4.0])
def test_greedy_sharing_is_the_best_there_is(mean):
    """Errors that fall by less with each bit: no other choice of as many bits leaves less."""
    g = torch.Generator().manual_seed(0)
    sensitivity = {}
    for part in "abcde":
        falls = torch.rand(3, generator=g).sort(descending=True).values
        sensitivity[part] = [float(falls.sum() - falls[:i].sum()) for i in range(4)]
    bits = allocate_bits(sensitivity, dict.fromkeys(sensitivity, LEVELS), mean)
    left = sum(sensitivity[part][b - 1] for part, b in bits.items())
    best = min(
        sum(sensitivity[part][b - 1] for part, b in zip(sensitivity, choice, strict=True))
        for choice in itertools.product(LEVELS, repeat=5)
        if sum(choice) <= mean * 5 + 1e-9
    )
    assert sum(bits.values()) <= mean * 5 + 1e-9 and left == pytest.approx(best)


def test_a_budget_below_the_least():
    with pytest.raises(ValueError, match=r"mean_bits must be at least 2 .* got 1\.5"):
        allocate_bits({"a": [4.0, 3.0, 2.0, 1.0]}, {"a": [2, 4]}, 1.5)


def test_every_head_gets_bits_of_its_own(made):
    model, calibration = made
    shapes = layer_shapes(model.config)
    given = head_bits(headq_config(mean_bits=2.25), calibration, shapes)
    assert [len(x.k) for x in given] == [len(x.v) for x in given] == [s.n_kv_heads for s in shapes]
    flat = [b for x in given for b in (*x.k, *x.v)]
    assert 2.25 - 1 / len(flat) < sum(flat) / len(flat) <= 2.25
    sensitivity = {
        (i, s, h): calibration.layers[i].relative_errors("kv".index(s))[h]
        for i, shape in enumerate(shapes) for s in "kv" for h in range(shape.n_kv_heads)
    }  # fmt: skip
    shared = allocate_bits(sensitivity, {part: [1, 2, 3, 4, 5, 6, 8] for part in sensitivity}, 2.25)
    assert flat == [
        shared[i, s, h]
        for i, shape in enumerate(shapes) for s in "kv" for h in range(shape.n_kv_heads)
    ]  # fmt: skip


def test_uniform_where_nothing_is_shared(made):
    model, calibration = made
    shapes = layer_shapes(model.config)
    for config, known, bits in (
        (headq_config(), None, HeadBits((2, 2), (2, 2))),
        (headq_config(k_bits=3, v_bits=2), calibration, HeadBits((3, 3), (2, 2))),
        (headq_config(v_bits=None, k_bits=4), calibration, HeadBits((4, 4), ())),
    ):
        assert head_bits(config, known, shapes) == [bits] * len(shapes)
    keys = head_bits(headq_config(v_bits=None, mean_bits=2.0), calibration, shapes)
    assert all(x.v == () for x in keys) and {b for x in keys for b in x.k} != {2}


def test_values_have_bits_that_a_block_holds_whole(made):
    model, calibration = made
    config = headq_config(mean_bits=2.25, block_size=16)
    assert {b for x in head_bits(config, calibration, layer_shapes(model.config)) for b in x.v} <= {2, 4, 6, 8}


def test_damage_by_hand():
    """The change of the output, query by query, of one head at a time."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16), torch.randn(1, 2, 96, 16)
    accumulator = MomentAccumulator(96)
    weights = [x[0].T for x in importance_weights(q, k, 0.25, n_sink=0)]
    accumulator.add(*(x[0].transpose(0, 1) for x in (q, k, v)), weights, torch.rand(96))
    moments = accumulator.moments()
    errors, energy = output_errors(moments, q, k, v, 0.25, n_sink=4, window=None, every=5)
    (k_mean, k_outer), (v_mean, v_outer) = ((x[None] for x in moments.weighted(side)) for side in "kv")
    recent = min(RECENT, 96 // 4)
    for i, bits in enumerate((1, 2, 3, 4)):
        config = HeadQConfig(k_bits=bits, v_bits=bits)
        keys = whitened_codec(config, moments.weighted_c_q[None], k_mean, centred_moment(k_mean, k_outer))
        values = whitened_value_codec(config, v_mean, v_outer)
        k_hat = keys.dequantize(*keys.quantize(k, True))
        v_hat = values.dequantize(*values.quantize(v))
        want, total = torch.zeros(2, 2), torch.zeros(2)
        for head in range(4):
            for at in range(recent, 96, 5):
                packed = (torch.arange(at + 1) >= 4) & (torch.arange(at + 1) <= at - recent)
                rows, hat = k[0, head // 2, : at + 1], k_hat[0, head // 2, : at + 1]
                a = (0.25 * rows @ q[0, head, at]).softmax(0)
                moved = (0.25 * torch.where(packed[:, None], hat, rows) @ q[0, head, at]).softmax(0)
                of_v, of_hat = v[0, head // 2, : at + 1], v_hat[0, head // 2, : at + 1]
                want[head // 2, 0] += ((moved - a) @ of_v).square().sum()
                want[head // 2, 1] += ((a * packed) @ (of_hat - of_v)).square().sum()
                total[head // 2] += (a @ of_v).square().sum()
        torch.testing.assert_close(errors[:, :, i], want, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(energy, total, rtol=1e-4, atol=1e-6)


def test_stored_bits_are_those_given(made, token_ids):
    model, calibration = made
    quantize_(model, headq_config(calibration=calibration, mean_bits=2.25))
    bits = head_bits(headq_config(mean_bits=2.25), calibration, layer_shapes(model.config))
    cache = HeadQCache(model)
    model(token_ids(1, 256), cache=cache)
    report, head_dim = cache.bits_report(), layer_shapes(model.config)[0].head_dim
    for side, measured in (("k", report.key_body_bits), ("v", report.value_body_bits)):
        given = [b for x in bits for b in getattr(x, side)]
        scales = [8 if b <= MOST_BYTE_BITS else 16 for b in given]
        assert measured == pytest.approx((sum(given) + sum(scales) / head_dim) / len(given))


def test_a_part_of_the_heads(made):
    """What one rank of a tensor-parallel model keeps, of heads of different bits."""
    _, calibration = made
    moments, bits = calibration.layers[0], HeadBits((2, 3), (4, 4))
    d = moments.k_sum.shape[1]
    rotation = Rotation(torch.rand(d).double(), torch.arange(d))
    cpu, given = torch.device("cpu"), {"bits": bits, "rotation": rotation}
    whole = LayerCodec(headq_config(), LayerShape(4, 2, d, None), moments, cpu, **given)
    part = LayerCodec(headq_config(), LayerShape(2, 1, d, None), moments, cpu, heads=slice(1, 2), **given)
    assert whole.calibrated.head_bits == (2, 3) and whole.values.head_bits == () and whole.values.bits == 4
    assert part.calibrated.head_bits == () and part.calibrated.bits == (3,) * d and part.bits == HeadBits((3,), (4,))
    for name, tensor in part.calibrated.tensors().items():
        assert torch.equal(tensor, whole.calibrated.tensors()[name][:, -1:]), name
