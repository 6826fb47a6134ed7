"""Tests write ``cache=``, as transformers does since 5.24; under older versions their own calls are given its name.

Calls from elsewhere are left as they are: the package, evaluations and recipes have to name the cache themselves.
"""

import functools
import sys
from pathlib import Path

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from headq_ao.integrations.transformers.models import CACHE_NAME

HERE = str(Path(__file__).resolve().parent)


def install():
    """Nothing where this transformers has the new name."""
    if CACHE_NAME == "cache":
        return
    PreTrainedModel.__init__ = hooked(PreTrainedModel.__init__)
    GenerationMixin.generate = renaming(GenerationMixin.generate)
    ModelOutput.cache = property(lambda output: getattr(output, CACHE_NAME))


def hooked(init):
    """A hook, not a wrapper of the call: what compiles a model leaves hooks outside its graph."""

    @functools.wraps(init)
    def call(model, *args, **kwargs):
        init(model, *args, **kwargs)
        model.register_forward_pre_hook(rename, with_kwargs=True)

    return call


@torch.compiler.disable  # as the cache's own hook: outside the graphs of a compiled model, inside those of a function
def rename(model, args, kwargs):
    return args, renamed(kwargs)


@torch.compiler.substitute_in_graph(rename)
def rename_in_graph(model, args, kwargs):
    return args, renamed(kwargs)


def renaming(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **renamed(kwargs))

    return call


def renamed(kwargs):
    """``cache`` by its old name where the innermost caller that is neither torch's nor of this file is a test."""
    if "cache" not in kwargs:
        return kwargs
    if not torch.compiler.is_compiling():
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        if not frame.f_code.co_filename.startswith(HERE):
            return kwargs
    return {CACHE_NAME if name == "cache" else name: value for name, value in kwargs.items()}
