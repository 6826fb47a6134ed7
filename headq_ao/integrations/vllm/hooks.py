"""Where vLLM is changed so that the backend can be chosen, and knows its layer.

Two hooks are missing in vLLM: its CPU platform does not honour ``--attention-backend``, and
:meth:`AttentionBackend.customize_spec`, which decides the bytes of a page, is not told which layer it is for. Both are
replaced here, and act only where the backend is chosen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

BACKEND = "headq_ao.integrations.vllm.backend.HeadQBackend"
SUPPORTED = "0.32"
MARK = "_headq_ao"


def install() -> None:
    """Register the backend, and replace what is missing, once in a process."""
    import vllm
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    _register_checkpoints()
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.platforms import current_platform

    if getattr(Attention, MARK, False):
        return
    if not vllm.__version__.startswith(SUPPORTED + "."):
        _refuse_version(Attention, vllm.__version__)
        return
    if current_platform.is_cpu():
        _honour_choice(type(current_platform))
    Attention.__init__ = _with_window(Attention.__init__)
    Attention.get_kv_cache_spec = _packed_spec(Attention.get_kv_cache_spec)
    setattr(Attention, MARK, True)


def _register_checkpoints() -> None:
    """Let vLLM load what ``save_pretrained`` wrote of a model with HeadQ."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from headq_ao.integrations.transformers.hf_quantizer import METHOD
    from headq_ao.integrations.vllm.checkpoint import HeadQCheckpoint

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(HeadQCheckpoint)


def _chosen(attention: Any) -> bool:
    from headq_ao.integrations.vllm.backend import HeadQBackend

    return bool(attention.attn_backend is HeadQBackend)


def _refuse_version(attention_class: Any, version: str) -> None:
    """Let another vLLM run as it is, unless the backend is asked for."""
    made = attention_class.__init__

    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if _chosen(self):
            raise ValueError(f"headq_ao serves with vLLM {SUPPORTED}, got {version}; install vllm=={SUPPORTED}.*")

    attention_class.__init__ = refusing
    setattr(attention_class, MARK, True)


def _honour_choice(platform: Any) -> None:
    """On a CPU, take the backend where it is chosen; all others as before."""
    before = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        if selected_backend is None or selected_backend.name != "CUSTOM":
            found: str = before(cls, selected_backend, attn_selector_config, num_heads)
            return found
        from headq_ao.integrations.vllm.attention import refuse
        from headq_ao.integrations.vllm.backend import HeadQBackend

        c = attn_selector_config
        wrong = HeadQBackend.validate_configuration(
            c.head_size, c.dtype, c.kv_cache_dtype, c.block_size, c.use_mla, c.has_sink, c.use_sparse, c.use_mm_prefix,
            c.use_per_head_quant_scales, None, c.attn_type, False, c.use_non_causal, c.use_batch_invariant,
            c.use_kv_connector, c.use_pcp, c.use_adaptive_verification, c.use_dcp, c.use_rswa,
        )  # fmt: skip
        refuse({reason.removesuffix(" not supported"): True for reason in wrong})
        return BACKEND

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _with_window(made: Callable[..., None]) -> Callable[..., None]:
    """``Attention.__init__``, which also puts a layer for the newest tokens beside, and gives the layer its codec."""

    def with_window(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if not _chosen(self):
            return
        from vllm.config import get_current_vllm_config
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        from headq_ao.integrations.vllm.backend import PAGE_TOKENS
        from headq_ao.integrations.vllm.metadata import window_name
        from headq_ao.integrations.vllm.settings import layer_number, settings
        from headq_ao.integrations.vllm.window import WindowLayer

        config = get_current_vllm_config()
        ours, impl = settings(config), self.impl
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        layer = layer_number(self.layer_name)
        impl.codec, impl.n_sink = ours.codec(layer, rank, size), ours.config.n_sink
        impl.page_bytes = functools.partial(ours.page_bytes, impl.codec, layer, rank, size)
        if impl.codec.kv_heads != self.num_kv_heads or self.head_size != self.head_size_v:
            raise ValueError(
                f"HeadQ's calibration is of {impl.codec.kv_heads} KV heads in {self.layer_name}, which has "
                f"{self.num_kv_heads}"
            )
        if not config.cache_config.user_specified_block_size:  # the CPU platform asks no backend
            config.cache_config.block_size = PAGE_TOKENS
        newest = WindowLayer(self, ours.config.residual_length)
        config.compilation_config.static_forward_context[window_name(self.layer_name)] = newest

    return with_window


def _packed_spec(before: Callable[..., Any]) -> Callable[..., Any]:
    """``Attention.get_kv_cache_spec`` with the bytes of packed pages."""

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = before(self, vllm_config)
        if spec is None or not _chosen(self):
            return spec
        impl, tokens = self.impl, vllm_config.cache_config.block_size
        frame = impl.codec.frame
        if frame is not None and frame.tokens % tokens:
            raise ValueError(
                f"--block-size must divide the {frame.tokens} tokens of a segment of HeadQ's keys, got {tokens}; leave "
                "it out"
            )
        size = impl.page_bytes(tokens, self.kv_cache_torch_dtype)
        return dataclasses.replace(
            spec, block_size=tokens, num_head_slots=1, dtype=torch.uint8, state_content_bytes=-(-size // tokens)
        )

    return get_kv_cache_spec
