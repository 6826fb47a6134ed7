"""Tensors in fewer bytes on disk, exactly: each byte of an element entropy-coded by itself, with zlib's Huffman codes.

Codes of whitened rows are nearly independent, so that what a Huffman code over bytes leaves of their entropy is below a
percent; of a float the byte with the exponent takes a third. A search for repeats finds none and is left out.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HUFFMAN, RAW = "huffman", "raw"


def compress(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as uint8 ``[bytes]``, and what :func:`decompress` must know of each: JSON data.

    Example:
        >>> import torch
        >>> from headq_ao.compression import compress, decompress
        >>> x = {"scale": torch.rand(1000).half()}
        >>> streams, forms = compress(x)
        >>> streams["scale"].numel() < 2000, torch.equal(decompress(streams, forms)["scale"], x["scale"])
        (True, True)
    """
    streams, forms = {}, {}
    for name, tensor in tensors.items():
        parts, kinds = [], []
        for plane in _planes(tensor):
            raw = plane.numpy().tobytes()
            coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
            coded = coder.compress(raw) + coder.flush()
            smaller = len(coded) < len(raw)
            parts.append(coded if smaller else raw)
            kinds.append([HUFFMAN if smaller else RAW, len(parts[-1])])
        streams[name] = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8) if any(parts) else _nothing()
        dtype = str(tensor.dtype).removeprefix("torch.")
        forms[name] = {"dtype": dtype, "shape": list(tensor.shape), "planes": kinds}
    return streams, forms


def decompress(streams: Mapping[str, Tensor], forms: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of :func:`compress`.

    Raises:
        ValueError: where a stream does not give as many bytes as its tensor has; no more than these are made of it.
    """
    found = {}
    for name, stream in streams.items():
        form = forms[name]
        shape, dtype = form["shape"], getattr(torch, form["dtype"])
        count, data, planes, at = math.prod(shape), stream.numpy().tobytes(), [], 0
        for kind, length in form["planes"]:
            planes.append(_plane(kind, data[at : at + length], count, name))
            at += length
        if at != len(data) or len(planes) != dtype.itemsize:
            raise ValueError(f"{name} has {len(data)} bytes in {len(planes)} parts, which do not make up its elements")
        found[name] = torch.stack(planes, 1).flatten().view(dtype).view(shape)
    return found


def _plane(kind: str, data: bytes, count: int, name: str) -> Tensor:
    """One byte of each of ``count`` elements."""
    raw = data
    if kind == HUFFMAN:
        coder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            raw = coder.decompress(data, count + 1)
        except zlib.error as error:
            raise ValueError(f"{name} is damaged: {error}") from error
    if kind not in (HUFFMAN, RAW) or len(raw) != count:
        raise ValueError(f"{name} must give {count} bytes a part, got {len(raw)} from {kind!r}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if count else _nothing()


def _planes(tensor: Tensor) -> list[Tensor]:
    """The bytes of all elements, those of the same place together."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return [x.contiguous() for x in flat.view(-1, tensor.element_size()).unbind(1)]


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu")
