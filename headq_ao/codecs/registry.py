"""Codecs by name: one file and one line make a new one.

    from headq_ao.codecs.registry import LayerContext, register

    @register("mine")
    def mine(layer: LayerContext, *, bits: int = 4) -> TokenCodec:
        return Mine(bits)

Once that file is imported, ``quantize_(model, headq_config(codec="mine", codec_options={"bits": 2}))`` uses it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from headq_ao.codecs.protocol import Codec
from headq_ao.codecs.rotation import POSITIONS, Rotation
from headq_ao.codecs.source import SourceModule
from headq_ao.codecs.tokenwise import TokenCodec
from headq_ao.layer_shape import LayerShape
from headq_ao.statistics.moments import LayerMoments

OWN = "headq"  # what no codec may be called


@dataclass(frozen=True)
class LayerContext:
    """What a codec may know of its layer.

    Attributes:
        shape: heads, head_dim and sliding window.
        n_sink: first tokens of a sequence, in full precision.
        device: of the attention module.
        moments: of a calibration, or None.
        rotation: the model's rotary embedding, which keys have been through; None: it has none, or one that does more
            than turn pairs of coordinates by angles in proportion to the position.
        framed: the moments as the calibration has them, which may be in the frame of segments, or None.
        positions: of the model.
        index, layers: which layer it is, and of how many.
        fingerprint: of the model (:attr:`headq_ao.Calibration.fingerprint`), for what was trained for it; None: there
            is no model, only shapes.
    """

    shape: LayerShape
    n_sink: int
    device: torch.device
    moments: LayerMoments | None = None
    rotation: Rotation | None = None
    framed: LayerMoments | None = None
    positions: int = POSITIONS
    index: int = 0
    layers: int = 1
    fingerprint: Mapping[str, Any] | None = None


class TokenSource(SourceModule):
    """Gives a layer a :class:`TokenCodec`, whose ``fixed`` tensors are its buffers.

    Args:
        codec: without sequences.
        layer: what it is for.
        name: for messages.

    Raises:
        ValueError: where the codec's attributes do not fit each other or the layer.
    """

    anchor: Tensor

    def __init__(self, codec: TokenCodec, layer: LayerContext, name: str) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.empty(0, dtype=torch.float32, device=layer.device), persistent=False)
        for key, tensor in codec.fixed.items():
            self.register_buffer(key, tensor.to(layer.device), persistent=False)
        self.codec = codec.replaced(shape=layer.shape, n_sink=layer.n_sink, name=name, fixed=self._fixed())
        if codec.drops and codec.granularity > 1:
            raise ValueError(f"{name} leaves tokens out and codes {codec.granularity} together: it can do one of both")
        if codec.drops and not codec.prompt:
            raise ValueError(f"{name} leaves tokens out and sees no prompt: prompt must be True")
        self.codec.layout(codec.granularity)

    def _fixed(self) -> dict[str, Tensor]:
        return {key: t for key, t in self._buffers.items() if t is not None and key != "anchor"}

    @property
    def prototype(self) -> Codec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        return self.codec

    def start(self, batch: int, dtype: torch.dtype) -> Codec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        codec = self.codec.replaced(batch=batch, fixed=self._fixed())
        return codec.replaced(own=codec.state(self.anchor.device))

    def current(self, codec: Codec) -> Codec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        assert isinstance(codec, TokenCodec)
        same = all(self._buffers[name] is t for name, t in codec.fixed.items())
        return codec if same else codec.replaced(fixed=self._fixed())

    def restore(self, codec: Codec, own: dict[str, Tensor]) -> Codec:
        """See :class:`headq_ao.codecs.protocol.CodecSource`."""
        assert isinstance(codec, TokenCodec)
        wrong = sorted(name for name, t in own.items() if not t.ndim or t.shape[0] != codec.batch)
        if wrong:
            raise ValueError(f"{codec.name} holds {codec.batch} sequences, and {', '.join(wrong)} of another number")
        return codec.replaced(own=own)


Factory = TypeVar("Factory", bound=Callable[..., TokenCodec | SourceModule])
_FACTORIES: dict[str, Callable[..., TokenCodec | SourceModule]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Make a codec known by a name.

    What is decorated takes a :class:`LayerContext` and the codec's options by name, and gives a :class:`TokenCodec` or
    a :class:`SourceModule` of that layer.

    Raises:
        ValueError: where another codec has the name.
    """
    if not isinstance(name, str) or not name or name == OWN:
        raise ValueError(f"a codec's name must be a text other than {OWN!r}, got {name!r}")

    def known(factory: Factory) -> Factory:
        before = _FACTORIES.get(name)
        if before is not None and (before.__module__, before.__qualname__) != (
            factory.__module__,
            factory.__qualname__,
        ):
            raise ValueError(f"{name!r} is registered already, as {before.__module__}.{before.__qualname__}")
        _FACTORIES[name] = factory
        return factory

    return known


def names() -> list[str]:
    """Registered codecs, in the order in which they came."""
    return list(_FACTORIES)


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError on an unknown codec or option, listing what there is."""
    if name not in _FACTORIES:
        raise ValueError(
            f"no codec {name!r} is registered; there are {', '.join([OWN, *_FACTORIES])}. Import the file that "
            "registers it first"
        )
    parameters = list(inspect.signature(_FACTORIES[name]).parameters.values())[1:]
    known = [p.name for p in parameters]
    wrong = sorted(set(options) - set(known))
    missing = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.name not in options]
    if wrong or missing:
        problem = f"has no option {', '.join(wrong)}" if wrong else f"needs {', '.join(missing)}"
        raise ValueError(f"{name} {problem}; its options are {', '.join(known) or 'none'}")


def build(name: str, options: Mapping[str, Any], layer: LayerContext) -> SourceModule:
    """The source of a layer's codec.

    Raises:
        ValueError: on an unknown codec or option, and what the codec itself refuses.
    """
    check(name, options)
    made = _FACTORIES[name](layer, **options)
    if isinstance(made, TokenCodec):
        return TokenSource(made, layer, name)
    if not isinstance(made, SourceModule):
        raise ValueError(f"what is registered as {name!r} must give a TokenCodec or a SourceModule, got {type(made)}")
    return made
