"""What the kernels of a decoding step read of a layer's encoders: one row of numbers for each side and KV head.

Heads of different bits have rows of one form, so that one launch codes them all. A row is made once and kept for as
long as the encoder's tensors are there. With ``y_i / step_i`` for ``y_i``, ``M_ij = step_i H_ij step_j``, matrices
padded to ``[D, M]``, and ``P`` and the pulls as in :mod:`headq_ao.ops.error_feedback.triton_kernel`:

    ``numbers [32], mean [D], step [M], diagonal [M], pivot [M], encode [D, M], inner [2, M, 16], outer [2, M, M]``

``diagonal`` is that of ``M``, ``pivot`` the ``D`` of ``M = N D Nᵀ``. ``outer[k, j]`` is what an error of coordinate
``j`` adds to all pulls in sweep ``k`` (0: the elimination, 1: a descent) and ``inner[k, i, j % 16]`` what it adds to
coordinate ``i > j`` of its own block of 16.
"""

import functools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from headq_ao.ops.cache_update.encoders import unflatten
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.error_feedback.reference import PASSES, SPREADS
from headq_ao.ops.error_feedback.triton_kernel import in_levels
from headq_ao.ops.page_layout import PageLayout

BLOCK = 16  # coordinates whose errors enter the sums together
NUMBERS = 32  # at the start of a row: UNIT, FACTOR, ..., then the spreads
UNIT, FACTOR, TOP, SWEEPS, UNBIASED, WIDTH, BYTE_SCALE, FIRST_SPREAD = range(8)
KEPT = 512  # layers


class Shape(NamedTuple):
    """Of a row, and where its parts begin."""

    dim: int
    width: int

    @property
    def parts(self) -> tuple[int, ...]:
        """First numbers of mean, step, diagonal, pivot, encode, inner, outer; and the size of a row."""
        d, m = self
        found = [NUMBERS]
        for size in (d, m, m, m, d * m, 2 * m * BLOCK, 2 * m * m):
            found.append(found[-1] + size)
        return tuple(found)


def shape_of(layout: PageLayout) -> Shape:
    """Of the rows of a layer."""
    widths = [len(g.keys.bits) for g in layout.groups]
    dim = max(layout.key_dim, layout.value_dim)
    return Shape(max(BLOCK, triton.next_power_of_2(dim)), max(BLOCK, triton.next_power_of_2(max(dim, *widths))))


def served(layout: PageLayout, spec: str) -> bool:
    """Whether rows say all about the encoders: symmetric codes of one bit width and one scale a token."""
    sides = [(g.keys, len(g.keys.bits)) for g in layout.groups]
    sides += [(g.values, layout.value_dim) for g in layout.groups]
    if any(side.zero or side.groups != 1 or len(set(side.bits)) != 1 for side, _ in sides):
        return False
    for text in spec.split(";"):
        names, bits, step, group_size, *_ = text.split(",") if text else ("", "", "", "0")
        if "side_encode" in names or not (step or "step" in names.split("+")) or len(set(bits.split("+"))) != 1:
            return False
        if group_size != "0":
            return False
    return True


_made: dict[tuple[object, ...], tuple[Tensor | None, list["weakref.ref[Tensor]"]]] = {}


def matrices(layout: PageLayout, tensors: Sequence[Tensor], spec: str) -> Tensor | None:
    """Rows ``[2 · Hkv, numbers]`` fp32 of flat encoders, keys first, kept; None where their tensors belong to the
    sequences, or are of fp64."""
    key = (layout, spec, *((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))
    found = _made.get(key)
    if found is not None and all(ref() is t for ref, t in zip(found[1], tensors, strict=True)):
        return found[0]
    if len(_made) >= KEPT:
        _made.clear()
    rows = None
    sides, shape = unflatten(tensors, spec), shape_of(layout)
    if all(t.shape[0] == 1 and t.dtype != torch.float64 for side in sides for e in side if e for t in e.tensors):
        heads = [g.heads for g in layout.groups]
        made = [_rows(e, n, shape) for side in sides for e, n in zip(side, heads, strict=True) if e is not None]
        rows = torch.cat(made)
    _made[key] = rows, [weakref.ref(t, lambda _: _made.pop(key, None)) for t in tensors]
    return rows


def _rows(encoder: Encoder, heads: int, shape: Shape) -> Tensor:
    """Of one side of one head group."""
    encode = encoder.encode[0].double()
    dim, width = encode.shape[-2:]
    device = encode.device
    ones = functools.partial(encode.new_ones, dtype=torch.float64)
    number = encoder.step if isinstance(encoder.step, float | int) else None
    spare_dim, spare = shape.dim - dim, shape.width - width
    eye = torch.eye(width, dtype=torch.float64, device=device)[None]
    step, hessian, feedback = ones((1, width)), eye, eye
    spreads: tuple[float, ...] = SPREADS
    factor, sweeps = 1.0, 1 + PASSES
    if encoder.hessian is None and number is not None:
        spreads, sweeps = (number,), 1
    elif number is not None:
        factor = number
    if isinstance(encoder.step, Tensor):
        step = encoder.step[0].double()
        if encoder.hessian is None:
            spreads, sweeps = (1.0,), 1
    if encoder.hessian is not None:
        assert encoder.factor is not None
        step = step if number is None else step * number
        hessian, feedback = encoder.hessian[0].double(), encoder.factor[0].double()
    _, diagonal, of_sweeps = in_levels(hessian, feedback, step)
    pulls = pad(of_sweeps.transpose(0, 1), (0, spare, 0, spare)).transpose(-1, -2)  # [h, 2, j, i]
    block = torch.arange(shape.width, device=device) // BLOCK
    same = block[:, None] == block
    own = pulls.triu(1).masked_fill(~same, 0).transpose(-1, -2)  # [h, 2, i, j]
    inner = own.unflatten(-1, (-1, BLOCK)).sum(-2)
    outer = pulls.masked_fill(same.triu(1), 0)
    parts = {
        "mean": pad(0 * ones((1, dim)) if encoder.mean is None else encoder.mean[0].double(), (0, spare_dim)),
        "step": pad(step, (0, spare), value=1.0),
        "diagonal": pad(diagonal, (0, spare)),
        "pivot": pad(feedback.diagonal(dim1=-2, dim2=-1) * step.square(), (0, spare)),
        "encode": pad(encode, (0, spare, 0, spare_dim)),
        "inner": inner,
        "outer": outer,
    }
    unit = ones((1, 1)) if encoder.unit is None else encoder.unit[0].double()
    said = [factor, 2 ** encoder.bits[0] - 1, sweeps, encoder.unbiased, width, encoder.scale_bits == 8, *spreads]
    numbers = torch.tensor(said, dtype=torch.float64, device="cpu").to(device).expand(heads, -1)
    numbers = pad(torch.cat([unit.expand(heads, -1), numbers], 1), (0, NUMBERS - 1 - len(said)))
    flat = [numbers, *(x.flatten(1).expand(heads, -1) for x in parts.values())]
    return torch.cat(flat, 1).float().contiguous()
