"""Row formats of other quantizers, each against numbers worked out by hand or known from theory."""

import pytest
import torch

from headq_ao.evals.baselines.codecs import (
    Affine,
    Frame,
    LloydMax,
    LowRank,
    error_factor,
    pack_bits,
    query_span,
    random_rotation,
    sphere_levels,
    unpack_bits,
)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_bits_round_trip(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 64), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 8 * bits)
    assert torch.equal(unpack_bits(packed, bits), codes.to(torch.uint8))


def test_bits_fill_bytes():
    with pytest.raises(ValueError, match="5 codes of 3 bits do not fill whole bytes"):
        pack_bits(torch.zeros(5), 3)


def test_affine_per_token_by_hand():
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0, 0.4, 0.6, 2.0]])[None, None]
    codec = Affine(2, group=4)
    codes, scale, zero = codec.encode(x, Frame())
    assert scale.tolist() == [[[[1.0, 1.0]]]] and zero.tolist() == [[[[0.0, -1.0]]]]
    assert unpack_bits(codes, 2).tolist() == [[[[0, 1, 2, 3, 0, 1, 2, 3]]]]
    assert codec.decode([codes, scale, zero], Frame()).tolist() == [[[[0.0, 1.0, 2.0, 3.0, -1.0, 0.0, 1.0, 2.0]]]]


def test_affine_per_channel_by_hand():
    x = torch.zeros(1, 1, 4, 8)
    x[0, 0, :, 0] = torch.tensor([0.0, 3.0, 1.2, 1.6])
    codec = Affine(2, group=4, per_channel=True)
    packed = codec.encode(x, Frame())
    assert packed[1].shape == packed[2].shape == (1, 1, 1, 8)
    assert codec.decode(packed, Frame())[0, 0, :, 0].tolist() == [0.0, 3.0, 1.0, 2.0]
    assert codec.decode(packed, Frame())[..., 1:].eq(0).all()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_error_is_half_a_step(per_channel, bits):
    x = rows(2, 3, 64, 64)
    codec = Affine(bits, 32, per_channel)
    packed = codec.encode(x, Frame())
    step = packed[1].float().repeat_interleave(32, dim=-2 if per_channel else -1)
    assert ((codec.decode(packed, Frame()) - x).abs() <= 0.5 * step + 4e-3).all()


def test_rotation_and_gauge_are_undone():
    x, mean = rows(1, 2, 16, 64) + 5, torch.full((1, 2, 64), 5.0)
    for rotate, subtract_mean in ((True, False), (False, True), (True, True)):
        codec = Affine(8, 64, rotate=rotate, subtract_mean=subtract_mean)
        frame = Frame(mean)
        torch.testing.assert_close(codec.decode(codec.encode(x, frame), frame), x, atol=0.3, rtol=0)
    plain = Affine(2, 64, rotate=True)
    with_mean = Affine(2, 64, rotate=True, subtract_mean=True)
    error = [(c.decode(c.encode(x, Frame(mean)), Frame(mean)) - x).square().mean() for c in (plain, with_mean)]
    assert error[1] < 0.5 * error[0]  # a constant offset costs range unless it is taken off


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_distortion(bits, distortion):
    """The least squared errors of a scalar quantizer of a normal variable (Max, 1960), which large D tends to."""
    x = rows(1, 1, 4000, 128, seed=bits)
    codec = LloydMax(bits)
    error = (codec.decode(codec.encode(x, Frame()), Frame()) - x).square().mean()
    assert error.item() == pytest.approx(distortion, rel=0.03)


def test_levels_are_centroids():
    unit = torch.nn.functional.normalize(rows(200_000, 16), dim=-1)[:, 0].contiguous()
    levels = sphere_levels(16, 2)
    nearest = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
    centroids = torch.stack([unit[nearest == i].mean() for i in range(4)])
    torch.testing.assert_close(centroids, levels, atol=3e-3, rtol=0)


def test_random_rotation_is_orthogonal_and_seeded():
    r = random_rotation(48, 1)
    torch.testing.assert_close(r @ r.T, torch.eye(48), atol=1e-5, rtol=0)
    assert torch.equal(r, random_rotation(48, 1)) and not torch.equal(r, random_rotation(48, 2))


def test_low_rank_residual():
    x, q = rows(2, 2, 64, 32), rows(2, 2, 3, 5, 32, seed=1)
    base = Affine(2, 32, per_channel=True)
    errors = []
    for rank in (1, 4, 32):
        codec = LowRank(base, rank, block=32)
        packed = codec.encode(x, Frame())
        assert packed[3].shape == (2, 2, 64, rank) and packed[4].shape == (2, 2, 2, 32, rank)
        decoded = codec.decode(packed, Frame())
        expected = q @ decoded[:, :, None].transpose(-1, -2)
        torch.testing.assert_close(codec.scores(q, packed, Frame()), expected, atol=1e-4, rtol=1e-4)
        errors.append((decoded - x).square().mean().item())
    plain = (base.decode(base.encode(x, Frame()), Frame()) - x).square().mean().item()
    assert plain > errors[0] > errors[1] > errors[2] and errors[2] < 1e-5  # all 32 directions: fp16 rounding is left


def test_error_factor_is_a_cholesky_factor():
    span = torch.linalg.qr(rows(1, 2, 8, 3))[0]
    factor = error_factor(span, 4.0)
    assert torch.equal(factor, factor.triu())
    metric = torch.eye(8) + 4 * span @ span.transpose(-1, -2)
    torch.testing.assert_close(factor.transpose(-1, -2) @ factor @ metric, torch.eye(8).expand(1, 2, 8, 8))


def test_pushed_errors_stay_out_of_the_queries():
    x = rows(1, 2, 256, 64)
    q = rows(1, 4, 200, 8, seed=1) @ rows(1, 1, 8, 64, seed=2)  # of eight directions only
    codec = Affine(2, 64, per_channel=True)
    plain = codec.decode(codec.encode(x, Frame()), Frame()) - x
    frame = Frame(span=query_span(q, 2, 8), span_weight=10.0)
    packed = codec.encode(x, frame)
    pushed = codec.decode(packed, frame) - x
    assert [t.shape for t in packed] == [t.shape for t in codec.encode(x, Frame())]

    def seen(error):
        return (q.unflatten(1, (2, 2)) @ error[:, :, None].transpose(-1, -2)).square().mean()

    assert seen(pushed) < 0.5 * seen(plain)
    assert pushed.square().mean() > plain.square().mean()
