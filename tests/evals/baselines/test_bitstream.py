"""Numbers of any width, packed and unpacked."""

import pytest
import torch

from headq_ao.evals.baselines.bitstream import pack_stream, stream_bytes, unpack_stream


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 11, 16])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_round_trip(bits, count):
    codes = torch.randint(0, 2**bits, (2, 3, count), generator=torch.Generator().manual_seed(bits))
    packed = pack_stream(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, stream_bytes(count, bits))
    assert stream_bytes(count, bits) * 8 - count * bits < 8
    assert torch.equal(unpack_stream(packed, bits, count), codes)


def test_by_hand():
    assert pack_stream(torch.tensor([0b101, 0b011, 0b110]), 3).tolist() == [0b10011101, 0b1]
