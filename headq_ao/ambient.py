"""PyTorch's ambient modes, kept out of the cache: autocast, inference mode and autograd.

A cache outlives the call that fills it, so what is stored must not depend on the mode of that call: a tensor made in
inference mode cannot be written outside it, and autocast would round statistics and scores to 16 bits. Default dtype
and device are not handled here: every tensor factory in the package names both.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


_ACCELERATOR = torch.accelerator.current_accelerator()
DEVICE_TYPES = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)  # whose autocast may be on


@contextlib.contextmanager
def neutral_modes() -> Iterator[None]:
    """Autocast and inference mode off, and no gradients recorded.

    Example:
        >>> import torch
        >>> from headq_ao.ambient import neutral_modes
        >>> with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ...     with neutral_modes():
        ...         x = torch.ones(2, 2, dtype=torch.float32) @ torch.ones(2, 2, dtype=torch.float32)
        >>> x.dtype, x.is_inference()
        (torch.float32, False)
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # leaving inference mode turns gradients on
        for device_type in DEVICE_TYPES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def mode_neutral(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run the function under :func:`neutral_modes`, which costs nothing where no mode is on.

    The function must not need gradients. A traced one makes no tensor that outlives the call, so that inference mode,
    which a graph cannot ask about, does not matter to it.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return _without_autocast(function, DEVICE_TYPES, *args, **kwargs)
        if torch.is_inference_mode_enabled() or any([torch.is_autocast_enabled(d) for d in DEVICE_TYPES]):
            with neutral_modes():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def _without_autocast(function: Callable[..., T], device_types: tuple[str, ...], *args: Any, **kwargs: Any) -> T:
    for i, device_type in enumerate(device_types):
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _without_autocast(function, device_types[i + 1 :], *args, **kwargs)
    return function(*args, **kwargs)
