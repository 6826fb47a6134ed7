"""What a cache holds, as tensors and plain data, and back."""

from typing import Any

import torch
from torch import Tensor

from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer


def batch_to_data(batch: Batch) -> dict[str, Any]:
    """Counts of the sequences of a cache; it is settled."""
    lengths = batch.lengths
    counts = next(iter(lengths.on.values()))
    return {
        "slots": lengths.seen,
        "tokens": lengths.totals(),
        "pads": lengths.trailing_pads(),
        "packed": lengths.packed(),
        "ring_low": counts.ring_low.tolist(),
        "highest": lengths.highest(),
        "columns": {"full" if key is None else str(key): table.columns for key, table in batch.tables.items()},
        "left_out": {str(key): table.left_out for key, table in batch.tables.items() if table.left_out},
    }


def batch_from_data(batch: Batch, data: dict[str, Any]) -> None:
    """Give an empty cache the counts of :func:`batch_to_data`, and room for its pages.

    Raises:
        ValueError: where they do not fit each other.
    """
    sequences = {name: data[name] for name in ("tokens", "pads", "packed", "ring_low", "highest")}
    size = len(data["tokens"])
    whole = all(len(x) == size and all(isinstance(n, int) and n >= 0 for n in x) for x in sequences.values())
    plan = batch.lengths.schedule
    fits = whole and all(
        low <= packed <= max(n - plan.n_sink, 0) and n <= data["slots"]
        for n, packed, low in zip(data["tokens"], data["packed"], data["ring_low"], strict=False)
    )
    if not size or not fits:
        raise ValueError("its counts of tokens are not usable")
    if batch.capacity is not None and data["slots"] > batch.capacity:
        raise ValueError(f"it holds {data['slots']} tokens, and there is room for {batch.capacity}")
    batch.lengths.restore(data["slots"], **sequences)
    for key, table in batch.tables.items():
        most = data["columns"]["full" if key is None else str(key)]
        if table.waits:
            table.leave_out(data["left_out"][str(key)])
        stored = table.stored(data["packed"])
        if min(stored) < 0 or not isinstance(most, int) or most * batch.page_tokens < max(stored) * (not table.most):
            raise ValueError("its block tables have no room for its tokens")
        if most:
            table.reserve(size, most * batch.page_tokens + min(table.left_out or [0]))


def pages_in_use(layer: PackedLayer) -> Tensor | None:
    """Physical pages that hold packed tokens of a layer, by sequence and column ``[B, n]``; None: none."""
    if layer.table is None or not max(layer.table.stored(layer.batch.lengths.packed())):
        return None
    n = -(-max(layer.table.stored(layer.batch.lengths.packed())) // layer.batch.page_tokens)
    return layer.table.host[:, : min(n, layer.table.columns)].long()


def layer_to_tensors(layer: PackedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of one layer without unused capacity, and what goes with them."""
    assert layer.pool is not None
    pages, window = pages_in_use(layer), layer.window
    tensors: dict[str, Tensor] = {}
    if pages is not None:
        index = pages.flatten().to(layer.device)
        tensors |= {f"page.{i}": t[index].contiguous() for i, t in enumerate(layer.pool.every)}
    slots = min(max(layer.batch.lengths.totals()), window.n_sink + window.ring)
    tensors |= {
        f"window.{n}": t[:, :, :slots].contiguous() for n in window.names if (t := getattr(window, n)) is not None
    }
    own = layer.codec.own_tensors()
    tensors |= {f"own.{name}": t.contiguous() for name, t in own.items()}
    dtype = str(layer.dtype).removeprefix("torch.")
    data = {
        "dtype": dtype,
        "layout": layer.pool.spec,
        "ring": window.ring,
        "learned": layer.learned,
        "read": layer.tokens_read,
    }
    return tensors, data


def layer_from_tensors(
    layer: PackedLayer, data: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    """Put :func:`layer_to_tensors`'s data into an empty layer, whose batch has its counts.

    Raises:
        ValueError, KeyError, TypeError: where they do not fit each other or the model.
    """
    layer.initialize(getattr(torch, data["dtype"]), device)
    assert layer.pool is not None and layer.reads is not None
    if data["layout"] != layer.pool.spec:
        raise ValueError(f"its pages have the form {data['layout']}, and here they have {layer.pool.spec}")
    batch, window = layer.batch.lengths.batch, layer.window
    if not isinstance(data["ring"], int) or data["ring"] < window.ring:
        raise ValueError(f"its ring must hold at least {window.ring} tokens, got {data['ring']!r}")
    if len(data["learned"]) != batch:
        raise ValueError("it does not say which sequences have statistics")
    window.resize(data["ring"], layer.counts.none)
    slots = min(max(layer.batch.lengths.totals()), window.n_sink + window.ring)
    for name in window.names:
        if (t := tensors.get(f"window.{name}")) is None:
            continue
        heads, dim = layer.forms[name]
        expect(f"window.{name}", t, (batch, heads, slots, dim))
        window.allocate(name, (batch, heads, dim), t.dtype, device)[:, :, :slots] = t.to(device)
    if window.k is None or any(f"window.{name}" not in tensors for name in window.sides):
        raise ValueError("it lacks full-precision tokens")
    pages = pages_in_use(layer)
    if pages is not None:
        index = pages.flatten().to(device)
        for i, held in enumerate(layer.pool.every):
            t = tensors[f"page.{i}"]
            expect(f"page.{i}", t, (len(index), *held.shape[1:]))
            held[index] = t.to(device)
    own = {name.removeprefix("own."): t.to(device) for name, t in tensors.items() if name.startswith("own.")}
    layer.codec = layer.source.restore(layer.codec, own)
    layer.learned, layer.seen, layer.call = list(data["learned"]), layer.batch.lengths.seen, layer.batch.lengths.calls
    layer.reads[0], layer.reads[1] = data["read"]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a stored tensor has another shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
