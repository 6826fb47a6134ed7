"""What an attention module carries: the source of its layer's codec, which moves with it."""

import itertools
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from headq_ao.codecs.protocol import CodecSource


class ModelNumber:
    """Tells apart, in this process, the models that HeadQ was put on; a copy of a model gets a number of its own."""

    refusing = False  # within a traced call that ends in an error: what is dense there is not worth a warning

    def __init__(self) -> None:
        self.number = next(_numbers)

    def __reduce__(self) -> tuple[type["ModelNumber"], tuple[()]]:
        return ModelNumber, ()


_numbers = itertools.count()


class SourceModule(nn.Module, CodecSource):
    """A :class:`CodecSource` whose buffers follow the model to its device, and stay in their dtype when it is cast."""

    frame_tokens: int = 0  # of a segment whose frame keys are coded in, 0: none
    call_options: frozenset[str] = frozenset()  # of the model: see headq_ao.integrations.transformers.arguments

    def __init__(self) -> None:
        super().__init__()
        self.model = ModelNumber()  # of this layer alone, until quantize_ gives all layers of a model the same

    def sketch(self) -> list[float]:
        """A few numbers that tell codecs of different calibrations apart: a random projection of each head's unit-norm
        buffers ``[1, Hkv, ..]``.

        They agree to 1e-5 between machines whose eigenvectors differ in rounding.
        """
        numbers = []
        for tensor in (t for t in self.buffers() if t.numel()):
            x = tensor[0].detach().cpu().double().flatten(1)
            generator = torch.Generator("cpu").manual_seed(0)
            direction = torch.randn(x.shape[1], generator=generator, dtype=torch.float64, device="cpu")
            numbers += (x @ direction / x.norm(dim=1).clamp(min=1e-30)).tolist()
        return numbers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to its device, but stay as it is when the model is cast."""
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self
