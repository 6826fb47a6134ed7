"""Ways to change keys: noise in chosen directions or on chosen keys, quantizers at counted bits, null directions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headq_ao import HeadQConfig, headq_config
from headq_ao.codecs.layer_codec import key_codec
from headq_ao.codecs.linalg import top_eigenvectors
from headq_ao.evals.baselines.codecs import Affine, Codec, Frame, LloydMax, query_span
from headq_ao.evals.metrics.formulas import causal_window
from headq_ao.ops.layout import pack_keys
from headq_ao.statistics.moments import LayerMoments

N_SINK = 4  # kept exact, as in the cache
CODED_TOKENS = 128  # what is coded is padded to a multiple of this, with copies of its last key
STRENGTHS = (0.03, 0.1, 0.2, 0.4, 0.8)  # rms of the noise over that of the centred keys
HUGE = 10.0
EVERYWHERE = "all directions"
BASES = ("query_pca", "score_optimal", "key_pca", "random")
WRONG_SIGN, NO_SIDE_CODE, FEEDBACK = "wrong sign", "no side code", "error feedback"
SIDE = " + "  # stands between base code and side code in a setting
SQUAT_RANK, SQUAT_WEIGHT = 16, 10.0


@dataclass
class States:
    """One layer of one row, as exact attention reads it.

    Args:
        q: judging queries times scaling ``[Hkv, G, S, D]``.
        k: keys ``[Hkv, T, D]``.
        visible: ``[S, T]``.
        prompt: queries of the first quarter ``[1, Hq, T/4, D]``.
        moments: calibration.
        generator: of noise.
    """

    q: Tensor
    k: Tensor
    visible: Tensor
    prompt: Tensor
    moments: LayerMoments
    generator: torch.Generator

    def __post_init__(self) -> None:
        self.s = (self.q @ self.k[:, None].transpose(-1, -2)).masked_fill(~self.visible, -torch.inf)
        self.a, self.top1 = self.s.softmax(-1), self.s.argmax(-1)
        keys = self.k[:, N_SINK:]
        self.rms = (keys - keys.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()  # [Hkv]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, scaling: float, n: int, window: int | None, moments: LayerMoments,
        generator: torch.Generator,
    ) -> "States":  # fmt: skip
        """From recorded ``q [1, Hq, T, D]``, ``k [1, Hkv, T, D]``: at most ``n`` queries of the last three quarters."""
        q, k, tokens = q.float(), k[0].float(), k.shape[2]
        at = torch.linspace(tokens // 4, tokens - 1, n, dtype=torch.float64).long().unique().to(q.device)
        visible = causal_window(tokens, tokens, window, q.device)[at]
        judging = q[0, :, at].unflatten(0, (k.shape[0], -1)) * scaling
        return cls(judging, k, visible, q[:, :, : tokens // 4], moments, generator)

    def last(self, n: int) -> "States":
        """Judged by the last ``n`` queries alone."""
        return States(self.q[:, :, -n:], self.k, self.visible[-n:], self.prompt, self.moments, self.generator)


@dataclass(frozen=True)
class Perturbation:
    """A way to change keys.

    Args:
        name: which directions, basis or method.
        family: perturbations that are shown alike.
        error: gives ``k_hat − k [Hkv, T, D]``, and the bits per key element of a quantizer or None.
        setting: of a quantizer.
        strength: of noise, its rms over that of the centred keys; None for quantizers.
        control: a quantizer that is not meant to be good.
        few_queries: judged by that many queries only.
    """

    name: str
    family: str
    error: Callable[[States], tuple[Tensor, float | None]]
    setting: str | None = None
    strength: float | None = None
    control: bool = False
    few_queries: int | None = None


Finder = Callable[[States], Tensor | None]


def nothing(s: States) -> None:
    """No restriction."""
    return None


def perturbations(head_dim: int, groups: int, seed: int) -> list[Perturbation]:
    """All of them, for heads of ``head_dim`` with ``groups`` query heads to a KV head; ``seed`` of the random basis."""
    return [*_noises(head_dim), *_others(head_dim), *_headq(head_dim, seed), *_nulls(head_dim, groups)]


def _noises(head_dim: int) -> Iterator[Perturbation]:
    part, few = head_dim // 4, head_dim // 16

    def queries(rank: int) -> Finder:
        return lambda s: top_eigenvectors(s.moments.c_q.to(s.k), rank)

    def last_queries(rank: int) -> Finder:
        return lambda s: top_eigenvectors(s.moments.c_q.to(s.k), head_dim)[..., -rank:]

    directions: list[tuple[str, str, Finder]] = [
        (EVERYWHERE, "noise, any direction", nothing),
        (f"random {part} directions", "noise, any direction", lambda s: random_directions(s, part)),
        (f"top {few} query directions", "noise, query directions", queries(few)),
        (f"top {part} query directions", "noise, query directions", queries(part)),
        (f"last {part} query directions", "noise, query directions", last_queries(part)),
        (f"top {few} key directions", "noise, key directions", lambda s: key_directions(s, few)),
        (f"top {part} key directions", "noise, key directions", lambda s: key_directions(s, part)),
    ]
    keys: list[tuple[str, Finder]] = [
        ("most attended tenth of keys", lambda s: by_attention(s, 0.1, most=True)),
        ("least attended half of keys", lambda s: by_attention(s, 0.5, most=False)),
    ]
    for x in STRENGTHS:
        for name, family, basis in directions:
            yield Perturbation(name, family, _noisy(x, basis=basis), strength=x)
        for name, which in keys:
            yield Perturbation(name, "noise, chosen keys", _noisy(x, keys=which), strength=x)


def _noisy(strength: float, basis: Finder = nothing, keys: Finder = nothing) -> Callable[[States], tuple[Tensor, None]]:
    return lambda s: (noise(s, strength, basis(s), keys(s)), None)


def _others(head_dim: int) -> Iterator[Perturbation]:
    def method(name: str, setting: str, codec: Codec, frame: Callable[[States], Frame]) -> Perturbation:
        def code(s: States, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            packed = codec.encode(x, frame(s))
            return codec.decode(packed, frame(s)), packed

        return Perturbation(name, "other quantizers", lambda s: coded(s, code), setting)

    def mean(s: States) -> Frame:
        return Frame(s.moments.k_mean[None].to(s.k))

    def span(s: States) -> Frame:
        return Frame(span=query_span(s.prompt, s.k.shape[0], min(SQUAT_RANK, head_dim // 2)), span_weight=SQUAT_WEIGHT)

    for bits in (2, 3, 4):
        yield method("per token", f"{bits} bits", Affine(bits, head_dim), lambda s: Frame())
        for group in (32, 64, 128):
            codec = Affine(bits, group, per_channel=True)
            yield method("per channel", f"{bits} bits, G={group}", codec, lambda s: Frame())
        yield method("Lloyd-Max", f"{bits} bits", LloydMax(bits, subtract_mean=True), mean)
    for group in (32, 64):
        yield method("SQuat-like", f"2 bits, G={group}", Affine(2, group, per_channel=True), span)


def _headq(head_dim: int, seed: int) -> Iterator[Perturbation]:
    def code(name: str, setting: str, config: HeadQConfig, control: bool = False) -> Perturbation:
        return Perturbation(name, "HeadQ", lambda s: headq_error(s, config), setting, control=control)

    affine: dict[str, Any] = {"key_codec": "affine"}
    for bits in (2, 3, 4):
        yield code(NO_SIDE_CODE, f"{bits} bits", headq_config(k_bits=bits, rank=0, **affine))
        yield code(
            NO_SIDE_CODE, f"{bits} bits, min-max", headq_config(k_bits=bits, rank=0, k_zero_point=True, **affine)
        )
        yield code(FEEDBACK, f"{bits} bits", headq_config(k_bits=bits))
        yield code("whitened", f"{bits} bits", headq_config(k_bits=bits, error_feedback=False), control=True)
    rank = head_dim // 4
    few: dict[str, Any] = affine | {"rank": rank // 2, "side_bits": 4}
    settings: dict[str, dict[str, Any]] = {
        f"2 bits{SIDE}R={rank} at 2 bits": affine | {"rank": rank, "side_bits": 2},
        f"2 bits{SIDE}R={rank // 2} at 4 bits": few,
        f"2 bits, min-max{SIDE}R={rank // 2} at 4 bits": few | {"k_zero_point": True},
    }
    for setting, options in settings.items():
        for basis in BASES:
            yield code(basis, setting, headq_config(basis=basis, seed=seed, **options), control=basis == "random")
        yield code(WRONG_SIGN, setting, headq_config(sign=-1, **options), control=True)


def _nulls(head_dim: int, groups: int) -> Iterator[Perturbation]:
    def constant(s: States) -> tuple[Tensor, None]:
        vector = torch.randn(s.k.shape[0], 1, head_dim, generator=s.generator).to(s.k)
        vector = vector / vector.square().mean((1, 2), keepdim=True).sqrt()
        return (vector * HUGE * s.rms[:, None, None]).expand_as(s.k), None

    yield Perturbation("one vector added to all keys", "null", constant, strength=HUGE)
    few = max(head_dim // (2 * groups), 1)
    if few * groups < head_dim:
        yield Perturbation(
            f"directions that {few} queries do not see", "null",
            lambda s: (noise(s, HUGE, basis=orthogonal_to_queries(s)), None), strength=HUGE, few_queries=few,
        )  # fmt: skip


def noise(s: States, strength: float, basis: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """Gaussian noise behind the sinks ``[Hkv, T, D]``, its rms over those keys and coordinates ``strength · rms``.

    Args:
        strength: relative to the centred keys; exact, whatever the subspace: equal strengths have equal MSE.
        basis: ``[Hkv, D, R]``, orthonormal; None: all directions.
        keys: ``[Hkv, T]``, 1 for keys that get noise; None: all.
    """
    rank = s.k.shape[-1] if basis is None else basis.shape[-1]
    x = torch.randn(*s.k.shape[:2], rank, generator=s.generator).to(s.k)
    x = x if basis is None else x @ basis.transpose(-1, -2)
    x = x if keys is None else x * keys[..., None]
    x[:, :N_SINK] = 0
    return x * (strength * s.rms / x[:, N_SINK:].square().mean((1, 2)).sqrt())[:, None, None]


def key_directions(s: States, rank: int) -> Tensor:
    """Leading eigenvectors of the covariance of the calibration's keys, ``[Hkv, D, R]``."""
    m = s.moments
    return top_eigenvectors((m.k_outer / m.tokens - m.k_mean[..., None] * m.k_mean[..., None, :]).to(s.k), rank)


def random_directions(s: States, rank: int) -> Tensor:
    """A random orthonormal basis ``[Hkv, D, R]``."""
    normal = torch.randn(s.k.shape[0], s.k.shape[-1], rank, generator=s.generator)
    basis: Tensor = torch.linalg.qr(normal).Q
    return basis.to(s.k)


def by_attention(s: States, share: float, most: bool) -> Tensor:
    """1 for that share of the keys behind the sinks which the judging queries attend most (or least), ``[Hkv, T]``."""
    weight = s.a.sum((1, 2))[:, N_SINK:]
    which = weight.argsort(dim=-1, descending=most, stable=True)[:, : max(int(share * weight.shape[1]), 1)]
    return s.k.new_zeros(s.k.shape[:2]).scatter(-1, which + N_SINK, 1.0)


def orthogonal_to_queries(s: States) -> Tensor:
    """An orthonormal basis of the directions that no judging query sees, ``[Hkv, D, D − G·S]``."""
    asked = s.q.flatten(1, 2).double()  # [Hkv, G·S, D]
    basis: Tensor = torch.linalg.qr(asked.transpose(-1, -2), mode="complete").Q
    return basis[..., asked.shape[1] :].to(s.k)


def headq_error(s: States, config: HeadQConfig) -> tuple[Tensor, float]:
    """Of HeadQ's own key codec, with the statistics of the calibration."""
    codec = key_codec(config, s.moments)
    codec = codec.replace({name: x.to(s.k) for name, x in codec.tensors().items()})

    def code(s: States, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        codes, scale, zero = codec.quantize(x, config.unbiased_scale)
        stored = [*pack_keys(codes, codec.bits), *(t for t in (scale, zero) if t is not None)]
        return codec.dequantize(codes, scale, zero, config.sign), stored

    return coded(s, code)


def coded(s: States, code: Callable[[States, Tensor], tuple[Tensor, Sequence[Tensor]]]) -> tuple[Tensor, float]:
    """The error of a quantizer on all keys but the sinks, and its stored bits per element.

    Args:
        code: gives ``x_hat`` and the stored tensors of ``x [1, Hkv, n, D]``.
    """
    n = s.k.shape[1] - N_SINK
    x = s.k[None, :, N_SINK:]
    x = torch.cat([x, x[:, :, -1:].expand(-1, -1, -n % CODED_TOKENS, -1)], 2)
    x_hat, stored = code(s, x)
    error = torch.zeros_like(s.k)
    error[:, N_SINK:] = (x_hat - x)[0, :, :n]
    return error, 8 * sum(t.nbytes for t in stored) / x.numel()
