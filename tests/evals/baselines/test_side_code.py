"""HeadQ's side code on other bases: what it takes off the error, and its controls."""

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.codecs.tokenwise import Held
from headq_ao.evals.harness.subjects import Subject

RANK, SINKS = 8, 4
BASES = {
    "kivi": {"k_bits": 2, "v_bits": None, "k_group": 16},
    "per_token": {"k_bits": 2, "v_bits": 2, "group": 32},
    "turboquant": {"k_bits": 2, "v_bits": 2},
    "trellis": {"k_bits": 2, "v_bits": None},
    "residual_vq": {"books": 4, "values": False},
    "int4_per_token_head": {},
    "turboquant_k8v4": {},
}


@pytest.fixture(params=BASES)
def base(request, books):
    """Name and options of a base of the tiny model of one layer."""
    options = BASES[request.param]
    return request.param, options | ({"codebooks": books(1)} if request.param == "residual_vq" else {})


@pytest.fixture
def errors(quantized, token_ids):
    """``errors(base, **options)``: keys ``[1, 2, 128, 32]``, their errors with the base alone and with the side code,
    and the codec."""

    def make(base, **options):
        model = quantized("side_code", {"base": base[0], "base_options": base[1], "rank": RANK} | options, layers=1)
        cache, k = HeadQCache(model), torch.randn(1, 2, 300, 32, generator=torch.Generator().manual_seed(3))
        k = k * torch.linspace(0.3, 3, 32) + torch.linspace(-1, 1, 32)
        layer = cache.layers[0]
        layer.update(k, k)
        layer.commit(k.repeat_interleave(2, 1))
        codec = layer.codec
        rows, position = k[:, :, SINKS : SINKS + 128], torch.arange(SINKS, SINKS + 128)[None]
        coded = codec.encode(rows, rows, position)
        stored = {name: coded[name].to(form.dtype or k.dtype) for name, form in codec.forms().items()}
        alone, _, _ = codec._error(rows, rows, position)
        return alone, rows - codec.decode_keys(Held(stored, position)), codec

    return make


def inside(error, codec):
    """Energy of errors within the side code's directions, and outside them."""
    u = codec.fixed["directions"]
    assert torch.allclose(u.mT @ u, torch.eye(RANK), atol=1e-4)
    within = (error @ u).square().sum((-1, -2))
    return within, error.square().sum((-1, -2)) - within


@pytest.mark.parametrize("basis", ["query_pca", "random"])
def test_takes_error_off_its_directions_alone(base, errors, basis):
    alone, left, codec = errors(base, basis=basis)
    (before, beside), (after, still) = inside(alone, codec), inside(left, codec)
    assert (after < 0.25 * before).all()  # two bits of a normal coordinate leave 0.12 of its energy
    torch.testing.assert_close(still, beside, rtol=2e-3, atol=1e-3)


def test_the_wrong_sign_doubles_the_error_there(base, errors):
    alone, left, codec = errors(base, sign=-1)
    (before, beside), (after, still) = inside(alone, codec), inside(left, codec)
    assert (after > 2.5 * before).all() and (after < 4.5 * before).all()
    torch.testing.assert_close(still, beside, rtol=2e-3, atol=1e-3)


def test_matched_is_the_bases_error_at_the_side_codes_energy(errors):
    base = "trellis", BASES["trellis"]
    alone, wanted, _ = errors(base)
    _, matched, _ = errors(base, basis="matched")
    torch.testing.assert_close(matched.square().sum(-1), wanted.square().sum(-1), rtol=2e-2, atol=1e-4)
    along = torch.cosine_similarity(matched, alone, dim=-1)
    assert (along > 0.99).all() and (matched.norm() < 0.95 * alone.norm())


def test_steps_are_those_of_each_sequence(quantized, token_ids):
    """Two sequences of a batch have the codes that each has alone, and the step that takes least off its own error."""
    options = {"base": "per_token", "base_options": BASES["per_token"], "rank": RANK}
    model, ids = quantized("side_code", options, layers=1), token_ids(2, 300)
    together = HeadQCache(model)
    model(ids, cache=together)
    for row in (0, 1):
        alone = HeadQCache(model)
        model(ids[row : row + 1], cache=alone)
        a, b = (c.layers[0].codec.own["key.step"] for c in (together, alone))
        torch.testing.assert_close(a[row], b[0], rtol=2e-3, atol=1e-6)
    assert together.layers[0].codec.own["key.step"].shape == (2, 2, RANK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "rdkv"}, "needs a base that keeps nothing of a sequence, and rdkv does"),
        ({"base": "squat", "base_options": BASES["kivi"]}, "and squat does"),
        ({"base": "trellis", "base_options": BASES["trellis"], "rank": 3}, "must be a multiple of 8.*got 3 · 2"),
        ({"base": "trellis", "base_options": BASES["trellis"], "rank": 33}, "rank must be 1 to the head_dim of 32"),
        ({"base": "trellis", "base_options": BASES["trellis"], "basis": "key"}, "basis must be one of query_pca"),
        ({"base": "trellis", "base_options": BASES["trellis"], "sign": 2}, "sign 1 or -1, got 'query_pca' and 2"),
        ({"base": "nothing"}, "no codec 'nothing' is registered"),
    ],
)
def test_refuses(tiny, token_ids, options, message):
    model = tiny()
    calibration = calibrate(model, list(token_ids(3, 200)), progress=False)
    with pytest.raises(ValueError, match=message):
        quantize_(model, headq_config(codec="side_code", codec_options=options, calibration=calibration))


def test_is_a_method():
    assert Subject("side_code", {"base": "kivi", "base_options": BASES["kivi"]}).kind == "baseline"
