"""Where every code of a packed token lies, byte by byte."""

import pytest
import torch

from headq_ao.ops.layout import (
    PIECES,
    granule,
    key_bytes_per_token,
    key_plane_shapes,
    pack_keys,
    pack_values,
    plane_pieces,
    unpack_keys,
    unpack_values,
    value_bytes_per_token,
    value_plane_shapes,
)

MIXED = {
    "64x2+4x4": [2] * 64 + [4] * 4,
    "80x2+3x8": [2] * 80 + [8] * 3,
    "descending": [8, 6, 5, 4, 3, 2, 1],
    "ascending": [1, 2, 3, 4, 5, 6, 8],
    "interleaved": [2, 4, 2, 4, 1] * 5,
}
UNIFORM = {f"{n}x{b}": [b] * n for b in PIECES for n in (1, 7, 16, 24, 80)}
all_bits = pytest.mark.parametrize("bits", [pytest.param(b, id=name) for name, b in (UNIFORM | MIXED).items()])


def random_codes(bits, *shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    columns = [torch.randint(2**b, shape, generator=g, dtype=torch.uint8) for b in bits]
    return torch.stack(columns, -1)


def key_planes_by_hand(codes, bits):
    """Each piece put at its documented place: byte i of group g at bit p·width, coordinate g·4P + p·4 + i."""
    tokens = codes.shape[0]
    pieces = {4: [], 2: [], 1: []}
    splits = [[(w, sum(PIECES[b][:j])) for j, w in enumerate(PIECES[b])] for b in bits]
    for j in range(2):  # low pieces of all coordinates first
        for coordinate, split in enumerate(splits):
            if j < len(split):
                width, shift = split[j]
                pieces[width].append((coordinate, shift))
    planes = []
    for width, columns in pieces.items():
        if not columns:
            continue
        per_byte = 8 // width
        groups = -(-len(columns) // (4 * per_byte))
        plane = torch.zeros(tokens // 16, groups, 16, 4, dtype=torch.uint8)
        for t in range(tokens):
            for n, (coordinate, shift) in enumerate(columns):
                group, rest = divmod(n, 4 * per_byte)
                p, i = divmod(rest, 4)
                value = (int(codes[t, coordinate]) >> shift) % 2**width
                plane[t // 16, group, t % 16, i] += value << (p * width)
        planes.append(plane)
    return planes


def test_key_bytes_of_one_token():
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[3, 0], codes[3, 4], codes[3, 8], codes[3, 12] = 1, 2, 3, 1  # the four places of byte 0
    codes[3, 17] = 3  # byte 1 of the second group
    (plane,) = pack_keys(codes, [2] * 32)
    assert plane.shape == (1, 2, 16, 4)
    assert plane[0, 0, 3].tolist() == [1 | 2 << 2 | 3 << 4 | 1 << 6, 0, 0, 0]
    assert plane[0, 1, 3].tolist() == [0, 3, 0, 0]
    assert int(plane.sum()) == int(plane[0, :, 3].sum())


def test_value_bytes_of_one_channel():
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 18], codes[4, 18], codes[8, 18], codes[12, 18] = 1, 2, 3, 1
    codes[17, 18] = 3  # token 16 + 1: byte 1 of the second token group
    (plane,) = pack_values(codes, 2)
    assert plane.shape == (2, 2, 16, 4)
    assert plane[0, 1, 2].tolist() == [1 | 2 << 2 | 3 << 4 | 1 << 6, 0, 0, 0]
    assert plane[1, 1, 2].tolist() == [0, 3, 0, 0]
    assert int(plane.sum()) == int(plane[:, 1, 2].sum())


def test_low_bits_come_first():
    assert plane_pieces((3, 2)) == {2: ((0, 0), (1, 0)), 1: ((0, 2),)}
    assert plane_pieces((8, 6)) == {4: ((0, 0), (1, 0), (0, 4)), 2: ((1, 4),)}
    low, high = pack_values(torch.full((32, 16), 0b110, dtype=torch.uint8), 3)
    assert low.unique().tolist() == [0b10101010]
    assert high.unique().tolist() == [0b11111111]


@all_bits
def test_key_planes_by_hand(bits):
    codes = random_codes(bits, 32)
    planes = pack_keys(codes, bits)
    expected = key_planes_by_hand(codes, bits)
    assert len(planes) == len(expected)
    for plane, want in zip(planes, expected, strict=True):
        assert plane.is_contiguous()
        assert torch.equal(plane, want)


@pytest.mark.parametrize("bits", PIECES)
def test_value_planes_by_hand(bits):
    codes = random_codes([bits] * 32, 64)
    shift = 0
    for plane, width in zip(pack_values(codes, bits), PIECES[bits], strict=True):
        per_byte = 8 // width
        want = torch.zeros(64 // (4 * per_byte), 2, 16, 4, dtype=torch.uint8)
        for t in range(64):
            group, rest = divmod(t, 4 * per_byte)
            p, i = divmod(rest, 4)
            for d in range(32):
                want[group, d // 16, d % 16, i] += (int(codes[t, d]) >> shift) % 2**width << (p * width)
        assert torch.equal(plane, want)
        shift += width


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["bare", "batched"])
@pytest.mark.parametrize("tokens", [16, 48])
@all_bits
def test_keys_round_trip(bits, tokens, lead):
    codes = random_codes(bits, *lead, tokens, seed=tokens)
    planes = pack_keys(codes, bits)
    assert torch.equal(unpack_keys(planes, bits), codes)
    assert [tuple(p.shape) for p in planes] == [(*lead, *s) for s in key_plane_shapes(bits, tokens)]
    rows = tokens * (lead[0] * lead[1] if lead else 1)
    assert sum(p.nbytes for p in planes) == rows * key_bytes_per_token(bits)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["bare", "batched"])
@pytest.mark.parametrize("head_dim", [16, 80, 96])
@pytest.mark.parametrize("bits", PIECES)
def test_values_round_trip(bits, head_dim, lead):
    tokens = 3 * max(granule(w) for w in PIECES[bits])
    codes = random_codes([bits] * head_dim, *lead, tokens)
    planes = pack_values(codes, bits)
    assert torch.equal(unpack_values(planes, bits), codes)
    assert [tuple(p.shape) for p in planes] == [(*lead, *s) for s in value_plane_shapes(bits, tokens, head_dim)]
    rows = tokens * (lead[0] * lead[1] if lead else 1)
    assert sum(p.nbytes for p in planes) == rows * value_bytes_per_token(bits, head_dim)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ([2] * 64, 16),
        ([2] * 65, 20),  # 65 pieces pad to 80
        ([2] * 64 + [4] * 4, 16 + 4),  # 4 side coordinates pad to 8 of 4 bits
        ([2] * 80 + [2] * 20, 28),  # 100 pieces pad to 112
        ([1] * 32, 4),
        ([1], 4),
        ([3] * 16, 4 + 4),  # 16 pieces of 2 bits, 16 of 1 bit pad to 32
        ([8] * 8, 8),
    ],
)
def test_key_bytes_count_padding(bits, expected):
    assert key_bytes_per_token(bits) == expected


def test_pack_ignores_the_layout_of_its_input():
    codes = random_codes([3] * 32, 64)
    transposed = codes.T.contiguous().T
    assert not transposed.is_contiguous()
    dense = pack_keys(codes, [3] * 32) + pack_values(codes, 3)
    view = pack_keys(transposed, [3] * 32) + pack_values(transposed, 3)
    assert all(torch.equal(a, b) for a, b in zip(dense, view, strict=True))


def test_pack_leaves_its_input():
    codes = random_codes([8] * 32, 32)
    before = codes.clone()
    pack_keys(codes, [8] * 32)
    pack_values(codes, 8)
    assert torch.equal(codes, before)
