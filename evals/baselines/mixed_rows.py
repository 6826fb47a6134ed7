"""Rows of numbers of which each has bits of its own, packed one behind the other."""

import torch
from torch import Tensor

from headq_ao.evals.baselines.bitstream import pack_stream, stream_bytes, unpack_stream

CHOICES = (0, 2, 4, 8, 16)  # bits of a row: left out, min-max codes, or half precision


def row_bytes(n: int, choice: int, group: int) -> int:
    """Bytes of a row of n numbers, a scale and a zero in fp16 for every ``group`` of them where they are codes.

    Example:
        >>> from headq_ao.evals.baselines.mixed_rows import row_bytes
        >>> [row_bytes(64, choice, 32) for choice in range(5)]
        [0, 24, 40, 72, 128]
    """
    bits = CHOICES[choice]
    return bits * n // 8 if bits in (0, 16) else stream_bytes(n, bits) + 4 * -(-n // group)


def choice_bytes(n: int, group: int) -> list[int]:
    """:func:`row_bytes` of every choice."""
    return [row_bytes(n, choice, group) for choice in range(len(CHOICES))]


def pack_rows(x: Tensor, choice: Tensor, group: int) -> Tensor:
    """The bytes uint8 of rows ``x [m, n]`` with the bits ``CHOICES[choice]``, ``choice [m]`` int64."""
    sizes, n = torch.tensor(choice_bytes(x.shape[1], group), device=x.device), x.shape[1]
    begin = sizes[choice].cumsum(0) - sizes[choice]
    blob = torch.zeros(int(sizes[choice].sum()), dtype=torch.uint8, device=x.device)
    for number, bits in enumerate(CHOICES):
        chosen = choice == number
        if not bits or not n or not chosen.any():
            continue
        rows = x[chosen]
        if bits == 16:
            packed = _raw(rows.clamp(-65504, 65504))
        else:
            scale, zero = _range(rows, bits, group)
            spread = [t.float().repeat_interleave(group, 1)[:, :n] for t in (scale, zero)]
            codes = ((rows - spread[1]) / spread[0].clamp(min=1e-8)).round().clamp(0, 2**bits - 1)
            packed = torch.cat([pack_stream(codes, bits), _raw(scale), _raw(zero)], 1)
        blob[begin[chosen][:, None] + torch.arange(packed.shape[1], device=x.device)] = packed
    return blob


def unpack_rows(blob: Tensor, choice: Tensor, n: int, group: int) -> tuple[Tensor, int]:
    """:func:`pack_rows`, undone: ``[m, n]`` fp32, zeros where a row was left out, and how many bytes were read."""
    sizes = torch.tensor(choice_bytes(n, group), device=blob.device)
    begin = sizes[choice].cumsum(0) - sizes[choice]
    x = torch.zeros(len(choice), n, device=blob.device)
    for number, bits in enumerate(CHOICES):
        chosen = choice == number
        if not bits or not n or not chosen.any():
            continue
        packed = blob[begin[chosen][:, None] + torch.arange(int(sizes[number]), device=blob.device)]
        if bits == 16:
            x[chosen] = packed.view(torch.float16).float()
            continue
        codes, rest = (
            packed[:, : stream_bytes(n, bits)],
            packed[:, stream_bytes(n, bits) :].clone(memory_format=torch.contiguous_format),
        )
        scale, zero = rest.view(torch.float16).float().repeat_interleave(group, 1).unflatten(1, (2, -1)).unbind(1)
        x[chosen] = zero[:, :n] + scale[:, :n] * unpack_stream(codes, bits, n)
    return x, int(sizes[choice].sum())


def _range(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, the last one of what there is: ``[m, ⌈n / group⌉]`` fp16."""
    short = -rows.shape[1] % group
    whole = torch.cat([rows, rows[:, -1:].expand(-1, short)], 1).unflatten(1, (-1, group))
    low, high = whole.aminmax(dim=-1)
    return ((high - low) / (2**bits - 1)).half(), low.half()


def _raw(x: Tensor) -> Tensor:
    """The bytes of numbers ``[m, n]`` in half precision."""
    return x.half().contiguous().view(torch.uint8)
