"""``Calibration``: raw moments of queries, keys and values, independent of any config."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.files import FileKind
from headq_ao.seen import UNIFORM
from headq_ao.units import unit_of, unless_plain

CALIBRATION = FileKind("calibration", 4, "make one with calibrate(...).save(path)", oldest=3)
UNCOUNTED = 3  # files of this version do not say on how many effective tokens they rest, and are taken as they are
PLENTY, MOST_PLENTY = 12, 900  # effective tokens per coordinate of a head, and at most, that leave no doubt
NEEDED, MOST_NEEDED = 8, 768  # the same to be used: with fewer, a sequence's own statistics are better
TENSORS = (
    "q_outer", "q_seen_outer", "k_sum", "k_outer", "k_seen", "k_seen_sum", "k_seen_outer",
    "v_sum", "v_outer", "v_seen", "v_seen_sum", "v_seen_outer", "k_rows",
)  # fmt: skip
PROFILE = ("errors", "energy")
COUNTS = ("tokens", "groups", "effective")
PROFILED_BITS = (1, 2, 3, 4)


def tensor_shapes(heads: int, head_dim: int, rows: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of :class:`LayerMoments`."""
    square, vector = (heads, head_dim, head_dim), (heads, head_dim)
    kinds = {"outer": square, "sum": vector, "seen": (heads,), "rows": (rows, heads, head_dim)}
    profile = {"errors": (heads, 2, len(PROFILED_BITS)), "energy": (heads,)}
    return {name: kinds[name.rpartition("_")[2]] for name in TENSORS} | profile


@dataclass(eq=False)
class LayerMoments:
    """Sums over ``tokens`` calibration tokens of one layer, after QK-norm and RoPE, fp32.

    ``q_outer [Hkv, D, D]`` = Σ q qᵀ over the query heads of each KV head (``tokens · groups`` terms);
    ``k_sum``, ``v_sum`` ``[Hkv, D]``; ``k_outer``, ``v_outer`` ``[Hkv, D, D]``;
    ``k_rows [n, Hkv, D]``, a uniform sample of keys. Those with ``seen`` are weighted by what attention sees
    (:func:`headq_ao.seen.seen_weights`); ``k_seen``, ``v_seen`` ``[Hkv]`` are the sums of the weights.
    ``effective``: how many different tokens they rest on (:func:`headq_ao.calibration_text.effective_tokens`); None
    where nobody counted: the moments are then taken as they are.
    ``errors [Hkv, 2, 4]`` and ``energy [Hkv]``, where measured: what 1 to 4 bits of keys and of values change in the
    output (:func:`headq_ao.allocate.output_errors`).
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

    @property
    def c_q(self) -> Tensor:
        """``C_q = E[q qᵀ]``, ``[Hkv, D, D]``."""
        return self.q_outer / max(self.tokens * self.groups, 1)

    @property
    def k_mean(self) -> Tensor:
        """``[Hkv, D]``."""
        return self.k_sum / max(self.tokens, 1)

    @property
    def seen_c_q(self) -> Tensor:
        """``C_q = E[w q qᵀ]`` with each query's weight, ``[Hkv, D, D]``; ``C_q`` where no query has any."""
        counted = self.q_seen_outer.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        return torch.where(counted[:, None, None], self.q_seen_outer / max(self.tokens * self.groups, 1), self.c_q)

    def seen(self, side: str) -> tuple[Tensor, Tensor]:
        """Mean ``[Hkv, D]`` and second moment ``[Hkv, D, D]`` of ``"k"`` or ``"v"``, weighted as attention sees them.

        A quarter of the weight is uniform (:data:`headq_ao.seen.UNIFORM`), all of it where nothing was seen.
        """
        weight, n = getattr(self, f"{side}_seen"), max(self.tokens, 1)
        share = (weight > 0).to(weight.dtype) * (1 - UNIFORM)

        def mix(name: str) -> Tensor:
            plain, seen = getattr(self, f"{side}_{name}"), getattr(self, f"{side}_seen_{name}")
            wide = (-1, *[1] * (plain.ndim - 1))
            return (1 - share).view(wide) * plain / n + (share / weight.clamp(min=1e-30)).view(wide) * seen

        return mix("sum"), mix("outer")

    def shrunk(self, side: str) -> tuple[Tensor, Tensor]:
        """:meth:`seen`, the covariance shrunk towards the isotropic one by what the effective tokens leave open."""
        mean, outer = self.seen(side)
        if not self.doubt:
            return mean, outer
        square = mean[..., :, None] * mean[..., None, :]
        return mean, self._shrunk(outer - square) + square

    @property
    def shrunk_c_q(self) -> Tensor:
        """:attr:`seen_c_q`, shrunk alike."""
        return self._shrunk(self.seen_c_q)

    @property
    def doubt(self) -> float:
        """How far what was measured gives way to what is known without, ``λ = 1 / (1 + (n / D)³)`` of ``n`` effective
        tokens: 1 for none, 0.2 % at :data:`NEEDED`; 0 from :data:`PLENTY` on, or where nobody counted."""
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
        """Share of the layer's energy that 1, 2, 3 and 4 bits of the keys (0) or the values (1) of each head change."""
        assert self.errors is not None and self.energy is not None
        return (self.errors[:, side] / self.energy.sum().clamp(min=1e-30)).tolist()

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
        return {name: x for name in (*TENSORS, *PROFILE) if (x := getattr(self, name)) is not None}

    def check(self, layer: int) -> None:
        """Raise ValueError, naming ``layer``, where counts or shapes do not fit together or a number is not finite."""
        heads, head_dim = self.k_sum.shape
        shapes = tensor_shapes(heads, head_dim, self.k_rows.shape[0])
        if (self.errors is None) != (self.energy is None):
            raise ValueError(f"layer {layer}: errors and energy must come together")
        for name in ("tokens", "groups"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"layer {layer}: {name} must be a whole number of at least 1")
        if self.effective is not None and (type(self.effective) is not int or self.effective < 0):
            raise ValueError(f"layer {layer}: effective must be a whole number of at least 0, got {self.effective!r}")
        for name, x in self.tensors().items():
            if x.shape != shapes[name]:
                raise ValueError(f"layer {layer}: {name} must be {shapes[name]}, got {tuple(x.shape)}")
            if x.dtype != torch.float32 or not bool(torch.isfinite(x).all()):
                raise ValueError(f"layer {layer}: {name} must hold finite float32 numbers")


@dataclass(eq=False)
class Calibration:
    """Statistics of one model on calibration text; made by :func:`headq_ao.calibrate`.

    Holds counts, raw moments and a sample of keys per layer, nothing that depends on a config.

    Args:
        layers: one :class:`LayerMoments` per layer.
        fingerprint: what the model must match: type, layers, heads, head_dim, rope and some weights.
        meta: tokens, library versions.

    Example:
        >>> import os, tempfile
        >>> from headq_ao import Calibration
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "calibration.safetensors")
        ...     Calibration([], {"model_type": "none"}).save(path)
        ...     Calibration.load(path).fingerprint["model_type"]
        'none'
    """

    layers: list[LayerMoments]
    fingerprint: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file whose header carries the JSON description and a checksum; atomic.

        Raises:
            FileNotFoundError: when there is no folder to write to.
            OSError: when it cannot be written; an older file of that name is then unchanged.
        """
        CALIBRATION.save(path, self.head(), self.tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read :meth:`save`'s file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no calibration, truncated, changed, or of an older or newer version.
        """
        head, tensors = CALIBRATION.load(path)
        with CALIBRATION.refusing(path):
            return cls.of(head, tensors)

    def head(self) -> dict[str, Any]:
        """Everything but the tensors, as plain data for JSON."""
        layers = [{name: getattr(layer, name) for name in COUNTS} for layer in self.layers]
        return {"fingerprint": self.fingerprint, "meta": self.meta, "layers": layers}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all layers, named ``{layer}.{field}``."""
        return {f"{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.tensors().items()}

    @classmethod
    def of(cls, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Calibration":
        """From :meth:`head` and :meth:`tensors`.

        Raises:
            KeyError, TypeError, ValueError: where they do not describe a calibration.
        """
        layers = []
        for i, counts in enumerate(head["layers"]):
            fields: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in TENSORS}
            fields |= {name: tensors.get(f"{i}.{name}") for name in PROFILE}
            counts = {"effective": None if head.get("version") == UNCOUNTED else "left out"} | counts
            layer = LayerMoments(**counts, **fields)
            layer.check(i)
            layers.append(layer)
        if extra := set(tensors) - {f"{i}.{name}" for i in range(len(layers)) for name in (*TENSORS, *PROFILE)}:
            raise ValueError(f"it holds tensors that no layer has: {', '.join(sorted(extra)[:4])}")
        return cls(layers, head["fingerprint"], head["meta"])

    @property
    def effective_tokens(self) -> int | None:
        """How many different tokens, each in its context, the statistics rest on; None where nobody counted them.

        Example:
            >>> from headq_ao import Calibration
            >>> Calibration([], {}).effective_tokens is None
            True
        """
        known = [layer.effective for layer in self.layers if layer.effective is not None]
        return min(known, default=None)

    @property
    def needed_tokens(self) -> int:
        """How many effective tokens it takes to be used: 8 for each coordinate of the widest head, at most 768."""
        return min(NEEDED * max((layer.k_sum.shape[-1] for layer in self.layers), default=0), MOST_NEEDED)

    @property
    def suffices(self) -> bool:
        """Whether it rests on as many effective tokens as it takes, or on a number that nobody counted."""
        return self.effective_tokens is None or self.effective_tokens >= self.needed_tokens

    def shortage(self) -> str:
        """How many effective tokens there are and how many it takes, for messages."""
        return (
            f"the calibration rests on {self.effective_tokens} effective tokens (different ones, each in its context) "
            f"and needs {self.needed_tokens}; calibrate on more varied text"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calibration":
        """Itself: never changed, and shared by the copies of a model and of its caches."""
        return self

    def __repr__(self) -> str:
        kind, tokens = self.fingerprint.get("model_type"), self.meta.get("tokens")
        return f"Calibration(model_type={kind!r}, layers={len(self.layers)}, tokens={tokens})"

    def check_model(self, fingerprint: dict[str, Any]) -> None:
        """Raise ValueError where this calibration was made on another model."""
        wrong = [k for k, here in fingerprint.items() if not _same(here, self.fingerprint.get(k))]
        if wrong:
            raise ValueError(
                "the calibration was made on another model: "
                + "; ".join(f"{k} is {fingerprint[k]!r} here and {self.fingerprint.get(k)!r} there" for k in wrong)
                + "; run calibrate on this model"
            )


def _same(here: Any, there: Any) -> bool:
    """Equal, or for lists of floats equal within what a dtype cast changes."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        return all(math.isclose(a, b, rel_tol=5e-3, abs_tol=1e-6) for a, b in zip(here, there, strict=True))
    return bool(here == there)


class MomentAccumulator:
    """Running sums for one layer; ``n_rows`` keys are kept by the largest random priority per token."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.tokens = 0
        self.sums: list[Tensor] = []
        self.rows: Tensor | None = None
        self.priority: Tensor | None = None
        self.groups = 1

    def add(self, q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], priority: Tensor) -> None:
        """Fold ``q [N, Hq, D]``, ``k``, ``v`` ``[N, Hkv, D]``, the ``weights`` of their rows, and ``priority [N]``."""
        q, k, v, of_q, of_k, of_v = (x.double() for x in (q, k, v, *weights))
        self.groups = q.shape[1] // k.shape[1]
        q, of_q = q.unflatten(1, (k.shape[1], -1)), of_q.unflatten(1, (k.shape[1], -1))
        new = [torch.einsum("nhgd,nhge->hde", q, q), torch.einsum("nhg,nhgd,nhge->hde", of_q, q, q)]
        for x, weight in ((k, of_k), (v, of_v)):
            new += [x.sum(0), torch.einsum("nhd,nhe->hde", x, x), weight.sum(0)]
            new += [torch.einsum("nh,nhd->hd", weight, x), torch.einsum("nh,nhd,nhe->hde", weight, x, x)]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.tokens += k.shape[0]
        rows, priority = k.float(), priority.to(k.device)
        if self.rows is not None and self.priority is not None:
            rows, priority = torch.cat([self.rows, rows]), torch.cat([self.priority, priority])
        keep = priority.topk(min(self.n_rows, len(priority))).indices.sort().values
        self.rows, self.priority = rows[keep], priority[keep]

    @mode_neutral
    def moments(self) -> LayerMoments:
        """The sums so far, on the CPU in fp32."""
        assert self.rows is not None
        tensors = (*(s.float().cpu() for s in self.sums), self.rows.cpu())
        named: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        return LayerMoments(self.tokens, self.groups, **named)
