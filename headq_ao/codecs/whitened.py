"""Whitened rows, rounded with error feedback: ``y = (x − mean) C^{−τ/2} R``."""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from headq_ao.codecs.affine import base_codec, rotated_value_codec
from headq_ao.codecs.base import KeyCodec, ValueCodec
from headq_ao.codecs.linalg import centred_moment, eigh, ridged
from headq_ao.config import HeadQConfig
from headq_ao.statistics.moments import LayerMoments

CALIBRATED_RIDGE = 1.0  # of the mean eigenvalue of a calibration's C_q: other prompts have other queries
FRAMED_RIDGE = 0.5  # of one in the frame of segments: measured, KL 4 % (calibrated elsewhere) to 23 % lower than with 1
VALUE_RIDGE = 0.5  # of the mean eigenvalue of a calibration's Fisher information of values
PROMPT_RIDGE = 0.1  # of the mean eigenvalue of a prompt's own C_q
SPREAD_RIDGE = 1e-4  # of the mean eigenvalue of a covariance
QUERY_RANK = 16  # directions of a prompt's own C_q that are kept


class Readout(NamedTuple):
    """How rows ``[D]`` that are keys and values reach the output: the matrices ``W_h [Hq, Dv, D]`` that the query heads
    of the one KV head read them with as values, and the ``scaling`` of the scores."""

    matrices: Tensor
    scaling: float

    @property
    def outer(self) -> Tensor:
        """``Σ_h W_hᵀ W_h``, ``[1, 1, D, D]``."""
        return torch.einsum("hvr,hvs->rs", self.matrices, self.matrices)[None, None]


def whitened_codec(
    config: HeadQConfig, c_q: Tensor, mean: Tensor, covariance: Tensor, framed: bool = False,
    readout: Tensor | None = None,
) -> KeyCodec:  # fmt: skip
    """A base with equal bits for each coordinate of ``y = (k − mean) C_k^{−τ/2} R``, rounded with error feedback.

    The whitening ``C_k^{−τ/2}`` evens out the coordinates, the Hadamard rotation ``R`` mixes them, and codes are
    chosen for a small ``(y − ŷ)ᵀ M (y − ŷ)``, ``M = Rᵀ C_k^{τ/2} C_q C_k^{τ/2} R``: the error of the scores.
    With τ = 1 and a fine code the error is that of reverse water-filling, ``det(C_q C_k)^{1/D} 2^{−2b}``, though every
    coordinate has the same bits.

    Args:
        config: what to build.
        c_q: ``C_q``, or what else an error of a key costs, ``[B or 1, Hkv, D, D]``.
        mean, covariance: of the keys, ``[B or 1, Hkv, D]`` and ``[B or 1, Hkv, D, D]``.
        framed: whether these are in the frame of segments.
        readout: what is added to ``C_q`` where the keys are values too (:func:`readout_metric`); None: nothing.
    """
    ridge = FRAMED_RIDGE if framed else CALIBRATED_RIDGE
    base = base_codec(config, mean if config.subtract_key_mean else torch.zeros_like(mean))
    encode, read = whitening(covariance, config.whitening, base.read, base.byte_scales)
    metric = ridged(c_q, ridge) if readout is None else ridged(c_q, ridge) + readout
    hessian = read.transpose(-1, -2) @ metric @ read if config.error_feedback else None
    return dataclasses.replace(base, encode=encode, read=read, hessian=hessian)


def readout_metric(outer: Tensor, scaling: float, covariance: Tensor, unit: Tensor | None = None) -> Tensor:
    """``λ Σ_h W_hᵀ W_h``: what an error of a row that is key and value costs as a value, in units of ``eᵀ C_q e``.

    Under weights ``a`` an error ``e_j`` of token ``j`` moves the output of head ``h`` as a key by
    ``a_j · scaling · (q·e_j) · W_h (x_j − o)`` and as a value by ``a_j W_h e_j``. With ``E‖W_h (x − o)‖²`` taken for
    ``tr(W_h C W_hᵀ)``, and ``C_q`` for the mean over heads, the sum of squares is that of ``C_q + λ Σ_h W_hᵀ W_h`` with
    ``λ = 1 / (scaling² tr(Σ_h W_hᵀ W_h C))``.

    Args:
        outer, scaling: of the layer's :class:`Readout`.
        covariance: of the rows, ``[B or 1, Hkv, D, D]``, or their variances, ``[B or 1, Hkv, D]``.
        unit: of a query times that of a row, which ``C_q`` and ``covariance`` are in, ``[B or 1, Hkv, 1]``; None: 1.
    """
    outer = outer.to(covariance)
    if covariance.ndim == outer.ndim:
        spread = (outer * covariance).sum((-1, -2))
    else:
        spread = (outer.diagonal(dim1=-2, dim2=-1) * covariance).sum(-1)
    squared = scaling**2 if unit is None else (scaling * unit.to(covariance)[..., None]) ** 2
    return outer / (spread.clamp(min=1e-30)[..., None, None] * squared)


def joint_metric(moments: LayerMoments, readout: Readout) -> Tensor:
    """:func:`readout_metric` beside :attr:`LayerMoments.shrunk_c_q` of moments in their units, whose weights need not
    be 1 in the mean."""
    units = [u for side in "qk" if (u := moments.unit(side)) is not None]
    moments = moments.in_units()
    mean, outer = moments.shrunk("k")
    both = math.prod(units[1:], start=units[0]) if units else None
    added = readout_metric(readout.outer, readout.scaling, centred_moment(mean, outer)[None], both)
    weighted, plain = (c.diagonal(dim1=-2, dim2=-1).sum(-1) for c in (moments.weighted_c_q, moments.c_q))
    return added * (weighted / plain.clamp(min=1e-30))[None, :, None, None]


def prompt_whitened_codec(config: HeadQConfig, c_q: Tensor, mean: Tensor, variance: Tensor) -> KeyCodec:
    """:func:`whitened_codec` in the little that a sequence can afford: variances ``[B, Hkv, D]`` instead of a
    covariance, and the leading :data:`QUERY_RANK` directions of ``C_q``."""
    base = base_codec(config, mean if config.subtract_key_mean else torch.zeros_like(mean))
    ridge = SPREAD_RIDGE * variance.mean(-1, keepdim=True)
    spread = (variance + ridge).clamp(min=1e-12).pow(config.whitening / 2)
    spread = spread / spread.log().mean(-1, keepdim=True).exp()  # around 1, as fp16 likes it
    if base.byte_scales:
        spread = spread * (variance / spread.square()).mean(-1, keepdim=True).clamp(min=1e-30).sqrt()
    q_factor = None
    if config.error_feedback:
        values, vectors = eigh(ridged(c_q, PROMPT_RIDGE))
        rank = min(QUERY_RANK, values.shape[-1] // 2)
        floor = values[..., :-rank].mean(-1, keepdim=True).clamp(min=1e-30)
        q_factor = (vectors[..., -rank:] * (values[..., -rank:] / floor - 1).clamp(min=0).sqrt()[..., None, :]).to(
            mean.dtype
        )
    return dataclasses.replace(base, spread=spread.to(mean.dtype), q_factor=q_factor)


def whitening(matrix: Tensor, power: float, rotation: Tensor, to_one: bool = False) -> tuple[Tensor, Tensor]:
    """``C^{−τ/2} R`` and ``C^{τ/2} R`` for symmetric matrices ``[.., D, D]`` and an orthogonal ``R``;
    ``to_one``: by the number that makes the RMS of ``x C^{−τ/2}`` 1, as scales in a byte want it."""
    values, vectors = eigh(ridged(matrix, SPREAD_RIDGE))
    values, r = values.clamp(min=1e-30), rotation.to(values)
    encode, read = (
        (vectors * values.pow(p / 2)[..., None, :]) @ vectors.transpose(-1, -2) @ r for p in (-power, power)
    )
    if to_one:
        by = values.pow(1 - power).mean(-1).sqrt()[..., None, None]
        encode, read = encode / by, read * by
    return encode.to(matrix.dtype), read.to(matrix.dtype)


def whitened_value_codec(
    config: HeadQConfig, mean: Tensor, outer: Tensor, metric: Tensor | None = None
) -> ValueCodec:  # fmt: skip
    """Equal bits for each coordinate of ``y = (v − mean) C_v^{−τ/2} R``, rounded with error feedback for a small
    ``(v − v̂)ᵀ M (v − v̂)``; statistics weighted by A², as attention reads values.

    Args:
        config: what to build.
        mean, outer: of the values, ``[1, Hkv, D]`` and their second moment ``[1, Hkv, D, D]``.
        metric: ``M [Hkv, D, D]``; None: the identity.
    """
    base, in_bytes = rotated_value_codec(config, mean.shape[-1]), config.byte_scales("v")
    encode, read = whitening(centred_moment(mean, outer), config.whitening, base.read, in_bytes)
    seen = read if metric is None else ridged(metric[None], VALUE_RIDGE) @ read
    hessian = read.transpose(-1, -2) @ seen if config.error_feedback else None
    return dataclasses.replace(base, encode=encode, read=read, mean=mean, hessian=hessian, byte_scales=in_bytes)
