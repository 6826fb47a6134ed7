"""A bit-shift trellis: each coordinate's level is looked up by the newest bits of the row's stream (QTIP, 2406.11235).

With ``b`` bits a coordinate and a window of ``L`` bits, the state after coordinate j is the last L bits of the stream
``s_j = (s_{j−1} 2^b + c_j) mod 2^L`` and ``x̂_j = level[s_j]``. The stream of a row is a circle (tail-biting): the bits
before the first coordinate are those of the last ones, so that a row of D coordinates takes ``b D`` bits and no more.
The codes of least error are found by Viterbi's algorithm over the ``2^L`` states.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.evals.baselines import trellis_kernel
from headq_ao.ops import ldl_factor

WINDOW = 8  # bits that a level is looked up by: 256 states
ROWS = 1024  # rows that go through the trellis together
FED_BACK = 128  # and where every survivor carries what its errors pull
TRAINED_ON, ROUNDS = 1024, 16  # rows of 64 normal numbers that levels are trained on, and how often
MULTIPLIER = 101  # of the first levels: neighbours in the trellis get levels far from each other


@dataclass(frozen=True)
class Metric:
    """``eᵀ H e`` of a row's error as ``Σ_j d_j (e_j + Σ_{i<j} n_ij e_i)²``, from ``H = N D Nᵀ``.

    Attributes:
        factor: N, upper triangular with a diagonal of ones, ``[D, D]``.
        weight: d, ``[D]``.
    """

    factor: Tensor
    weight: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> "Metric":
        """From H ``[D, D]``."""
        packed = ldl_factor(hessian).float()
        return cls(packed.triu(1) + torch.eye(len(packed), device=packed.device), packed.diagonal().contiguous())


def states(symbols: Tensor, bits: int, window: int = WINDOW) -> Tensor:
    """The states of circular rows of symbols ``[.., D]`` of ``bits`` bits: int64 ``[.., D]``."""
    found = torch.zeros_like(symbols, dtype=torch.int64)
    for i in range(window // bits):
        found += symbols.roll(i, -1).long() << bits * i
    return found


def encode(x: Tensor, bits: int, hessian: Tensor | None = None, window: int = WINDOW) -> Tensor:
    """Symbols uint8 ``[n, D]`` of rows ``x [n, D]`` in units of their RMS, tail-biting.

    A first pass begins in the middle of the row, with any state, and tells in which state the row should begin and
    end; a second one holds to it.

    Args:
        x: the rows.
        bits: of a symbol; divides ``window``.
        hessian: of the error ``[D, D]``; None: the identity.
    """
    d, levels = x.shape[-1], trained_levels(bits, window).to(x.device)
    if hessian is None:
        first = metric = None
    else:
        there = hessian.roll((d // 2, d // 2), (0, 1))
        metric, first = Metric.of(hessian), Metric.of(there)
    found = []
    for part in x.split(ROWS if hessian is None else FED_BACK):
        around = viterbi(part.roll(d // 2, -1), levels, bits, first)
        start = states(around, bits, window)[:, d // 2 - 1] & (len(levels) // 2**bits - 1)
        found.append(viterbi(part, levels, bits, metric, start))
    return torch.cat(found)


def decode(symbols: Tensor, bits: int, window: int = WINDOW) -> Tensor:
    """Levels ``[.., D]`` of symbols ``[.., D]``."""
    return trained_levels(bits, window).to(symbols.device)[states(symbols, bits, window)]


def viterbi(x: Tensor, levels: Tensor, bits: int, metric: Metric | None = None, start: Tensor | None = None) -> Tensor:
    """:func:`viterbi_reference`, by the compiled kernel where there is one."""
    factor, weight = (None, None) if metric is None else (metric.factor, metric.weight)
    found = trellis_kernel.launch(x, levels, bits, factor, weight, start)
    return viterbi_reference(x, levels, bits, metric, start) if found is None else found


def viterbi_reference(
    x: Tensor, levels: Tensor, bits: int, metric: Metric | None = None, start: Tensor | None = None
) -> Tensor:
    """Symbols uint8 ``[n, D]`` of the path of least error.

    States that share all but their oldest symbol go on alike: they are of one class, and of each class one survivor
    is kept. Under a metric every survivor carries what its errors so far pull the coordinates to come to (per-survivor
    processing), so that the path is chosen for ``eᵀ H e`` as error feedback chooses codes.

    Args:
        x: rows ``[n, D]``.
        levels: by state ``[2^L]``.
        bits: of a symbol.
        metric: of the error; None: the squared error.
        start: the class ``[n]`` int64 before the first coordinate and after the last; None: any.
    """
    n, d = x.shape
    k = 2**bits
    classes = len(levels) // k
    table, each = levels.view(classes, k), torch.arange(classes, device=x.device)
    cost = x.new_zeros(n, classes)
    if start is not None:
        cost.fill_(torch.inf).scatter_(1, start[:, None], 0.0)
    pulls = x.new_zeros(n, classes, d if metric is not None else 0)
    rows = torch.arange(n, device=x.device)[:, None] * classes
    picks = torch.empty(d, n, classes, dtype=torch.uint8, device=x.device)
    for j in range(d):
        target = x[:, j, None] if metric is None else x[:, j, None] + pulls[:, :, 0]
        miss = (target[:, :, None] - table).square_()
        if metric is not None:
            miss *= metric.weight[j]
        cost, pick = least((cost[:, :, None] + miss).view(n, k, classes))
        picks[j] = pick
        if metric is not None and j + 1 < d:
            before = pick.long() * classes + each
            error = x[:, j, None] - levels[before]
            pulls = pulls[:, :, 1:].reshape(n * classes, -1)[rows + before // k]
            pulls += error[:, :, None] * metric.factor[j, j + 1 :]
    at = cost.argmin(1) if start is None else start
    symbols = torch.empty(n, d, dtype=torch.uint8, device=x.device)
    for j in range(d - 1, -1, -1):
        state = picks[j].gather(1, at[:, None])[:, 0].long() * classes + at
        symbols[:, j] = (state & (k - 1)).to(torch.uint8)
        at = state >> bits
    return symbols


def least(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and its place (uint8) over dimension 1 of ``[n, 2^b, classes]``, by halves: a reduction is slower."""
    pick = torch.zeros_like(cost[:, 0], dtype=torch.uint8)[:, None].expand(-1, cost.shape[1], -1)
    size = 1
    while cost.shape[1] > 1:
        a, b = cost[:, 0::2], cost[:, 1::2]
        pick = torch.where(b < a, pick[:, 1::2] + size, pick[:, 0::2])
        cost, size = torch.minimum(a, b), 2 * size
    return cost[:, 0], pick[:, 0]


@functools.lru_cache(maxsize=8)
def trained_levels(bits: int, window: int = WINDOW) -> Tensor:
    """Levels ``[2^L]`` for normal coordinates: each the mean of what is coded by it, found by turns of coding and
    averaging (Lloyd); the first ones are quantiles in a mixed order."""
    n = 2**window
    order = (torch.arange(n) * MULTIPLIER) % n
    levels: Tensor = torch.special.ndtri((order.double() + 0.5) / n).float()
    x = torch.randn(TRAINED_ON, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(ROUNDS):
        at = states(viterbi(x, levels, bits), bits, window)[:, window // bits :].flatten()
        y = x[:, window // bits :].flatten()
        count = torch.bincount(at, minlength=n)
        mean = torch.zeros(n).index_add_(0, at, y) / count.clamp(min=1)
        levels = torch.where(count > 0, mean, levels)
    return levels
