"""``Calibration``: raw moments of queries, keys and values, independent of any config."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headq_ao.files import FileKind

CALIBRATION = FileKind("calibration", 2, "make one with calibrate(...).save(path)")
TENSORS = ("q_outer", "k_sum", "k_outer", "v_sum", "v_outer", "k_rows")


@dataclass(eq=False)
class LayerMoments:
    """Sums over ``tokens`` calibration tokens of one layer, after QK-norm and RoPE, fp32.

    ``q_outer [Hkv, D, D]`` = Σ q qᵀ over the query heads of each KV head (``tokens · groups`` terms);
    ``k_sum``, ``v_sum`` ``[Hkv, D]``; ``k_outer``, ``v_outer`` ``[Hkv, D, D]``;
    ``k_rows [n, Hkv, D]``, a uniform sample of keys.
    """

    tokens: int
    groups: int
    q_outer: Tensor
    k_sum: Tensor
    k_outer: Tensor
    v_sum: Tensor
    v_outer: Tensor
    k_rows: Tensor

    @property
    def c_q(self) -> Tensor:
        """``C_q = E[q qᵀ]``, ``[Hkv, D, D]``."""
        return self.q_outer / max(self.tokens * self.groups, 1)

    @property
    def k_mean(self) -> Tensor:
        """``[Hkv, D]``."""
        return self.k_sum / max(self.tokens, 1)

    def check(self, layer: int) -> None:
        """Raise ValueError, naming ``layer``, where counts or shapes do not fit together or a number is not finite."""
        h, d = self.k_sum.shape
        shapes = {"q_outer": (h, d, d), "k_outer": (h, d, d), "v_sum": (h, d), "v_outer": (h, d, d)}
        shapes["k_rows"] = (self.k_rows.shape[0], h, d)
        for name in ("tokens", "groups"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"layer {layer}: {name} must be a whole number of at least 1")
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"layer {layer}: {name} must be {shape}, got {tuple(getattr(self, name).shape)}")
        for name in TENSORS:
            x = getattr(self, name)
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
        layers = [{"tokens": layer.tokens, "groups": layer.groups} for layer in self.layers]
        return {"fingerprint": self.fingerprint, "meta": self.meta, "layers": layers}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all layers, named ``{layer}.{field}``."""
        return {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(self.layers) for name in TENSORS}

    @classmethod
    def of(cls, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Calibration":
        """From :meth:`head` and :meth:`tensors`.

        Raises:
            KeyError, TypeError, ValueError: where they do not describe a calibration.
        """
        layers = []
        for i, counts in enumerate(head["layers"]):
            fields: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in TENSORS}
            layer = LayerMoments(**counts, **fields)
            layer.check(i)
            layers.append(layer)
        if extra := set(tensors) - {f"{i}.{name}" for i in range(len(layers)) for name in TENSORS}:
            raise ValueError(f"it holds tensors that no layer has: {', '.join(sorted(extra)[:4])}")
        return cls(layers, head["fingerprint"], head["meta"])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calibration":
        """Itself: never changed, and shared by the copies of a model and of its caches."""
        return self

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

    def add(self, q: Tensor, k: Tensor, v: Tensor, priority: Tensor) -> None:
        """Fold ``q [N, Hq, D]``, ``k``, ``v`` ``[N, Hkv, D]`` with ``priority [N]``."""
        q, k, v = q.double(), k.double(), v.double()
        self.groups = q.shape[1] // k.shape[1]
        q = q.unflatten(1, (k.shape[1], -1))
        new = [
            torch.einsum("nhgd,nhge->hde", q, q),
            k.sum(0),
            torch.einsum("nhd,nhe->hde", k, k),
            v.sum(0),
            torch.einsum("nhd,nhe->hde", v, v),
        ]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.tokens += k.shape[0]
        rows, priority = k.float(), priority.to(k.device)
        if self.rows is not None and self.priority is not None:
            rows, priority = torch.cat([self.rows, rows]), torch.cat([self.priority, priority])
        keep = priority.topk(min(self.n_rows, len(priority))).indices.sort().values
        self.rows, self.priority = rows[keep], priority[keep]

    def moments(self) -> LayerMoments:
        """The sums so far, on the CPU in fp32."""
        assert self.rows is not None
        q_outer, k_sum, k_outer, v_sum, v_outer = (s.float().cpu() for s in self.sums)
        return LayerMoments(self.tokens, self.groups, q_outer, k_sum, k_outer, v_sum, v_outer, self.rows.cpu())
