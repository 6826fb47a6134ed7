"""A prompt's first tokens, computed again and held against the sinks of a cache.

What no parameter tells shows here: hooks, switches that are plain attributes, another version of the model's code.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headq_ao.cache.batch import Batch
from headq_ao.cache.token_ids import TokenIds
from headq_ao.calibration.observers import RECORDER
from headq_ao.config import HeadQConfig
from headq_ao.integrations.transformers.cache_layer import HeadQCacheLayer
from headq_ao.integrations.transformers.models import tensor_parallel, with_cache

ROUNDING = 1e-3  # relative error that is no other model, at least
TELLING = 0.2  # above it the tokens were computed in another way, and comparing says nothing


class StoredCache(Protocol):
    """What of a :class:`headq_ao.HeadQCache` is compared and written to a file."""

    config: HeadQConfig
    layers: list[Any]
    packed: list[HeadQCacheLayer]
    batch: Batch
    ids: TokenIds
    filled: int | None
    foreign: bool

    def __init__(self, model: Any) -> None: ...

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots seen."""
        ...


def sink_error(cache: StoredCache, model: nn.Module) -> float | None:
    """The relative error of keys and values of a cache's sinks as the model computes them now, without autocast.

    Its root mean square over layers, so that one expert of one layer that rounding chooses otherwise does not count
    much. Only sequences count that start unpadded with known ids. None where there is none, or where weights are
    offloaded or sharded over processes.
    """
    elsewhere = any(p.device.type == "meta" or isinstance(p, DTensor) for p in model.parameters())
    if elsewhere or tensor_parallel(model)[1] > 1:
        return None
    begins = first_ids(cache)
    if not begins:
        return None
    ids = cache.ids.held
    assert ids is not None
    again = type(cache)(model)
    with undisturbed(model), contextlib.ExitStack() as plainly:
        for kind in {"cpu", ids.device.type}:
            plainly.enter_context(torch.autocast(kind, enabled=False))
        model(torch.tensor([*begins], device=ids.device), **with_cache(again))
    rows, errors = list(begins.values()), []
    for stored, new in zip(cache.packed, again.packed, strict=True):
        for name in ("k", "v"):
            a, b = getattr(stored.window, name), getattr(new.window, name)
            n = min(len(next(iter(begins))), a.shape[2])
            errors.append(relative_error(a[rows, :, :n], b[:, :, :n]))
    return float(torch.stack([e.cpu() for e in errors]).nan_to_num(math.inf).square().mean().sqrt())


def first_ids(cache: StoredCache) -> dict[tuple[int, ...], int]:
    """What sequences of a cache begin with, as many ids as there are sinks, and one sequence for each beginning."""
    lengths = cache.batch.lengths
    n = min([cache.config.n_sink, lengths.seen, *lengths.totals()])
    ids = cache.ids.of_slots(lengths.seen)
    begins = [] if ids is None or n == 0 else ids[:, :n].tolist()
    return {tuple(x): b for b, x in reversed([*enumerate(begins)]) if min(x) >= 0}


def relative_error(stored: Tensor, new: Tensor) -> Tensor:
    """Norm of the difference by the norm of what is stored."""
    stored, new = stored.double(), new.to(stored.device).double()
    relative: Tensor = (new - stored).norm() / stored.norm().clamp(min=1e-30)
    return relative


def tolerance(cache: StoredCache) -> float:
    """The relative error that rounding may give in calls of another length, on other machines."""
    layer = cache.packed[0]
    eps = torch.finfo(layer.dtype).eps
    if layer.dtype == torch.float32 and coarse_products(layer.device):
        eps = torch.finfo(torch.float16).eps
    bound: float = max(ROUNDING, eps**0.5)
    return bound


def coarse_products(device: torch.device) -> bool:
    """Whether PyTorch may compute float32 products in fewer bits, as TensorFloat32 on a GPU."""
    return torch.get_float32_matmul_precision() != "highest" or (
        device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    )


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
