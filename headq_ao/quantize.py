"""``quantize_`` and ``restore_``: put HeadQ on a model, and take it off."""

from collections.abc import Callable
from typing import Any

import torch
import torchao
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from headq_ao.config import HeadQConfig
from headq_ao.integrations.transformers import calls, hf_quantizer, hooks, loading

calls.register()
loading.register()
register_quantize_module_handler(HeadQConfig)(hooks.attach)
_DEFAULT: Any = object()


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Callable[[nn.Module, str], bool] | None = _DEFAULT,
    device: torch.device | str | None = None,
) -> None:
    """Quantize in place: the KV cache with a :class:`HeadQConfig`, anything else as torchao does.

    With a HeadQ config the weights stay as they are; every later call that uses a cache keeps it packed. Any other
    torchao config is handed to ``torchao.quantize_`` with the same arguments. A calibration of too few
    tokens is not used, with a warning that says how many it takes; the config object is left as it is.

    Nothing but the model is changed: other models may hold its config object, so ``model.config`` becomes a copy, the
    model's own in all its modules, until :func:`restore_`.

    Whether HeadQ can serve the model's attention is tried with two tokens on a copy that shares its weights
    (:mod:`headq_ao.integrations.transformers.probe`), before anything is changed.

    Args:
        model: a transformers causal LM (for a HeadQ config).
        config: from :func:`headq_ao.headq_config`, or any torchao config.
        filter_fn: torchao's filter; for a HeadQ config leave it out.
        device: as in torchao: move there first.

    Raises:
        ValueError: when the model or the calibration does not fit; the model is then unchanged
            (but for a move to ``device``, which torchao makes first).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import headq_config, quantize_
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> quantize_(model, headq_config())
        >>> model.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=4, max_new_tokens=4, pad_token_id=0).shape
        torch.Size([1, 7])
    """
    if config is None or isinstance(config, (str, type, nn.Module)):
        raise ValueError(
            f"quantize_(model, config) takes a config such as headq_config() or torchao's, got {config!r:.80} as config"
        )
    if not isinstance(config, HeadQConfig):
        arguments = {} if filter_fn is _DEFAULT else {"filter_fn": filter_fn}
        torchao.quantization.quantize_(model, config, device=device, **arguments)
        hf_quantizer.note_weights(model, config)
        return
    if filter_fn is not _DEFAULT and filter_fn is not None:
        raise ValueError("a HeadQ config applies to the whole model; call quantize_(model, config) without filter_fn")
    torchao.quantization.quantize_(model, config, filter_fn=lambda _, name: name == "", device=device)


def restore_(model: nn.Module) -> None:
    """Take HeadQ off a model; its outputs are again bit for bit what they were.

    ``model.config`` is again the object that it was, or stays the model's own where it was changed since, as by another
    attention implementation that was set meanwhile.

    Raises:
        ValueError: when there is no HeadQ on the model.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import headq_config, quantize_, restore_
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... )
        >>> quantize_(model, headq_config())
        >>> restore_(model)
        >>> model.config._attn_implementation
        'sdpa'
    """
    hooks.detach(model)
