"""The encoders of a layer's head groups: how they pass through an operator's schema, and as functions of tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor

from headq_ao.ops.cache_update import reference
from headq_ao.ops.encode.op import quantize
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.types import SegmentFrame

Encoders = Sequence[Encoder | None]
Quantize = Callable[[Tensor, Encoder], reference.Codes]


def flatten(key_encoders: Encoders, value_encoders: Encoders) -> tuple[list[Tensor], str]:
    """The tensors of the encoders, and a text that says whose they are."""
    tensors, texts = [], []
    for encoder in (e for pair in zip(key_encoders, value_encoders, strict=True) for e in pair):
        own, text = ([], "") if encoder is None else encoder.flat
        tensors += own
        texts.append(text)
    return tensors, ";".join(texts)


def unflatten(tensors: Sequence[Tensor], spec: str) -> tuple[list[Encoder | None], list[Encoder | None]]:
    """:func:`flatten`, undone."""
    made: list[Encoder | None] = []
    first = 0
    for text in spec.split(";"):
        names = text.split(",")[0]
        n = len(names.split("+")) if names else 0
        made.append(Encoder.of_flat(list(tensors[first : first + n]), text) if text else None)
        first += n
    return made[::2], made[1::2]


def frame_of(key_encoders: Encoders) -> SegmentFrame | None:
    """The frame that keys are coded in, the same of all heads; None: the model's own."""
    return next((e.frame for e in key_encoders if e is not None), None)


def coders(
    layout: PageLayout, key_encoders: Encoders, value_encoders: Encoders, quantize: Quantize = quantize
) -> tuple[reference.Encoder, reference.Encoder]:
    """The functions of keys and of values that the reference takes."""
    firsts = [group.first for group in layout.groups]
    of_keys, of_values = (dict(zip(firsts, x, strict=True)) for x in (key_encoders, value_encoders))

    def encode_keys(tokens: Tensor, part: slice) -> reference.Codes:
        encoder = of_keys[part.start]
        assert encoder is not None
        codes, scale, zero = quantize(tokens, encoder)
        return codes, scale[..., 0], None if zero is None else zero[..., 0]

    def encode_values(tokens: Tensor, part: slice) -> reference.Codes:
        encoder = of_values[part.start]
        assert encoder is not None
        return quantize(tokens, encoder)

    return encode_keys, encode_values
