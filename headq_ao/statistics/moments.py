"""``LayerMoments``: raw moments of queries, keys and values of one layer."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from headq_ao.statistics.importance import UNIFORM
from headq_ao.statistics.units import unit_of, unless_plain

TENSORS = (
    "q_outer", "q_seen_outer", "k_sum", "k_outer", "k_seen", "k_seen_sum", "k_seen_outer",
    "v_sum", "v_outer", "v_seen", "v_seen_sum", "v_seen_outer", "k_rows",
)  # fmt: skip
SEGMENT_TOKENS = 256  # twice as many for models of more positions than that: a step maps its query for each segment
LONG = 2**15
PLENTY, MOST_PLENTY = 12, 900  # effective tokens per coordinate of a head, and at most, that leave no doubt
PROFILE = ("errors", "energy")
FISHER = ("k_fisher", "v_fisher", "loss")
MEASURED = (*PROFILE, *FISHER)  # what a calibration may lack
PROFILED_BITS = (1, 2, 3, 4)


def segment_tokens(positions: int) -> int:
    """Tokens of a segment whose frame keys are coded in, of a model for so many positions."""
    return SEGMENT_TOKENS if positions <= LONG else 2 * SEGMENT_TOKENS


def tensor_shapes(heads: int, head_dim: int, rows: int, value_dim: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of :class:`LayerMoments`; ``value_dim``: where it is another."""
    profile: dict[str, tuple[int, ...]] = {"errors": (heads, 2, len(PROFILED_BITS)), "energy": (heads,)}
    profile["loss"] = profile["errors"]
    found: dict[str, tuple[int, ...]] = {}
    for name in TENSORS:
        d = value_dim if name[0] == "v" and value_dim is not None else head_dim
        kinds = {"outer": (heads, d, d), "sum": (heads, d), "seen": (heads,), "rows": (rows, heads, d)}
        found[name] = kinds[name.rpartition("_")[2]]
    return found | profile | {f"{side}_fisher": found[f"{side}_outer"] for side in "kv"}


@dataclass(eq=False)
class LayerMoments:
    """Sums over ``tokens`` calibration tokens of one layer, after QK-norm and RoPE, fp32.

    ``q_outer [Hkv, D, D]`` = Σ q qᵀ over the query heads of each KV head (``tokens · groups`` terms);
    ``k_sum``, ``v_sum`` ``[Hkv, D]``; ``k_outer``, ``v_outer`` ``[Hkv, D, D]``;
    ``k_rows [n, Hkv, D]``, a uniform sample of keys. Those with ``seen`` in their names, which are
    the file's, are weighted by importance (:func:`headq_ao.statistics.importance.importance_weights`); ``k_seen`` and
    ``v_seen`` ``[Hkv]`` are the sums of the weights.
    ``effective``: how many different tokens there are (:func:`headq_ao.calibration.text.effective_tokens`); None where
    nobody counted: the moments are then taken as they are.
    ``segment_tokens``: queries and keys are in the frame of segments of so many tokens
    (:class:`headq_ao.ops.types.SegmentFrame`): keys in that of their own, queries in those of the keys that they read
    (``q_outer``, which has no weights: in that of their own); 0: as the model has them.
    ``errors [Hkv, 2, 4]`` and ``energy [Hkv]``, where measured: what 1 to 4 bits of keys and of values change in the
    output (:func:`headq_ao.calibration.bit_allocation.output_errors`).
    ``k_fisher [Hkv, D, D]``, ``v_fisher`` = Σ g gᵀ, the Fisher information of cached keys and values
    (:mod:`headq_ao.statistics.fisher`), and ``loss [Hkv, 2, 4]`` = Σ (g·e)² of what 1 to 4 bits leave, where measured.
    """

    tokens: int
    groups: int
    q_outer: Tensor
    q_seen_outer: Tensor
    k_sum: Tensor
    k_outer: Tensor
    k_seen: Tensor
    k_seen_sum: Tensor
    k_seen_outer: Tensor
    v_sum: Tensor
    v_outer: Tensor
    v_seen: Tensor
    v_seen_sum: Tensor
    v_seen_outer: Tensor
    k_rows: Tensor
    errors: Tensor | None = None
    energy: Tensor | None = None
    effective: int | None = None
    segment_tokens: int = 0
    k_fisher: Tensor | None = None
    v_fisher: Tensor | None = None
    loss: Tensor | None = None

    @property
    def c_q(self) -> Tensor:
        """``C_q = E[q qᵀ]``, ``[Hkv, D, D]``."""
        return self.q_outer / max(self.tokens * self.groups, 1)

    @property
    def k_mean(self) -> Tensor:
        """``[Hkv, D]``."""
        return self.k_sum / max(self.tokens, 1)

    @property
    def weighted_c_q(self) -> Tensor:
        """``C_q = E[w q qᵀ]`` with each query's weight, ``[Hkv, D, D]``; ``C_q`` where no query has any."""
        counted = self.q_seen_outer.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        return torch.where(counted[:, None, None], self.q_seen_outer / max(self.tokens * self.groups, 1), self.c_q)

    def weighted(self, side: str) -> tuple[Tensor, Tensor]:
        """Mean ``[Hkv, D]`` and second moment ``[Hkv, D, D]`` of ``"k"`` or ``"v"``, weighted by importance.

        A quarter of the weight is uniform (:data:`~.importance.UNIFORM`), all of it where no token has any.
        """
        weight: Tensor = getattr(self, f"{side}_seen")
        n = max(self.tokens, 1)
        share = (weight > 0).to(weight.dtype) * (1 - UNIFORM)

        def mix(name: str) -> Tensor:
            plain: Tensor = getattr(self, f"{side}_{name}")
            seen: Tensor = getattr(self, f"{side}_seen_{name}")
            wide = (-1, *[1] * (plain.ndim - 1))
            return (1 - share).view(wide) * plain / n + (share / weight.clamp(min=1e-30)).view(wide) * seen

        return mix("sum"), mix("outer")

    def shrunk(self, side: str) -> tuple[Tensor, Tensor]:
        """:meth:`weighted`, the covariance shrunk towards the isotropic one by what the effective tokens leave open."""
        mean, outer = self.weighted(side)
        if not self.doubt:
            return mean, outer
        square = mean[..., :, None] * mean[..., None, :]
        return mean, self._shrunk(outer - square) + square

    @property
    def shrunk_c_q(self) -> Tensor:
        """:attr:`weighted_c_q`, shrunk alike."""
        return self._shrunk(self.weighted_c_q)

    @property
    def key_metric(self) -> Tensor:
        """What an error of a key costs, ``eᵀ M e``, ``[Hkv, D, D]``: the Fisher information, of mean eigenvalue 1;
        :attr:`shrunk_c_q`, what the scores alone show, where it was not measured or no query reads the head."""
        return self.shrunk_c_q if self.k_fisher is None else self._fisher(self.k_fisher, self.shrunk_c_q)

    @property
    def value_metric(self) -> Tensor | None:
        """What an error of a value costs, alike; None, which is the identity, where it was not measured."""
        if self.v_fisher is None:
            return None
        return self._fisher(
            self.v_fisher, torch.eye(self.v_fisher.shape[-1], dtype=self.v_fisher.dtype, device=self.v_fisher.device)
        )

    def _fisher(self, outer: Tensor, unread: Tensor) -> Tensor:
        """Its mean eigenvalue brought to 1 and shrunk alike; ``unread`` of heads that nobody reads."""
        size = outer.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return torch.where(size > 0, self._shrunk(outer / size.clamp(min=1e-30)), unread)

    @property
    def doubt(self) -> float:
        """How far what was measured gives way to what is known without, ``λ = 1 / (1 + (n / D)³)`` of ``n`` effective
        tokens: 1 for none, 0.2 % at what a calibration needs; 0 from :data:`PLENTY` on, or where nobody counted."""
        if self.effective is None or self.effective >= min(PLENTY * self.k_sum.shape[-1], MOST_PLENTY):
            return 0.0
        return 1 / (1 + (self.effective / self.k_sum.shape[-1]) ** 3)

    def _shrunk(self, matrix: Tensor) -> Tensor:
        """``(1 − λ) C + λ tr(C)/D I``."""
        if not self.doubt:
            return matrix
        mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        even = mean * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return (1 - self.doubt) * matrix + self.doubt * even

    def relative_errors(self, side: int) -> list[list[float]]:
        """What 1, 2, 3 and 4 bits of the keys (0) or the values (1) of each head change: their share of the layer's
        energy; where ``loss`` is known, the geometric mean of that and of their cost by the Fisher information, which
        looks through all layers but to first order alone, and by a sample."""
        assert self.errors is not None and self.energy is not None
        found = self.errors[:, side] / self.energy.sum().clamp(min=1e-30)
        return (found if self.loss is None else (found * self.loss[:, side]).sqrt()).tolist()

    def unit(self, side: str) -> Tensor | None:
        """The unit of ``"q"``, ``"k"`` or ``"v"`` of each head, ``[1, Hkv, 1]``; None where all are 1."""
        terms = max(self.tokens * (self.groups if side == "q" else 1), 1)
        square = getattr(self, f"{side}_outer").diagonal(dim1=-2, dim2=-1).mean(-1) / terms
        return None if square.is_meta else unless_plain(unit_of(square.sqrt())[None, :, None])

    def in_units(self) -> "LayerMoments":
        """The moments of rows in their units: no floor of what is derived from them then depends on their size."""
        units = {side: unit[0] for side in "qkv" if (unit := self.unit(side)) is not None}
        scaled = {}
        for name, x in self.tensors().items():
            kind, unit = name.rpartition("_")[2], units.get(name[0])
            if unit is not None and kind in ("sum", "outer", "rows") and name in TENSORS:
                scaled[name] = x / unit[..., None] ** 2 if kind == "outer" else x / unit
        return dataclasses.replace(self, **scaled)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        return {name: x for name in (*TENSORS, *MEASURED) if (x := getattr(self, name)) is not None}

    def check(self, layer: int) -> None:
        """Raise ValueError, naming ``layer``, where counts or shapes do not fit together or a number is not finite."""
        heads, head_dim = self.k_sum.shape
        shapes = tensor_shapes(heads, head_dim, self.k_rows.shape[0], self.v_sum.shape[-1])
        if (self.errors is None) != (self.energy is None):
            raise ValueError(f"layer {layer}: errors and energy must come together")
        if len({getattr(self, name) is None for name in FISHER}) > 1:
            raise ValueError(f"layer {layer}: {', '.join(FISHER)} must come together")
        for name in ("tokens", "groups"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"layer {layer}: {name} must be a whole number of at least 1")
        if self.effective is not None and (type(self.effective) is not int or self.effective < 0):
            raise ValueError(f"layer {layer}: effective must be a whole number of at least 0, got {self.effective!r}")
        if type(self.segment_tokens) is not int or self.segment_tokens < 0:
            raise ValueError(
                f"layer {layer}: segment_tokens must be a whole number of at least 0, got {self.segment_tokens!r}"
            )
        for name, x in self.tensors().items():
            if x.shape != shapes[name]:
                raise ValueError(f"layer {layer}: {name} must be {shapes[name]}, got {tuple(x.shape)}")
            if x.dtype != torch.float32 or not bool(torch.isfinite(x).all()):
                raise ValueError(f"layer {layer}: {name} must hold finite float32 numbers")
