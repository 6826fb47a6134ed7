"""Whole numbers of any width as packed bytes."""

import torch
from torch import Tensor


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits ``[..., n]`` as bytes ``[..., ⌈n · bits / 8⌉]``, lowest bit first.

    Example:
        >>> import torch
        >>> from headq_ao.evals.baselines.bitstream import pack_stream, unpack_stream
        >>> packed = pack_stream(torch.tensor([2047, 0, 1025]), 11)
        >>> packed.shape, unpack_stream(packed, 11, 3).tolist()
        (torch.Size([5]), [2047, 0, 1025])
    """
    shifts = torch.arange(bits, device=codes.device, dtype=torch.int32)
    stream = (codes.to(torch.int32)[..., None] >> shifts & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = (stream << torch.arange(8, device=codes.device, dtype=torch.int32)).sum(-1)
    return packed.to(torch.uint8)


def unpack_stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of :func:`pack_stream`, int64 ``[..., count]``."""
    first = torch.arange(count, device=packed.device) * bits
    byte, offset = first // 8, first % 8
    wide = torch.nn.functional.pad(packed, (0, 3)).long()  # a code of up to 17 bits lies in three bytes
    whole = wide[..., byte] | wide[..., byte + 1] << 8 | wide[..., byte + 2] << 16
    found: Tensor = whole >> offset & 2**bits - 1
    return found


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of :func:`pack_stream`."""
    return -(-count * bits // 8)
