"""Packing of small integer codes: the only owner of bits, bytes and planes.

A coordinate of ``b`` bits is split into plane pieces of 4, 2 or 1 bits, low bits first (3 = 2 + 1). All pieces
of one width form one plane. A plane byte holds ``P = 8 / width`` pieces. Reading 64 bytes gives

- keys,   ``[T/16, N/(4P), 16, 4]``: 16 tokens, and for each 4P coordinates (coordinate ``g·4P + p·4 + i`` sits in
  byte ``i`` of group ``g`` at bit ``p·width``), so a dot product needs no horizontal sum;
- values, ``[T/(4P), D/16, 16, 4]``: 16 channels, and for each 4P tokens, so a weighted sum over tokens needs none.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

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
        shift = pieces[0][1]
        if all(piece == (i, shift) for i, piece in enumerate(pieces)):
            piece = (codes[..., : len(pieces)] >> shift) & (2**width - 1)
        else:
            coordinates, shifts = (torch.tensor(x, device=codes.device) for x in zip(*pieces, strict=True))
            piece = (codes[..., coordinates] >> shifts.to(torch.uint8)) & (2**width - 1)
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
        for columns, shift in _runs(pieces):
            coordinates = torch.tensor([pieces[c][0] for c in columns], device=plane.device)
            codes[..., coordinates] |= piece[..., columns[0] : columns[-1] + 1] << shift
    assert codes is not None
    return codes


@lru_cache(maxsize=256)
def _query_index(bits: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Per plane: the coordinate of each column (M for padding), and its weight, a power of two."""
    index = []
    for width, pieces in plane_pieces(bits).items():
        padding = [(len(bits), 0)] * (plane_columns(width, len(pieces)) - len(pieces))
        coordinates, shifts = zip(*pieces, *padding, strict=True)
        weights = torch.tensor([2.0**s for s in shifts], dtype=torch.float32, device="cpu")
        index.append((torch.tensor(coordinates, device="cpu"), weights))
    return tuple(index)


def query_planes(q: Tensor, bits: Sequence[int]) -> list[Tensor]:
    """A query ``[..., M]`` in each plane's columns ``[..., N]``, so that ``q·codes`` is the sum of plane products."""
    padded = torch.nn.functional.pad(q, (0, 1))
    return [padded.index_select(-1, c) * w.to(q.dtype) for c, w in _query_index(tuple(bits))]


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
    """``[..., 4]`` bytes to ``[..., P, 4]`` pieces."""
    return torch.stack([(byte >> (p * width)) & (2**width - 1) for p in range(8 // width)], dim=-2)


def _runs(pieces: Sequence[tuple[int, int]]) -> list[tuple[list[int], int]]:
    """Group a plane's columns into runs of equal shift."""
    runs: list[tuple[list[int], int]] = []
    for column, (_, shift) in enumerate(pieces):
        if runs and runs[-1][1] == shift:
            runs[-1][0].append(column)
        else:
            runs.append(([column], shift))
    return runs
