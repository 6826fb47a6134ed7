"""Triton kernels, where Triton is installed."""

import functools
import importlib
import importlib.util
from types import ModuleType


@functools.cache
def optional(name: str) -> ModuleType | None:
    """The module ``headq_ao.ops.{name}`` of Triton kernels, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"headq_ao.ops.{name}")
