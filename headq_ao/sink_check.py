"""A prompt's first tokens, computed again and held against the sinks of a cache.

What no parameter tells shows here: hooks, switches that are plain attributes, another version of the model's code.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headq_ao.calibrate import RECORDER

if TYPE_CHECKING:
    from headq_ao.cache import HeadQCache

ROUNDING = 1e-2  # relative error that is no other model, at least; of 16-bit floats the root of their epsilon


def sink_error(cache: "HeadQCache", model: nn.Module) -> float | None:
    """The relative error of keys and values of a cache's sinks as the model computes them now: the largest of a layer.

    Only sequences count that start unpadded with known ids. None where there is none, or where weights are offloaded or
    sharded over processes.
    """
    if any(p.device.type == "meta" or isinstance(p, DTensor) for p in model.parameters()):
        return None
    begins = first_ids(cache)
    if not begins:
        return None
    ids = cache.ids.held
    assert ids is not None
    again = type(cache)(model)
    with undisturbed(model):
        model(torch.tensor([*begins], device=ids.device), cache=again)
    rows, errors = list(begins.values()), []
    for stored, new in zip(cache.layers, again.layers, strict=True):
        for name in ("k", "v"):
            a, b = getattr(stored.exact, name), getattr(new.exact, name)
            n = min(len(next(iter(begins))), a.shape[2])
            errors.append(relative_error(a[rows, :, :n], b[:, :, :n]))
    return float(torch.stack([e.cpu() for e in errors]).nan_to_num(math.inf).max())


def first_ids(cache: "HeadQCache") -> dict[tuple[int, ...], int]:
    """What sequences of a cache begin with, as many ids as there are sinks, and one sequence for each beginning."""
    seen, rows = cache.layers[0].seen, cache.layers[0].rows
    n = min([cache.config.n_sink, seen, *(row.exact for row in rows)])
    ids = cache.ids.of_slots(seen)
    begins = [] if ids is None or n == 0 else ids[:, :n].tolist()
    return {tuple(x): b for b, x in reversed([*enumerate(begins)]) if min(x) >= 0}


def relative_error(stored: Tensor, new: Tensor) -> Tensor:
    """Norm of the difference by the norm of what is stored."""
    stored, new = stored.double(), new.to(stored.device).double()
    return (new - stored).norm() / stored.norm().clamp(min=1e-30)


def tolerance(cache: "HeadQCache") -> float:
    """The largest relative error that rounding may give in other calls, on other machines."""
    return max(ROUNDING, torch.finfo(cache.layers[0].dtype).eps ** 0.5)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Call a model in between: in eval mode, eagerly, without gradients or recorders, and all attributes as before.

    Hooks that others have put on it run: they may be what changes keys.
    """
    kept = [(space, dict(space)) for m in model.modules() for space in (vars(m), m._buffers)]
    recorder = RECORDER.set(None)
    try:
        if any(m.training for m in model.modules()):
            model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        RECORDER.reset(recorder)
        for space, before in kept:
            for name in space.keys() - before.keys():
                del space[name]
            space.update({name: x for name, x in before.items() if name not in space or space[name] is not x})
