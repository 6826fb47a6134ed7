"""Multi-head latent attention (MLA): what a token leaves in the cache is one row, its latent ``c`` and its rotary key.

transformers expands all latents to keys and values at each call. Here they are read as they lie: with ``W_uk`` taken
into the query and ``W_uv`` out of the sum, the heads are the queries of one key-value head,

    s_j = scaling · [W_ukᵀ q_nope; q_rot] · [c_j; k_rot_j],    o = W_uv Σ_j a_j c_j.

Nothing of a family is written again: its module passes what the cache returns to ``expand_kv``, and what that returns
to attention, so it is enough to let rows of the cache through there.
"""

from typing import Any

import torch
from torch import Tensor, nn

from headq_ao.calibration.observers import RECORDER
from headq_ao.codecs.whitened import Readout
from headq_ao.integrations.transformers.cache_layer import HeadQCacheLayer
from headq_ao.integrations.transformers.models import execution_device
from headq_ao.layer_shape import LayerShape

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARTS = (
    "kv_b_proj", "kv_a_layernorm", "expand_kv", "scaling", "num_heads", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip


def is_latent(module: nn.Module) -> bool:
    """Whether an attention module keeps latents and expands them by ``expand_kv``; those that choose among them by an
    indexer do more."""
    plain = all(getattr(module, name, None) is not None for name in PARTS) and not hasattr(module, "indexer")
    projection = getattr(module, "kv_b_proj", None)
    return plain and isinstance(projection, nn.Linear) and projection.bias is None


def latent_shape(module: Any) -> LayerShape:
    """Of the layer, as it is packed."""
    row = module.kv_lora_rank + module.qk_rope_head_dim
    return LayerShape(module.num_heads, 1, row, None, latent=module.kv_lora_rank)


class Unexpanded:
    """In place of a module's ``expand_kv``: rows that a cache holds go to attention as they are; a recorder is shown
    what is expanded."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.row: Tensor | None = None

    def __call__(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, S, D]`` of latents ``[B, 1, S, r]`` and rotary keys, or both as they came."""
        if hasattr(kv_nope, "layer"):
            return kv_nope, k_rot
        if not torch.compiler.is_compiling() and RECORDER.get() is not None:
            self.row = torch.cat([kv_nope, k_rot], -1)
        expanded: tuple[Tensor, Tensor] = type(self.module).expand_kv(self.module, kv_nope, k_rot)
        return expanded

    def recorded(self) -> Tensor | None:
        """The row ``[B, 1, S, D]`` that was expanded last, once."""
        row, self.row = self.row, None
        return row


def recorded(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a recorder is shown of a call of attention: queries of rows, and the rows as keys and as values, where the
    module has expanded some; else the arguments."""
    through = vars(module).get("expand_kv")
    row = through.recorded() if isinstance(through, Unexpanded) else None
    return (query, key, value) if row is None else (absorbed(module, query), row, row)


def expanded(module: Any, row: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values that a module makes of its rows ``[B, 1, S, D]``."""
    latent, k_rot = row.split([module.kv_lora_rank, module.qk_rope_head_dim], -1)
    made: tuple[Tensor, Tensor] = type(module).expand_kv(module, latent, k_rot)
    return made


def projections(module: Any) -> tuple[Tensor, Tensor]:
    """``W_uk [H, nope, r]`` and ``W_uv [H, v, r]`` of a module."""
    weight, r = module.kv_b_proj.weight, module.kv_lora_rank
    plain = type(module.kv_b_proj) is nn.Linear and type(weight) is nn.Parameter
    device = execution_device(module) if weight.is_meta else weight.device
    if not plain or device != weight.device:  # quantized or offloaded: what it makes of axes
        kind = module.kv_a_layernorm.weight.dtype
        axes = torch.eye(r, dtype=kind if kind in FLOATS else torch.bfloat16, device=device)
        weight = module.kv_b_proj(axes).mT
    w_uk, w_uv = weight.view(module.num_heads, -1, r).split([module.qk_nope_head_dim, module.v_head_dim], 1)
    return w_uk, w_uv


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x [B, H, S, n]`` times each head's ``weight [H, n, m]``: ``[B, H, S, m]``."""
    b, h, s, n = x.shape
    made = torch.bmm(x.transpose(0, 1).reshape(h, b * s, n), weight.to(x.dtype))
    return made.view(h, b, s, -1).transpose(0, 1)


def absorbed(module: Any, query: Tensor) -> Tensor:
    """Queries ``[B, H, S, D]`` of rows, from a module's own ``[B, H, S, nope + rope]``."""
    nope, rot = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    return torch.cat([by_head(nope, projections(module)[0]), rot], -1)


def read_out(module: Any, out: Tensor) -> Tensor:
    """The heads' outputs ``[B, S, H, v]`` from sums of rows ``[B, S, H, D]``."""
    sums = out[..., : module.kv_lora_rank].transpose(1, 2)
    return by_head(sums, projections(module)[1].mT).transpose(1, 2).contiguous()


def readout(module: Any) -> Readout:
    """How rows reach the output as values."""
    w_uv = projections(module)[1].detach().float()
    return Readout(nn.functional.pad(w_uv, (0, module.qk_rope_head_dim)), float(module.scaling))


def slow_here(modules: list[nn.Module]) -> bool:
    """Whether rows of latents lie where no kernel reads them."""
    return any(is_latent(module) and execution_device(module).type not in ("cpu", "meta") for module in modules)


def put_on(modules: list[nn.Module]) -> None:
    """Let rows through, of those modules that are latent."""
    for module in modules:
        if is_latent(module):
            module.expand_kv = Unexpanded(module)  # type: ignore[assignment]


def take_off(modules: list[nn.Module]) -> None:
    """Undo :func:`put_on`."""
    for module in modules:
        vars(module).pop("expand_kv", None)


class LatentLayer(HeadQCacheLayer):
    """A packed layer of rows."""

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append latents ``[B, 1, S, r]`` and rotary keys ``[B, 1, S, rope]``; see :class:`PackedLayer`."""
        row = torch.cat((k, v), -1)
        return super().update(row, row)

    def rows_of_model(self) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and rotary keys ``[B, 1, T, D]`` as attention reads them, and their positions ``[T]``."""
        rows, _, position = self.in_order()
        latent = self.shape.latent
        return rows[..., :latent], rows[..., latent:], position
