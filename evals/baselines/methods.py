"""The quantizers that HeadQ is compared with, by name: :data:`METHODS`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headq_ao import Calibration
from headq_ao.evals.baselines.codecs import Affine, Codec, Frame, LloydMax, LowRank


@dataclass(frozen=True)
class Method:
    """How keys and values are coded; None keeps that side exact.

    Args:
        keys, values: the codecs.
        query_rank, query_weight: key errors are kept out of that many directions of the prompt's queries; 0: they
            are not.
        calibration: gives the means that codecs with a gauge take off.
    """

    keys: Codec | None
    values: Codec | None
    query_rank: int = 0
    query_weight: float = 0.0
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.keys is None and self.values is None:
            raise ValueError("k_bits and v_bits are both None: nothing would be packed; give at least one of them")

    @property
    def unit(self) -> int:
        """Tokens that a block must hold a multiple of."""
        return max([codec.unit for codec in (self.keys, self.values) if codec is not None], default=1)

    def frames(self, layer: int) -> tuple[Frame, Frame]:
        """What the codecs of keys and of values know of a layer."""
        if self.calibration is None:
            return Frame(), Frame()
        moments = self.calibration.layers[layer]
        return Frame(moments.k_mean[None]), Frame(moments.v_sum[None] / max(moments.tokens, 1))

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError where a group of coordinates does not divide ``head_dim``."""
        for codec in (self.keys, self.values):
            affine = codec.base if isinstance(codec, LowRank) else codec
            if isinstance(affine, Affine) and not affine.per_channel and head_dim % affine.group:
                raise ValueError(f"a group of coordinates must divide head_dim {head_dim}, got {affine.group}")


def kivi(*, k_bits: int | None, v_bits: int | None, k_group: int = 32, v_group: int = 32) -> Method:
    """Keys per channel over ``k_group`` tokens, values per token over ``v_group`` coordinates (KIVI, 2402.02750)."""
    return Method(
        None if k_bits is None else Affine(k_bits, k_group, per_channel=True),
        None if v_bits is None else Affine(v_bits, v_group),
    )


def per_token(*, k_bits: int | None, v_bits: int | None, group: int = 64) -> Method:
    """Keys and values per token over ``group`` coordinates."""
    keys, values = (None if bits is None else Affine(bits, group) for bits in (k_bits, v_bits))
    return Method(keys, values)


def hadamard(
    *, k_bits: int | None, v_bits: int | None, group: int = 64, gauge: bool = False, calibration: Calibration | None
) -> Method:
    """Per token in a Hadamard basis (QuaRot, 2404.00456); with ``gauge`` the calibrated mean is taken off the keys."""
    keys = None if k_bits is None else Affine(k_bits, group, rotate=True, gauge=gauge)
    values = None if v_bits is None else Affine(v_bits, group, rotate=True)
    return Method(keys, values, calibration=calibration if gauge else None)


def turboquant(
    *, k_bits: int | None, v_bits: int | None, gauge: bool = False, seed: int = 0, calibration: Calibration | None
) -> Method:
    """Norm, random rotation, Lloyd-Max levels (TurboQuant, 2504.19874, without its residual sketch)."""
    keys = None if k_bits is None else LloydMax(k_bits, seed, gauge)
    values = None if v_bits is None else LloydMax(v_bits, seed)
    return Method(keys, values, calibration=calibration if gauge else None)


def squat(
    *,
    k_bits: int | None,
    v_bits: int | None,
    k_group: int = 32,
    v_group: int = 32,
    rank: int = 16,
    weight: float = 10.0,
) -> Method:
    """KIVI whose key errors are kept out of the prompt's own query subspace while coding (SQuat, 2503.24358)."""
    base = kivi(k_bits=k_bits, v_bits=v_bits, k_group=k_group, v_group=v_group)
    return Method(base.keys, base.values, query_rank=rank, query_weight=weight)


def gear(
    *, k_bits: int | None, v_bits: int | None, k_group: int = 64, v_group: int = 64, rank: int = 2, block: int = 128
) -> Method:
    """KIVI and a low-rank fp16 factorization of each block's residual (GEAR, 2403.05527, without its outliers)."""
    base = kivi(k_bits=k_bits, v_bits=v_bits, k_group=k_group, v_group=v_group)
    keys, values = (None if c is None else LowRank(c, rank, block) for c in (base.keys, base.values))  # type: ignore[arg-type]
    return Method(keys, values)


METHODS: dict[str, Callable[..., Method]] = {
    f.__name__: f for f in (kivi, per_token, hadamard, turboquant, squat, gear)
}


def build(name: str, options: dict[str, Any], calibration: Calibration | None = None) -> Method:
    """The method of that name with those options; a calibration goes to the methods that can use one.

    Raises:
        ValueError: on an unknown name or option, listing what there is.

    Example:
        >>> from headq_ao.evals.baselines.methods import build
        >>> build("kivi", {"k_bits": 2, "v_bits": None}).keys
        Affine(bits=2, group=32, per_channel=True, rotate=False, gauge=False)
    """
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters
    known = [p for p in parameters if p != "calibration"]
    wrong = sorted(set(options) - set(known))
    missing = [p for p in known if parameters[p].default is inspect.Parameter.empty and p not in options]
    if wrong or missing:
        problem = f"has no option {', '.join(wrong)}" if wrong else f"needs {', '.join(missing)}"
        raise ValueError(f"{name} {problem}; its options are {', '.join(known)}")
    extra = {"calibration": calibration} if "calibration" in parameters else {}
    return METHODS[name](**options, **extra)
