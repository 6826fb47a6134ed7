"""How tokens are written: what the quantizer needs to know of one side of one head group."""

import functools
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from headq_ao.ops.error_feedback.reference import ldl_factor
from headq_ao.ops.layout import PIECES
from headq_ao.ops.types import SegmentFrame

TENSORS = ("encode", "mean", "unit", "step", "hessian", "ldl", "read", "side_encode", "side_step")
FRAME = ("table", "partner")  # of :class:`SegmentFrame`


@dataclass(frozen=True, eq=False)
class Encoder:
    """How keys, or values, of one head group are quantized: ``y = (x / unit − mean) @ encode``, then one of

    - affine (``step`` None): ``ŷ = zero + σ·c`` between the least and the largest ``y`` of a scale's coordinates;
    - symmetric: ``ŷ_i = σ · step_i · (c_i − c0)``, ``c0 = (2^b − 1)/2``, ``σ`` the RMS of ``y``, each code the nearest.
      With a number for ``step``, ``σ · step`` is what is stored;
    - symmetric with error feedback (``hessian``): codes and ``σ`` of :func:`headq_ao.ops.feedback_codes`;

    and with ``side_encode`` a code of the error that is left, ``z = round(e @ side_encode / (σ · side_step))``,
    ``e = (x / unit − mean) − ŷ @ readᵀ`` (HeadQ, arXiv 2605.03562, withdrawn by its author).

    Its tensors are not to be written to, for kernels keep what they made of them.

    Attributes:
        encode: ``[B or 1, h or 1, D, M0]``.
        bits: of the M0 coordinates, then of the R side coordinates; one number for all where there is no side code.
        step: ``[B or 1, h or 1, M0]``, a number, or None.
        group_size: coordinates that share a scale; 0: all.
        mean, unit: ``[B or 1, h or 1, D]`` and ``[.., 1]``, or None.
        hessian: ``[B or 1, h or 1, M0, M0]``, what an error of ``y`` costs.
        ldl: :func:`headq_ao.ops.ldl_factor` of ``hessian``, where the caller has it.
        read, side_encode, side_step: ``[.., D, M0]``, ``[.., D, R]``, ``[.., R]``: with a side code.
        unbiased: store the scale that makes ``⟨y, ŷ⟩ = ‖y‖²`` (``yᵀ H ŷ = yᵀ H y``); symmetric codes only.
        scale_bits: that the scale is rounded to, 16, or with error feedback 8 (:mod:`headq_ao.ops.rounding`).
        frame: that the tokens are taken into before all this, by ``cache_update``, which knows where they stand; None:
            they stay as they are.
    """

    encode: Tensor
    bits: tuple[int, ...]
    step: Tensor | float | None
    group_size: int = 0
    mean: Tensor | None = None
    unit: Tensor | None = None
    hessian: Tensor | None = None
    ldl: Tensor | None = None
    read: Tensor | None = None
    side_encode: Tensor | None = None
    side_step: Tensor | None = None
    unbiased: bool = True
    scale_bits: int = 16
    frame: SegmentFrame | None = None

    def __post_init__(self) -> None:
        d, m = self.encode.shape[-2:]
        r = 0 if self.side_encode is None else self.side_encode.shape[-1]
        if len(self.bits) not in ({m + r} if r else {1, m}):
            raise ValueError(f"bits must list {m} base and {r} side coordinates, got {len(self.bits)}")
        if not PIECES.keys() >= set(self.bits):
            raise ValueError(f"bits must be of {sorted(PIECES)}, got {sorted(set(self.bits) - PIECES.keys())}")
        widths = sorted(set(self.bits[:m]))
        if len(widths) > 1 and (self.step is None or self.hessian is not None):
            raise ValueError(f"the affine base and error feedback need one bit width for all coordinates, got {widths}")
        if self.hessian is not None and (self.step is None or self.groups(m) != 1):
            raise ValueError("error feedback (hessian) needs a symmetric code (step) and one scale per token")
        if self.scale_bits != 16 and (
            self.scale_bits != 8 or self.hessian is None or not isinstance(self.step, Tensor)
        ):
            raise ValueError(
                "scale_bits must be 16, or 8 with error feedback (hessian) and a tensor of steps, got "
                f"{self.scale_bits}"
            )
        if self.group_size and m % self.group_size:
            raise ValueError(f"group_size must divide the {m} coordinates, got {self.group_size}")
        if len({x is None for x in (self.side_encode, self.side_step)}) != 1 or (r and self.read is None):
            raise ValueError("side_encode, side_step and read must be given together")
        if r and self.groups(m) != 1:
            raise ValueError("a side code needs one scale per token")
        trailing = {
            "mean": (d,), "unit": (1,), "step": (m,), "hessian": (m, m), "ldl": (m, m), "read": (d, m),
            "side_encode": (d, r), "side_step": (r,),
        }  # fmt: skip
        for name, shape in trailing.items():
            x = getattr(self, name)
            if isinstance(x, Tensor) and x.shape[-len(shape) :] != shape:
                raise ValueError(f"{name} must end in {shape} for tokens of {d}, got {tuple(x.shape)}")
        for name in TENSORS:  # as kernels read them
            if isinstance(x := getattr(self, name), Tensor):
                object.__setattr__(self, name, x.contiguous())

    def groups(self, coordinates: int) -> int:
        """Scales of a token."""
        return coordinates // self.group_size if self.group_size else 1

    @property
    def coordinates(self) -> int:
        """Stored coordinates of a token, M0 + R."""
        return self.encode.shape[-1] + (0 if self.side_encode is None else self.side_encode.shape[-1])

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, without those of the frame."""
        return [x for name in TENSORS if isinstance(x := getattr(self, name), Tensor)]

    @functools.cached_property
    def factor(self) -> Tensor | None:
        """``ldl``, made once where it was not given."""
        return self.ldl if self.ldl is not None or self.hessian is None else ldl_factor(self.hessian)

    @functools.cached_property
    def flat(self) -> tuple[list[Tensor], str]:
        """Its tensors, and a text with the rest: how it passes through an operator's schema."""
        held = {name: x for name in TENSORS if isinstance(x := getattr(self, name), Tensor)}
        if self.factor is not None:
            held["ldl"] = self.factor
        step = "" if self.step is None or isinstance(self.step, Tensor) else repr(float(self.step))
        bits = "+".join(map(str, self.bits))
        tokens = 0
        if self.frame is not None:
            held["table"], held["partner"], tokens = self.frame.table, self.frame.partner, self.frame.tokens
        names = [name for name in (*TENSORS, *FRAME) if name in held]
        text = f"{'+'.join(names)},{bits},{step},{self.group_size},{int(self.unbiased)},{self.scale_bits},{tokens}"
        return [held[name] for name in names], text

    @classmethod
    def of_flat(cls, tensors: list[Tensor], text: str) -> "Encoder":
        """:attr:`flat`, undone."""
        names, bits, step, group_size, unbiased, scale_bits, frame_tokens = text.split(",")
        given: dict[str, Any] = dict(zip(names.split("+"), tensors, strict=True))
        if int(frame_tokens):
            given["frame"] = SegmentFrame(given.pop("table"), given.pop("partner"), int(frame_tokens))
        if "step" not in given:
            given["step"] = float(step) if step else None
        widths = tuple(map(int, bits.split("+")))
        return cls(
            **given, bits=widths, group_size=int(group_size), unbiased=unbiased == "1", scale_bits=int(scale_bits)
        )


assert {f.name for f in fields(Encoder)} >= set(TENSORS)
