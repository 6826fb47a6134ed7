"""``Calibration``: raw moments of queries, keys and values, independent of any config."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headq_ao.config import HeadQConfig
from headq_ao.files import FileKind
from headq_ao.statistics.moments import MEASURED, TENSORS, LayerMoments
from headq_ao.user_warning import warn

CALIBRATION = FileKind("calibration", 6, "make one with calibrate(...).save(path)", oldest=3)
UNCOUNTED = 3  # files of this version do not say on how many effective tokens they rest, and are taken as they are
UNFRAMED = (3, 4)  # their keys are as the model has them
NEEDED, MOST_NEEDED = 8, 768  # the same to be used: with fewer, a sequence's own statistics are better
COUNTS = ("tokens", "groups", "effective", "segment_tokens")


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
            fields |= {name: tensors.get(f"{i}.{name}") for name in MEASURED}
            version = head.get("version")
            known: dict[str, Any] = {"effective": None if version == UNCOUNTED else "left out"}
            known |= {"segment_tokens": 0 if version in UNFRAMED else "left out"}
            counts = known | counts
            layer = LayerMoments(**counts, **fields)
            layer.check(i)
            layers.append(layer)
        if extra := set(tensors) - {f"{i}.{name}" for i in range(len(layers)) for name in (*TENSORS, *MEASURED)}:
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
        """Whether it was made of enough effective tokens, or their number is not known."""
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
        wrong = differences(fingerprint, self.fingerprint)
        if wrong:
            raise ValueError(f"the calibration was made on another model: {wrong}; run calibrate on this model")


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Where a model's fingerprint differs from one that was kept; empty: nowhere."""
    wrong = [k for k, x in here.items() if not _same(x, there.get(k))]
    return "; ".join(
        f"its {k} differ" if isinstance(here[k], list) else f"{k} is {here[k]!r} here and {there.get(k)!r} there"
        for k in wrong
    )


def _same(here: Any, there: Any) -> bool:
    """Equal, or for lists of floats equal within what a dtype cast changes."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        return all(math.isclose(a, b, rel_tol=5e-3, abs_tol=1e-6) for a, b in zip(here, there, strict=True))
    return bool(here == there)


def usable_calibration(
    config: HeadQConfig, fingerprint: dict[str, Any] | None = None
) -> tuple[HeadQConfig, Calibration | None]:
    """A config and its calibration, read where it is a path; without it, and a warning, where it was made of too
    few tokens to be better than none.

    Args:
        config: with or without a calibration.
        fingerprint: of the model, to be compared with the calibration's; None: not compared.

    Raises:
        FileNotFoundError: when the calibration is a path and there is no such file.
        TypeError: when it is neither a path nor a :class:`Calibration`.
        ValueError: when the file is no calibration, or one of another model.
    """
    given = config.calibration
    if given is None:
        return config, None
    known = Calibration.load(given) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(known, Calibration):
        raise TypeError(f"calibration must be a Calibration, got {type(known)}")
    if fingerprint is not None:
        known.check_model(fingerprint)
    if known.suffices or config.codec is not None:
        return config, known
    bits = " and ".join(f"{side}={b}" for side in ("k_bits", "v_bits") if (b := getattr(config, side)) is not None)
    warn(
        f"HeadQ: {known.shortage()}. It is not used: each sequence's own statistics and {bits} hold, as without a "
        "calibration"
    )
    return dataclasses.replace(config, calibration=None), None
