"""Packing of small integer codes: the only owner of bits, bytes and planes.

A coordinate of ``b`` bits is split into plane pieces of 4, 2 or 1 bits, low bits first (3 = 2 + 1). All pieces
of one width form one plane. A plane byte holds ``P = 8 / width`` pieces. Reading 64 bytes gives

- keys,   ``[T/16, N/(4P), 16, 4]``: 16 tokens, and for each 4P coordinates (coordinate ``g·4P + p·4 + i`` sits in
  byte ``i`` of group ``g`` at bit ``p·width``), so a dot product needs no horizontal sum;
- values, ``[T/(4P), D/16, 16, 4]``: 16 channels, and for each 4P tokens, so a weighted sum over tokens needs none.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

PLANE_WIDTHS = (4, 2, 1)
TOKEN_TILE = 16  # tokens of one 64-byte key granule
CHANNEL_TILE = 16  # channels of one 64-byte value granule
PIECES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}


def granule(width: int) -> int:
    """Coordinates (keys) or tokens (values) that share the four bytes of one granule row."""
    return 4 * (8 // width)


@lru_cache(maxsize=256)
def plane_pieces(bits: tuple[int, ...]) -> dict[int, tuple[tuple[int, int], ...]]:
    """For each plane width in use, its pieces in storage order as ``(coordinate, shift)``."""
    planes: dict[int, list[tuple[int, int]]] = {}
    for piece in range(3):
        for coordinate, b in enumerate(bits):
            widths = PIECES[b]
            if piece < len(widths):
                planes.setdefault(widths[piece], []).append((coordinate, sum(widths[:piece])))
    return {w: tuple(planes[w]) for w in PLANE_WIDTHS if w in planes}


def plane_columns(width: int, pieces: int) -> int:
    """Stored columns of a plane with that many pieces, padding to whole granules included."""
    g = granule(width)
    return -(-pieces // g) * g


def key_plane_shapes(bits: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Trailing shapes of the key planes, widest first, for ``tokens`` (a multiple of 16) rows."""
    planes = plane_pieces(tuple(bits)).items()
    return [(tokens // TOKEN_TILE, plane_columns(w, len(p)) // granule(w), TOKEN_TILE, 4) for w, p in planes]


def value_plane_shapes(bits: int, tokens: int, head_dim: int) -> list[tuple[int, ...]]:
    """Trailing shapes of the value planes, low bits first, for ``tokens`` (a multiple of 32) rows."""
    return [(tokens // granule(w), head_dim // CHANNEL_TILE, CHANNEL_TILE, 4) for w in PIECES[bits]]


def key_bytes_per_token(bits: Sequence[int]) -> int:
    """Bytes that one key row takes in all planes."""
    return sum(plane_columns(w, len(p)) * w // 8 for w, p in plane_pieces(tuple(bits)).items())


def value_bytes_per_token(bits: int, head_dim: int) -> int:
    """Bytes that one value row takes in all planes."""
    return head_dim * bits // 8


def pack_keys(codes: Tensor, bits: Sequence[int]) -> list[Tensor]:
    """Pack ``codes [..., T, M]`` (uint8, ``codes[..., i] < 2**bits[i]``) into planes ``[..., T/16, N/(4P), 16, 4]``."""
    planes = []
    for width, piece in _key_pieces(codes, tuple(bits)):
        split = piece.unflatten(-1, (-1, 8 // width, 4)).unflatten(-4, (-1, TOKEN_TILE))  # [..., T/16, 16, g, P, 4]
        planes.append(_fold(split, width).transpose(-3, -2).contiguous())
    return planes


def _key_pieces(codes: Tensor, bits: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """For each plane its width and its pieces ``[..., T, N]``."""
    planes = plane_pieces(bits)
    if len(planes) == 1 and set(bits) == planes.keys() and plane_columns(bits[0], len(bits)) == len(bits):
        yield bits[0], codes  # each code is its only piece
        return
    for width, pieces in planes.items():
        parts = [(codes[..., part] >> shift) & (2**width - 1) for _, part, shift in _runs(pieces)]
        piece = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        yield width, torch.nn.functional.pad(piece, (0, plane_columns(width, len(pieces)) - len(pieces)))


def unpack_keys(planes: Sequence[Tensor], bits: Sequence[int]) -> Tensor:
    """Codes ``[..., T, M]`` (uint8) of :func:`pack_keys`' planes."""
    codes: Tensor | None = None
    for plane, (width, pieces) in zip(planes, plane_pieces(tuple(bits)).items(), strict=True):
        split = _spread(plane.transpose(-3, -2), width)  # [..., T/16, 16, g, P, 4]
        piece = split.flatten(-3).flatten(-3, -2)[..., : len(pieces)]
        if codes is None:
            if [c for c, _ in pieces] == list(range(len(bits))) and not any(s for _, s in pieces):
                codes = piece
                continue
            codes = piece.new_zeros((*piece.shape[:-1], len(bits)))
        for columns, part, shift in _runs(pieces):
            codes[..., part] |= piece[..., columns] << shift
    assert codes is not None
    return codes


def pack_values(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack ``codes [..., T, D]`` (uint8 < 2**bits) into planes ``[..., T/(4P), D/16, 16, 4]``."""
    planes, shift = [], 0
    for width in PIECES[bits]:
        piece = codes if width == bits else (codes >> shift) & (2**width - 1)
        split = piece.unflatten(-2, (-1, 8 // width, 4)).unflatten(-1, (-1, CHANNEL_TILE))  # [..., t, P, 4, D/16, 16]
        split = split.movedim((-4, -3), (-2, -1))  # [..., t, D/16, 16, P, 4]
        planes.append(_fold(split, width).contiguous())
        shift += width
    return planes


def unpack_values(planes: Sequence[Tensor], bits: int) -> Tensor:
    """Codes ``[..., T, D]`` (uint8) of :func:`pack_values`' planes."""
    codes, shift = None, 0
    for plane, width in zip(planes, PIECES[bits], strict=True):
        split = _spread(plane, width).movedim((-2, -1), (-4, -3))  # [..., t, P, 4, D/16, 16]
        piece = split.flatten(-2).flatten(-4, -2) << shift
        codes = piece if codes is None else codes | piece
        shift += width
    assert codes is not None
    return codes


def _fold(pieces: Tensor, width: int) -> Tensor:
    """``[..., P, 4]`` pieces to ``[..., 4]`` bytes."""
    byte = pieces[..., 0, :].clone()
    for p in range(1, 8 // width):
        byte |= pieces[..., p, :] << (p * width)
    return byte


def _spread(byte: Tensor, width: int) -> Tensor:
    """``[..., 4]`` bytes to ``[..., P, 4]`` pieces: four bytes are shifted as one number."""
    shift = torch.arange(0, 8, width, dtype=torch.int32, device=byte.device)
    pieces = (byte.contiguous().view(torch.int32) >> shift) & (2**width - 1) * 0x01010101
    spread: Tensor = pieces.view(torch.uint8).unflatten(-1, (-1, 4))
    return spread


@lru_cache(maxsize=256)
def _runs(pieces: tuple[tuple[int, int], ...]) -> tuple[tuple[slice, slice, int], ...]:
    """A plane's columns, the coordinates in them, one after the other, and their shift."""
    starts = [i for i, (c, s) in enumerate(pieces) if not i or pieces[i - 1] != (c - 1, s)]
    cuts = [slice(*pair) for pair in pairwise([*starts, len(pieces)])]
    firsts = [pieces[cut.start] for cut in cuts]
    return tuple((cut, slice(c, c + cut.stop - cut.start), s) for cut, (c, s) in zip(cuts, firsts, strict=True))
