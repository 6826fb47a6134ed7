"""A chunk of new tokens over many packed ones, as chunked prefill and prefix caching read them: one layer's attention
against flash attention over bf16 keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from headq_ao.codecs.rotation import Rotation
from headq_ao.evals.benchmarks.bench_rows import relative_error
from headq_ao.evals.benchmarks.triton_table import Case
from headq_ao.evals.gpu.layers import BF16_ERROR, MIX, packed
from headq_ao.evals.gpu.timing import Result, microseconds
from headq_ao.ops import paged_attention
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.types import PagedKV, Readers, SegmentFrame

SEGMENT = 512  # tokens, as models of more than 32k positions have them
CHECKED = 40, 320  # queries and packed tokens that are held to the reference


def chunk(
    case: Case, new: int, tokens: int, device: torch.device, bits: Sequence[int] = ()
) -> tuple[Tensor, float, PagedKV, Readers]:
    """Arguments of ``paged_attention`` for ``new`` queries with tokens of their own behind a full window and that many
    packed tokens, keys in the frame of their segment.

    Example:
        >>> q, scaling, kv, readers = chunk(Case(4, 2, 64, 2, 2), 40, 320, torch.device("cpu"))
        >>> q.shape, kv.new_k.shape, kv.total - kv.held
        (torch.Size([1, 4, 40, 64]), torch.Size([1, 2, 40, 64]), tensor([40]))
    """
    q, scaling, kv, readers = packed(case, tokens, device, window=True, bits=bits)
    g, d = torch.Generator(device).manual_seed(1), case.head_dim
    draw = partial(torch.randn, generator=g, device=device)
    q = draw(1, case.heads, new, d).bfloat16()
    k, v = (draw(1, case.kv_heads, new, d).bfloat16() for _ in range(2))
    kv = replace(kv, total=kv.held + new, new_k=k, new_v=v)
    return q, scaling, kv, replace(readers, frame=rotary(d, tokens, device))


def rotary(dim: int, tokens: int, device: torch.device) -> SegmentFrame:
    """Of Llama's rotary embedding, whose halves turn together."""
    angle = 500000.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64, device="cpu") / dim)
    other = torch.arange(dim, device="cpu").roll(dim // 2)
    return Rotation(torch.cat([-angle, angle]), other).frame(SEGMENT, tokens, device)


def error(case: Case, device: torch.device, bits: Sequence[int] = ()) -> float:
    """Relative error of ``paged_attention`` of a short chunk against the reference in fp64 on the same tokens."""
    q, scaling, kv, readers = chunk(case, *CHECKED, device, bits)
    expected, _ = reference.paged_attention(q.double(), scaling, kv, readers)
    return relative_error(paged_attention(q, scaling, kv, readers)[0], expected)


def compare(case: Case, new: int, tokens: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median microseconds of a chunk over packed tokens, of heads of one number of bits and of several, and of flash
    attention over as many in bf16."""
    of_mix = MIX[: case.kv_heads]
    calls: dict[str, Callable[[], Any]] = {
        "chunk": partial(paged_attention, *chunk(case, new, tokens, device)),
        "mixed": partial(paged_attention, *chunk(case, new, tokens, device, of_mix)),
    }
    q, _, kv, _ = chunk(case, new, tokens, device)
    length = int(kv.total)
    k, v = (torch.randn(1, case.kv_heads, length, case.head_dim, device=device).bfloat16() for _ in range(2))
    mask = causal_lower_right(new, length)
    calls["flash"] = partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=True)
    times = {name: microseconds([call], repeats, device) for name, call in calls.items()}
    return {
        **asdict(case), "new": new, "packed": tokens, "mix": of_mix, "microseconds": times,
        "over_flash": times["chunk"] / times["flash"],
    }  # fmt: skip


def measure(
    cases: Sequence[Case], cells: Sequence[tuple[int, int]], repeats: int, device: torch.device, result: Result
) -> None:
    """A row for each case and cell, new and packed tokens.

    Raises:
        RuntimeError: where a kernel differs from the reference by more than bf16 rounds; nothing is timed then.
    """
    for case in cases:
        found = max(error(case, device, bits) for bits in ((), MIX[: case.kv_heads]))
        if not found <= BF16_ERROR:
            raise RuntimeError(f"paged_attention of a chunk differs from the reference by {found:.2g} on {case}")
        result.data.setdefault("chunk_errors", {})[str(case)] = found
    for case in cases:
        for new, tokens in cells:
            result.add(**compare(case, new, tokens, device, repeats))
