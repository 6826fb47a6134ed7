"""What quantize_ leaves on a model, for tests."""

import torch


def dense_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def trace(model):
    """Everything of a model that ``quantize_`` touches."""
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: (value.data_ptr(), value.dtype) for name, value in model.state_dict().items()},
        [name for name, _ in model.named_buffers()],
        sorted(model.__dict__),
        [list(m._forward_pre_hooks.values()) + list(m._forward_hooks.values()) for m in model.modules()],
        [(len(m._forward_pre_hooks_with_kwargs), len(m._forward_hooks_with_kwargs)) for m in model.modules()],
        model.config.to_dict(),
        model.config._attn_implementation,
    )
