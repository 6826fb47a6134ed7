"""``Calibration``: raw moments of queries, keys and values, independent of any config."""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

CALIBRATION_VERSION = 1
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
        """Write one safetensors file whose header carries the JSON description; atomic."""
        tensors = {
            f"{i}.{name}": getattr(layer, name).contiguous() for i, layer in enumerate(self.layers) for name in TENSORS
        }
        head = {
            "version": CALIBRATION_VERSION,
            "fingerprint": self.fingerprint,
            "meta": self.meta,
            "layers": [{"tokens": layer.tokens, "groups": layer.groups} for layer in self.layers],
        }
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"headq_calibration": json.dumps(head)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read :meth:`save`'s file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no calibration, is damaged, or of another version.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"no calibration file at {os.fspath(path)!r}; make one with calibrate(...).save(path)"
            )
        try:
            with safetensors.safe_open(path, "pt") as f:
                metadata = f.metadata() or {}
                if "headq_calibration" not in metadata:
                    raise ValueError("its header has no headq_calibration entry; make one with calibrate(...).save")
                head = json.loads(metadata["headq_calibration"])
                if head["version"] != CALIBRATION_VERSION:
                    raise ValueError(
                        f"version {head['version']}, but this headq_ao reads {CALIBRATION_VERSION}; calibrate again"
                    )
                layers = [
                    LayerMoments(**counts, **{name: f.get_tensor(f"{i}.{name}") for name in TENSORS})
                    for i, counts in enumerate(head["layers"])
                ]
                return cls(layers, head["fingerprint"], head["meta"])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a usable headq_ao calibration: {error}") from error

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


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary path beside ``path`` that replaces it on success and is removed on failure."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder!r} to write {os.path.basename(path)!r} to; create it first")
    temporary = os.path.join(folder, f".headq-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as f:
            mode = os.fstat(f.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors leaves the file to its owner alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
