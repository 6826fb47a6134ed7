"""What collects statistics while attention runs, and the context variable through which attention finds it."""

import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral
from headq_ao.calibration.bit_allocation import output_errors
from headq_ao.codecs.whitened import Readout
from headq_ao.ops.types import SegmentFrame
from headq_ao.statistics.importance import importance_weights
from headq_ao.statistics.moments import TENSORS, LayerMoments

Frames = Sequence[SegmentFrame | None]  # of each layer
IMPORTANCE_EVERY = 4  # every fourth query serves for the weights that attention gives


class AttentionObserver:
    """Sees what each layer's attention reads, and what comes out."""

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
        sinks: Tensor | None = None, softcap: float | None = None,
    ) -> None:  # fmt: skip
        """One layer's ``[B, H, T, D]`` states of a call."""
        raise NotImplementedError

    def attended(self, layer: int, out: Tensor) -> Tensor:
        """The layer's output ``[B, T, Hq, Dv]``, right after :meth:`record`; what is returned goes on in its place."""
        return out


RECORDER: contextvars.ContextVar[AttentionObserver | None] = contextvars.ContextVar("headq_recorder", default=None)


def layer_numbers(n_layers: int, places: Sequence[int] | None, sharing: Mapping[int, int] | None) -> dict[int, int]:
    """Which statistics a layer of the model goes to: those of its own, or of the layer whose keys and values it reads.

    Args:
        n_layers: that store keys and values.
        places: of these among all layers; None: as they come.
        sharing: layers that read the keys and values of others, and of which; None: none.
    """
    numbers = {place: i for i, place in enumerate(range(n_layers) if places is None else places)}
    return numbers | {reader: numbers[place] for reader, place in (sharing or {}).items()}


class Recorder(AttentionObserver):
    """Collects what attention reads during one calibration; found through a context variable, so threads are apart.

    ``sharing``: layers that read the keys and values of others, and of which; statistics are of all readers where
    they are ``pooled``, else of the layer alone that stores what they read.
    """

    def __init__(
        self, n_layers: int, n_rows: int, n_sink: int, seed: int, places: Sequence[int] | None = None,
        frames: Frames | None = None, sharing: Mapping[int, int] | None = None, pooled: bool = True,
    ) -> None:  # fmt: skip
        self.frames = [None] * n_layers if frames is None else frames
        self.numbers = layer_numbers(n_layers, places, sharing)
        self.sharing, self.pooled = {} if sharing is None else sharing, pooled
        self.layers = [MomentAccumulator(n_rows) for _ in range(n_layers)]
        self.n_sink = n_sink
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.priority = torch.empty(0, dtype=torch.float32, device="cpu")
        self.counted: Tensor | None = None

    def begin(self, counted: Tensor) -> None:
        """Draw the sampling priorities of a batch, of whose tokens ``[B, T]`` those count; all layers and heads keep
        the same tokens."""
        behind = counted[:, self.n_sink :].flatten().cpu()
        drawn = torch.rand(len(behind), generator=self.generator, dtype=torch.float32, device="cpu")
        self.priority = drawn[behind]
        self.counted = None if bool(counted.all()) else counted

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
        sinks: Tensor | None = None, softcap: float | None = None,
    ) -> None:  # fmt: skip
        """Fold one layer's ``[B, H, T, D]`` states, sinks left out; ``sinks``: logits in the softmax's denominator;
        ``softcap``: of the scores."""
        again = layer in self.sharing  # keys and values that another reader has shown
        if again and not self.pooled:
            return
        counted = None if self.counted is None else self.counted.to(k.device)
        number, segment = self.numbers[layer], None
        if (frame := self.frames[number]) is not None:
            segment = frame.along(k.shape[2], self.n_sink, k.device)
        weights = importance_weights(
            q.float(),
            k.float(),
            scaling,
            n_sink=self.n_sink,
            window=window,
            every=IMPORTANCE_EVERY,
            counted=counted,
            sinks=sinks,
            segment=segment,
            softcap=softcap,
        )
        seen = None
        if frame is not None and segment is not None:
            seen = queries_by_segment(q, IMPORTANCE_EVERY * weights[0], k.shape[1], frame)
            weights = weights[0].sum(-1), *weights[1:]
            q, k = frame.into(q, segment), frame.into(k, segment)
        q, k, v = (x[:, :, self.n_sink :].transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        rows = [IMPORTANCE_EVERY * w[:, :, self.n_sink :].transpose(1, 2).flatten(0, 1) for w in weights]
        if counted is not None:
            behind = counted[:, self.n_sink :].flatten()
            q, k, v, *rows = (x[behind] for x in (q, k, v, *rows))
        for name, x in (("queries", q), ("keys", k), ("values", v)):
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"layer {layer}: calibration met non-finite {name}; run the model in float32 or bfloat16"
                )
        self.layers[number].add(q, k, v, rows, None if again else self.priority, seen)
        self.layers[number].segment_tokens = 0 if frame is None else frame.tokens


def queries_by_segment(q: Tensor, weight: Tensor, kv_heads: int, frame: SegmentFrame) -> Tensor:
    """``Σ w q qᵀ`` ``[Hkv, D, D]`` over pairs of a query and a segment of keys that it reads, in that segment's frame.

    Args:
        q: ``[B, Hq, T, D]``.
        weight: ``[B, Hq, T, segments]``.
        kv_heads: Hkv.
        frame: of keys.
    """
    taken = (weight.sum(-1) > 0).any(1).any(0)
    q, weight = q[:, :, taken].unflatten(1, (kv_heads, -1)), weight[:, :, taken].double().unflatten(1, (kv_heads, -1))
    outer = q.new_zeros(kv_heads, q.shape[-1], q.shape[-1], dtype=torch.float64)
    for s in range(weight.shape[-1]):
        there = frame.into(q.double(), torch.tensor(s, device=q.device))
        outer += torch.einsum("bhgt,bhgtd,bhgte->hde", weight[..., s], there, there)
    return outer


class Profiler(AttentionObserver):
    """Measures what coded keys and values change in the output of every layer, on one sequence; ``measured`` is called
    after each layer."""

    def __init__(
        self, moments: list[LayerMoments], n_sink: int, counted: Tensor, places: Sequence[int] | None = None,
        frames: Frames | None = None, measured: Callable[[], object] = lambda: None,
        sharing: Mapping[int, int] | None = None, readouts: Sequence[Readout | None] | None = None,
    ) -> None:  # fmt: skip
        self.readouts = [None] * len(moments) if readouts is None else readouts
        self.frames, self.measured = [None] * len(moments) if frames is None else frames, measured
        self.numbers = layer_numbers(len(moments), places, sharing)
        self.moments, self.n_sink, self.counted = moments, n_sink, counted

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
        sinks: Tensor | None = None, softcap: float | None = None,
    ) -> None:  # fmt: skip
        """Fold one layer's ``[1, H, T, D]`` states."""
        number = self.numbers[layer]
        m = self.moments[number]
        errors, energy = output_errors(
            m, q, k, v, scaling, n_sink=self.n_sink, window=window, every=IMPORTANCE_EVERY,
            counted=self.counted.to(k.device), sinks=sinks, frame=self.frames[number], softcap=softcap,
            readout=self.readouts[number],
        )  # fmt: skip
        if m.errors is not None and m.energy is not None:  # of another reader
            errors, energy = errors + m.errors, energy + m.energy
        m.errors, m.energy = errors, energy
        self.measured()


class MomentAccumulator:
    """Running sums for one layer; ``n_rows`` keys are kept by the largest random priority per token."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.tokens = 0
        self.sums: list[Tensor] = []
        self.rows: Tensor | None = None
        self.priority: Tensor | None = None
        self.groups, self.segment_tokens = 1, 0

    def add(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor], priority: Tensor | None,
        seen: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fold ``q [N, Hq, D]``, ``k``, ``v`` ``[N, Hkv, D]``, the ``weights`` of their rows, and ``priority [N]``,
        None: these keys are sampled already; ``seen``: what to take for ``Σ w q qᵀ``."""
        q, k, v, of_q, of_k, of_v = (x.double() for x in (q, k, v, *weights))
        self.groups = q.shape[1] // k.shape[1]
        q, of_q = q.unflatten(1, (k.shape[1], -1)), of_q.unflatten(1, (k.shape[1], -1))
        seen = torch.einsum("nhg,nhgd,nhge->hde", of_q, q, q) if seen is None else seen
        new = [torch.einsum("nhgd,nhge->hde", q, q), seen]
        for x, weight in ((k, of_k), (v, of_v)):
            new += [x.sum(0), torch.einsum("nhd,nhe->hde", x, x), weight.sum(0)]
            new += [torch.einsum("nh,nhd->hd", weight, x), torch.einsum("nh,nhd,nhe->hde", weight, x, x)]
        self.sums = [a + b for a, b in zip(self.sums, new, strict=True)] if self.sums else new
        self.tokens += k.shape[0]
        if priority is None:
            return
        rows, priority = k.float(), priority.to(k.device)
        if self.rows is not None and self.priority is not None:
            rows, priority = torch.cat([self.rows, rows]), torch.cat([self.priority, priority])
        keep = priority.topk(min(self.n_rows, len(priority))).indices.sort().values
        self.rows, self.priority = rows[keep], priority[keep]

    @mode_neutral
    def moments(self) -> LayerMoments:
        """The sums so far, on the CPU in fp32."""
        assert self.rows is not None
        tensors = (*(s.float().cpu() for s in self.sums), self.rows.cpu())
        named: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        return LayerMoments(self.tokens, self.groups, **named, segment_tokens=self.segment_tokens)
