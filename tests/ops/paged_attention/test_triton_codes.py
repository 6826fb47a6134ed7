"""Which number of the query each piece of each byte is multiplied by. The kernels are in ../paged_interpreted.py."""

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.layout import key_bytes_per_token, pack_keys
from headq_ao.ops.paged_attention.triton_codes import CHUNK_BYTES, key_chunks, query_columns, spread_ptx

CPU = torch.device("cpu")
BITS = [(2,) * 80, (3,) * 64, (8,) * 48, (1,) * 16, (5,) * 32, (6,) * 128, (2,) * 64 + (4,) * 9, (4, 3, 1, 2) * 8]


@pytest.mark.parametrize("bits", BITS, ids=lambda b: f"{len(b)}x{b[0]}..{b[-1]}")
def test_chunks_cover_every_byte_once(bits):
    rows = {}
    for plane, _, first, n, total in key_chunks(bits):
        assert 0 < n <= CHUNK_BYTES and first + n <= total
        rows.setdefault(plane, (total, []))[1].extend(range(first, first + n))
    assert all(found == list(range(total)) for total, found in rows.values())
    assert sum(total for total, _ in rows.values()) == key_bytes_per_token(bits)


@pytest.mark.parametrize("bits", BITS, ids=lambda b: f"{len(b)}x{b[0]}..{b[-1]}")
def test_pieces_times_columns_are_the_scores(bits):
    """``Σ piece · q[coordinate] · 2^shift`` over the packed bytes is ``q·c``."""
    g = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, 2**b, (16,), generator=g, dtype=torch.uint8) for b in bits], 1)
    q = torch.randn(len(bits), generator=g, dtype=torch.float64)
    planes = [x[0].permute(1, 0, 2).flatten(1) for x in pack_keys(codes, bits)]  # [16 tokens, bytes]
    columns = query_columns(bits, CPU).tolist()
    total, at = torch.zeros(16, dtype=torch.float64), 0
    for plane, width, first, n, _ in key_chunks(bits):
        for p in range(8 // width):
            for byte in range(CHUNK_BYTES):
                column = columns[at]
                at += 1
                if byte >= n:
                    assert column == -1, "padding reads nothing"
                elif column >= 0:
                    piece = planes[plane][:, first + byte].long() >> (p * width) & (2**width - 1)
                    total += piece.double() * q[column & 0xFFFF] * 2 ** (column >> 16)
    assert at == len(columns)
    torch.testing.assert_close(total, codes.double() @ q)


def test_ptx_masks_both_halves_of_a_register():
    assert spread_ptx(0b1100).count("0x000c000c") == 2
