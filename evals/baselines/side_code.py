"""HeadQ's side code on the keys of any other quantizer, with the controls that tell where its gain comes from."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from headq_ao import headq_config
from headq_ao.codecs import registry
from headq_ao.codecs.registry import LayerContext, TokenSource, register
from headq_ao.codecs.side_code import fit_steps, side_basis
from headq_ao.codecs.tokenwise import Form, Held, TokenCodec
from headq_ao.evals.baselines.codecs import pack_bits, unpack_bits

BASES = ("query_pca", "random", "matched")
FITTED_ON = 128  # a sequence's first tokens behind its sinks, that its steps are fitted on
UNITS = ("key.scale", "key.norm")  # forms of a base that tell how large the errors of a token are


class SideCode(TokenCodec):
    """A base and, beside its keys, a code of its error in R directions U of the queries (2605.03562, withdrawn by its
    author):

    ``s_j = q·k̂_j + sign · (q U)·ẑ_j``, ``z_j = Uᵀ(k_j − k̂_j)``, ``ẑ_j = σ_j step (c_j − c0)``: ``R · side_bits / D``
    bits an element more. σ comes from the scales that the base stores, and takes no bits. Steps ``[R]`` are fitted on
    the first tokens of each sequence, and charged to it.

    Args:
        base: a codec of single tokens, or of groups; its values stay as they are.
        directions: U ``[1, Hkv, D, R]``, orthonormal.
        side_bits: of a coordinate of the error.
        sign: −1: subtract what the side code says, a control.
        matched: a control: keys are stored in half precision, with the base's own error scaled, token by token, to
            the energy that the side code would have left.

    Raises:
        ValueError: where the base keeps something of a sequence, or the side code does not fill whole bytes.
    """

    def __init__(self, base: TokenCodec, directions: Tensor, side_bits: int, sign: int, matched: bool) -> None:
        if base.warmup or base.prompt or base.drops or base.accumulates:
            raise ValueError(f"a side code needs a base that keeps nothing of a sequence, and {base.name} does")
        if directions.shape[-1] * side_bits % 8:
            raise ValueError(
                f"rank · side_bits must be a multiple of 8, so that a token's side code fills whole bytes; got "
                f"{directions.shape[-1]} · {side_bits}"
            )
        self.base, self.side_bits, self.sign, self.matched = base, side_bits, sign, matched
        self.granularity = base.granularity
        self.warmup = -(-FITTED_ON // self.granularity) * self.granularity
        self.fixed = {f"base_{name}": t for name, t in base.fixed.items()} | {"directions": directions}

    def _base(self) -> TokenCodec:
        """Over the model's tensors as they are now."""
        fixed = {n.removeprefix("base_"): t for n, t in self.fixed.items() if n.startswith("base_")}
        return self.base.replaced(fixed=fixed, batch=self.batch)

    def forms(self) -> dict[str, Form]:
        """See :class:`TokenCodec`."""
        found, d = self.base.forms(), self.shape.head_dim
        if self.matched:
            values = {name: form for name, form in found.items() if form.side == "value"}
            return values | {"key.matched": Form("key", (d,), torch.float16)}
        size = self.fixed["directions"].shape[-1] * self.side_bits // 8
        return found | {"key.side": Form("key", (size,), torch.uint8)}

    def statistics(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None) -> dict[str, Tensor]:
        """See :class:`TokenCodec`: the steps of n sequences, ``[n, Hkv, R]``."""
        k, v = k[:, :, self.n_sink :], v[:, :, self.n_sink :]
        position = torch.arange(self.n_sink, self.n_sink + k.shape[2], device=k.device).expand(len(k), -1)
        error, unit, _ = self._error(k, v, position)
        return {"key.step": fit_steps(error @ self.fixed["directions"] / unit, self.side_bits).half()}

    def encode(self, k: Tensor, v: Tensor, position: Tensor) -> dict[str, Tensor]:
        """See :class:`TokenCodec`."""
        error, unit, coded = self._error(k, v, position)
        step = unit * self.own["key.step"].float().unsqueeze(-2)
        most = 2**self.side_bits - 1
        codes = (error @ self.fixed["directions"] / step.clamp(min=1e-12) + most / 2).round().clamp(0, most)
        if not self.matched:
            return coded | {"key.side": pack_bits(codes, self.side_bits)}
        left = error - (codes - most / 2) * step @ self.fixed["directions"].mT
        share = (left.square().sum(-1, keepdim=True) / error.square().sum(-1, keepdim=True).clamp(min=1e-30)).sqrt()
        values = {name: t for name, t in coded.items() if self.base.forms()[name].side == "value"}
        return values | {"key.matched": k.float() - share * error}

    def _error(self, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``k − k̂ [B, Hkv, n, D]`` of the base, the unit of each token ``[B, Hkv, n, 1]``, and what the base stores."""
        base = self._base()
        coded = base.encode(k, v, position)
        stored = {name: coded[name].to(form.dtype or k.dtype) for name, form in base.forms().items()}
        held = Held(stored, position)
        return k.float() - base.decode_keys(held), self._unit(held, k.shape[2]), coded

    def _unit(self, held: Held, n: int) -> Tensor:
        """How large errors are, from what the base stores: ``[B, Hkv, n, 1]``; 1 where it stores no scale."""
        name = next((u for u in UNITS if u in held.tensors), None)
        if name is None:
            return torch.ones(1, 1, 1, 1, device=held.position.device)
        scale = held[name].float()
        unit = scale if scale.ndim == 3 else scale.square().mean(-1).sqrt()  # of groups of coordinates, or of channels
        return unit.repeat_interleave(n // unit.shape[-1], -1)[..., None]

    def decode_keys(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        if self.matched:
            return held["key.matched"].float()
        codes = unpack_bits(held["key.side"], self.side_bits).float() - (2**self.side_bits - 1) / 2
        z = codes * self._unit(held, codes.shape[2]) * self.own["key.step"].float().unsqueeze(-2)
        side: Tensor = self.sign * z @ self.fixed["directions"].mT
        return self._base().decode_keys(held) + side

    def decode_values(self, held: Held) -> Tensor:
        """See :class:`TokenCodec`."""
        return self._base().decode_values(held)


@register("side_code")
def side_code(
    layer: LayerContext, *, base: str, base_options: Mapping[str, Any] | None = None, rank: int = 16,
    side_bits: int = 2, basis: Literal["query_pca", "random", "matched"] = "query_pca", sign: int = 1, seed: int = 0,
) -> TokenCodec:  # fmt: skip
    """HeadQ's side code on the keys of ``base``, another registered codec with ``base_options``.

    ``basis="query_pca"``: the top eigenvectors of the calibration's C_q. Controls: ``"random"`` directions,
    ``sign=-1``, and ``"matched"``, the base's error scaled to the energy that is left with the first.
    """
    if basis not in BASES or sign not in (1, -1):
        raise ValueError(f"basis must be one of {', '.join(BASES)} and sign 1 or -1, got {basis!r} and {sign}")
    if not 1 <= rank <= layer.shape.head_dim:
        raise ValueError(f"rank must be 1 to the head_dim of {layer.shape.head_dim}, got {rank}")
    if layer.moments is None:
        raise ValueError("a side code's directions are those of a calibration's queries, and there is none; calibrate")
    source = registry.build(base, base_options or {}, layer)
    if not isinstance(source, TokenSource):
        raise ValueError(f"a side code's base must be a codec in plain PyTorch, and {base} is none")
    config = headq_config(key_codec="affine", basis="random" if basis == "random" else "query_pca", seed=seed)
    none = layer.moments.k_rows.new_zeros(1, layer.shape.n_kv_heads, 0, layer.shape.head_dim)
    directions, _ = side_basis(config, rank, layer.moments.c_q[None].float(), none, none)
    return SideCode(source.codec, directions.float(), side_bits, sign, basis == "matched")
