"""Triton kernels, where Triton is installed."""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def numbers_on(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers, nested in tuples, on a GPU, not to be written to: layers and steps ask for the same ones.

    They are kept for each stream, for the copy is not waited for.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _numbers_on(values, dtype, device, stream)


@functools.lru_cache(maxsize=128)
def _numbers_on(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=device.type == "cuda")


@functools.cache
def optional(name: str) -> ModuleType | None:
    """The module ``headq_ao.ops.{name}`` of Triton kernels, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"headq_ao.ops.{name}")
