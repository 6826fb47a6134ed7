"""Fisher information of cached rows: a backward pass through the model, seen from its attention."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headq_ao.ambient import mode_neutral, neutral_modes
from headq_ao.calibration.bit_allocation import WHOLE, coding_errors
from headq_ao.calibration.observers import AttentionObserver, Frames, layer_numbers
from headq_ao.statistics.fisher import row_gradients
from headq_ao.statistics.moments import FISHER, PROFILED_BITS, LayerMoments

HALF_SCALE = 128.0  # of directions where gradients are fp16, whose least numbers are large


class Read(NamedTuple):
    """What one layer's attention read in a call, and how."""

    states: tuple[Tensor, Tensor, Tensor]
    given: dict[str, Any]


class GradientRecorder(AttentionObserver):
    """Adds up ``Σ g gᵀ`` over the rows of each layer's cache, with gradients ``g`` whose second moment is the Fisher
    information (:mod:`headq_ao.statistics.fisher`), and what coded rows cost by them, ``Σ (g·e)²``.

    ``g`` is of one random direction of each token's logits that has the covariance ``diag(p) − p pᵀ`` of the score of a
    drawn token, but the same size whatever ``p`` is: sums over a few thousand tokens then vary less.

    Args:
        moments: of the layers that store keys and values, from which the codecs come.
        n_sink: first tokens that do not count.
        seed: of the directions.
        places: of the layers among all; None: as they come.
        frames: of each layer's keys.
        sharing: layers that read the keys and values of others, and of which: what all readers show of a row adds up.
    """

    def __init__(
        self, moments: Sequence[LayerMoments], n_sink: int, seed: int, places: Sequence[int] | None = None,
        frames: Frames | None = None, sharing: Mapping[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.moments, self.frames = moments, [None] * len(moments) if frames is None else frames
        self.numbers = layer_numbers(len(moments), places, sharing)
        self.n_sink, self.seed = n_sink, seed
        self.anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        self.read: dict[int, Read] = {}
        self.found: dict[int, tuple[Tensor, ...]] = {}  # gradients of the sequence's keys and values, and these
        self.sums: dict[int, list[Tensor]] = {}

    def record(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None,
        sinks: Tensor | None = None, softcap: float | None = None,
    ) -> None:  # fmt: skip
        """See :class:`AttentionObserver`."""
        given = {"scaling": scaling, "window": window, "sinks": sinks, "softcap": softcap}
        if layer in self.numbers:
            self.read[layer] = Read((q.detach(), k.detach(), v.detach()), given)

    def attended(self, layer: int, out: Tensor) -> Tensor:
        """The output ``[B, T, Hq, Dv]`` of a layer, as it is; its gradient comes to :meth:`take`."""
        if layer not in self.numbers:
            return out
        watched: Tensor = _Watched.apply(out, self.anchor, self, layer)  # type: ignore[no-untyped-call]
        return watched

    def take(self, layer: int, grad: Tensor) -> None:
        """The gradient ``[B, T, Hq, Dv]`` by a layer's output."""
        states, given = self.read.pop(layer)
        by_k, by_v = row_gradients(grad.transpose(1, 2), *states, n_sink=self.n_sink, **given)
        number = self.numbers[layer]
        if number in self.found:  # by what another reader made of them
            by_k, by_v = by_k + self.found[number][0], by_v + self.found[number][1]
        self.found[number] = by_k, by_v, *states[1:]

    def run(self, model: Any, row: Tensor, counted: Tensor, **given: Tensor) -> None:
        """Fold one sequence.

        Args:
            model: whose attention shows this observer what it reads.
            row: ids ``[T]``.
            counted: ``[T]``, which tokens count.
            given: further arguments of the model's call.

        Raises:
            RuntimeError: where the model has no gradients, or they are not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            row, given = row.clone(), {name: x.clone() for name, x in given.items()}  # no tensors of inference mode
            logits = getattr(model(input_ids=row[None], use_cache=False, **given), "logits", None)
            if not isinstance(logits, Tensor):
                raise RuntimeError("it returns no logits")
            with neutral_modes():
                directions = self._directions(logits.detach(), counted)
            try:
                torch.autograd.grad(logits, self.anchor, directions)
            finally:
                found, self.read, self.found = self.found, {}, {}
        if missing := sorted({*self.numbers.values()} - {*found}):  # costs of some layers alone compare with none
            raise RuntimeError(f"its logits do not depend on attention in layer {missing[0]} by a gradient")
        with neutral_modes():
            for number, of_layer in found.items():
                self._fold(number, of_layer, counted)

    def _directions(self, logits: Tensor, counted: Tensor) -> Tensor:
        """Of each token a random direction ``u`` of its logits with ``E[u uᵀ] = diag(p) − p pᵀ``, ``[1, T, V]``."""
        p = logits[0].float().softmax(-1)
        generator = torch.Generator(p.device).manual_seed(self.seed)
        signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
        self.seed += 1
        u = p.sqrt() * signs.mul_(2).sub_(1)
        u -= p * u.sum(-1, keepdim=True)
        half = torch.float16 in (logits.dtype, *(read.states[1].dtype for read in self.read.values()))
        u *= counted.to(p.device)[:, None] * (HALF_SCALE if half else 1.0)  # logits may be fp32 behind fp16 layers
        return u[None].to(logits.dtype)

    def _fold(self, number: int, of_layer: Sequence[Tensor], counted: Tensor) -> None:
        by_k, by_v, k, v = of_layer
        whole, frame = k.shape[2] // WHOLE * WHOLE, self.frames[number]
        by_k, by_v = (x * counted.to(k.device)[:, None] for x in (by_k, by_v))
        loss = k.new_zeros((k.shape[1], 2, len(PROFILED_BITS)), dtype=torch.float64)
        k, v = (x[:, :, :whole].float() for x in (k, v))
        errors = coding_errors(self.moments[number], k, v, n_sink=self.n_sink, frame=frame)
        for side, by in enumerate((by_k, by_v)):
            for i, e in enumerate(errors[side]):
                loss[:, side, i] = (by[:, :, :whole] * e).double().sum(-1).square().sum((0, 2))
        if frame is not None:
            by_k = frame.into(by_k, frame.along(by_k.shape[2], self.n_sink, k.device))
        new = [torch.einsum("bhtd,bhte->hde", x, x).cpu() for x in (by_k.double(), by_v.double())] + [loss.cpu()]
        if not all(bool(torch.isfinite(x).all()) for x in new):
            raise RuntimeError("gradients are not finite")
        there = self.sums.get(number)
        self.sums[number] = new if there is None else [a + b for a, b in zip(there, new, strict=True)]

    @mode_neutral
    def measured(self) -> list[LayerMoments]:
        """The moments, with what was measured; those that nothing came of as they are."""
        found = list(self.moments)
        for number, sums in self.sums.items():
            new: dict[str, Any] = dict(zip(FISHER, (x.float() for x in sums), strict=True))
            found[number] = dataclasses.replace(found[number], **new)
        return found


class _Watched(torch.autograd.Function):
    """A tensor as it is, whose gradient is shown; ``anchor`` makes it want one."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, recorder: GradientRecorder, layer: int) -> Tensor:
        ctx.to = recorder, layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        recorder, layer = ctx.to
        with neutral_modes():
            recorder.take(layer, grad)
        return grad, torch.zeros((), dtype=torch.float32, device="cpu"), None, None
