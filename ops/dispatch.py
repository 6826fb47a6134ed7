"""Which kernels serve an operator on a device: the one table."""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

# Operator and device to a module of headq_ao.ops. Its ``launch`` takes the operator's arguments, checked, and gives
# None (an operator that returns nothing: False) where it does not serve them; a ``plan`` puts arguments together that
# do not change from step to step.
KERNELS: dict[str, dict[str, str]] = {
    "paged_attention": {"cpu": "paged_attention.cpu_kernel", "cuda": "paged_attention.triton_kernel"},
    "cache_update": {"cpu": "cache_update.cpu_kernel", "cuda": "cache_update.triton_kernel"},
    "feedback_codes": {"cpu": "error_feedback.cpu_kernel", "cuda": "error_feedback.triton_kernel"},
}
WIDEST = {"cuda": 256}  # coordinates of a head; wider ones go to matrix products in PyTorch
DEVICES = frozenset(device for served in KERNELS.values() for device in served)


def kernels(operator: str, device: str) -> ModuleType | None:
    """The module of kernels; None where there is none, or what it needs is not installed: the reference serves."""
    name = KERNELS.get(operator, {}).get(device)
    return None if name is None else _module(name)


@functools.cache
def _module(name: str) -> ModuleType | None:
    if name.endswith("triton_kernel") and importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"headq_ao.ops.{name}")


def direct(x: Tensor) -> bool:
    """Whether to skip the dispatcher, which takes longer than the work on a few tokens: a plain tensor that no one
    traces or differentiates, on a device that the operators have kernels for."""
    plain = type(x) is Tensor and x.device.type in DEVICES and not torch.compiler.is_compiling()
    return plain and not (x.requires_grad and torch.is_grad_enabled())
