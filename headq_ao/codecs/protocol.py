"""What a cache asks of a codec: how the tokens of one layer are written to pages and read from them.

A codec knows no cache, no model and no engine. Those that code every token by itself with HeadQ's planes
(:class:`headq_ao.codecs.planes.PlaneCodec`) are served by compiled operators; any other is served by
:class:`headq_ao.codecs.tokenwise.TokenCodec`'s plain PyTorch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headq_ao.ops.types import PagedKV, Plan, Visible


class Codec:
    """One layer's codec, of all sequences of a batch. Codecs are not changed: what sequences bring makes a new one.

    Its attributes are what it needs of an engine; an engine that cannot give one of them refuses the codec by name.

    Attributes:
        name: for messages.
        granularity: G, body tokens packed together; up to ``W + G − 1`` are in full precision.
        aligned: whether tokens of one group are coded together (KIVI's keys): groups then begin at multiples of G, and
            a crop must not end within a packed one.
        accumulates: whether packing a token changes state that cannot be taken back; a crop must then keep all that is
            packed.
        warmup: tokens of a sequence, behind its sinks, that :meth:`learn` sees before any is packed; 0: none.
        prompt: whether :meth:`read_prompt` is called, between the first call's attention and its packing.
        drops: whether :meth:`read_prompt` may leave tokens out. The layer then has a block table of its own, all
            columns of it kept, which grows.
        segments: codec ids; each page has one, :meth:`segment`, in :attr:`PagedKV.segment` where there are several.
        captured: whether a step can be traced and captured: no decision on the host, G = 1, no warm-up.
    """

    name: str = "this codec"
    granularity: int = 1
    aligned: bool = False
    accumulates: bool = False
    warmup: int = 0
    prompt: bool = False
    drops: bool = False
    segments: int = 1
    captured: bool = False
    packed_sides: ClassVar[tuple[str, ...]] = ("key", "value")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, unless it is written to."""
        return self

    def layout(self, page_tokens: int) -> Any:
        """The form of its pages: ``allocate(pages, dtype, device)`` gives their tensors, ``[pages, ..]`` each, ``spec``
        names it.

        Raises:
            ValueError: where pages of ``page_tokens`` tokens cannot hold its tokens.
        """
        raise NotImplementedError

    def pack(
        self, kv: PagedKV, k: Tensor | None, v: Tensor | None, packed: Tensor, most: int, keep: Tensor | None = None
    ) -> None:
        """:func:`headq_ao.ops.cache_update`: code what leaves the window, then append ``k``, ``v``.

        ``keep``, bool ``[B, most]``: which of those tokens stay; None: all.
        """
        raise NotImplementedError

    def attend(
        self, q: Tensor, scaling: float, kv: PagedKV, visible: Visible | None, sliding: int, reads: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """:func:`headq_ao.ops.paged_attention` of ``q [B, Hq, S, D]``."""
        raise NotImplementedError

    def plan(
        self, before: PagedKV, packed: Tensor, reading: PagedKV, q_heads: int, sliding: int, reads: Tensor | None,
        check_finite: bool,
    ) -> tuple[Plan, Plan] | None:  # fmt: skip
        """A decoding step put together once: what appends ``k``, ``v`` to ``before`` and packs up to ``packed``, and
        what attends over ``reading``, of ``q`` and the scaling; None where there is no such thing."""
        return None

    def decode(self, kv: PagedKV, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """What body tokens ``begin:end`` of all sequences, all of them packed, stand for: ``[B, Hkv, n, D]`` fp32."""
        raise NotImplementedError

    def learn(
        self, members: Sequence[int], q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding: int | None
    ) -> "Codec":
        """The codec with the statistics of sequences ``members``.

        Args:
            members: which of the batch.
            q, k, v: their first ``n_sink + warmup`` tokens, ``[n, H, T, D]``.
            scaling: of the scores.
            sliding: the layer's sliding window, or None.
        """
        raise NotImplementedError

    def read_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, position: Tensor, packed: Tensor, most: int
    ) -> tuple["Codec", Tensor | None]:
        """See the whole first call before anything of it is packed.

        Args:
            q, k, v: ``[B, H, S, D]``.
            scaling: of the scores.
            position: ``[B, S]`` int64 of each slot's token in its sequence; below 0: padding.
            packed: ``[B]`` int64, body tokens that the call packs.
            most: an upper bound of it.

        Returns:
            The codec to go on with, and which of those tokens stay, bool ``[B, most]`` (what stays in the window does);
            None: all.
        """
        return self, None

    def index(self, sequences: Tensor) -> Self:
        """The codec of those sequences of the batch."""
        return self

    def own_tensors(self) -> dict[str, Tensor]:
        """Tensors that belong to the sequences, not to the model, by name: what they take is charged to the cache."""
        return {}

    def tensors_by_side(self, tensors: Sequence[Tensor], layout: Any) -> dict[str, list[Tensor]]:
        """A layer's page tensors by what they hold, ``"key"`` and ``"value"``."""
        raise NotImplementedError

    def segment(self, page: Tensor, page_tokens: int) -> Tensor:
        """The codec ids of logical pages of ``page_tokens`` tokens, int64 of the same shape."""
        return torch.zeros_like(page)

    def crop_problem(self, body: int, packed: int) -> str | None:
        """Why ``packed`` tokens cannot become the first ``body`` of them; None where they can."""
        if body >= packed:
            return None
        if self.accumulates:
            return f"{self.name} sums up what it packs, and {packed - body} of those tokens would go"
        if self.aligned and body % self.granularity:
            return f"{self.granularity} tokens are coded together here, and the crop ends within them"
        return None


class CodecSource:
    """What gives a layer its codec: the model's part of it.

    It may move with the model; :meth:`current` then is another object.
    """

    @property
    def prototype(self) -> Codec:
        """A codec for ``name``, ``granularity``, ``warmup`` and ``drops`` alone, before there are sequences."""
        return self.start(1, torch.float32)

    def start(self, batch: int, dtype: torch.dtype) -> Codec:
        """The codec of ``batch`` new sequences."""
        raise NotImplementedError

    def current(self, codec: Codec) -> Codec:
        """``codec``, over the model's tensors as they are now."""
        return codec

    def watched(self) -> tuple[Mapping[str, Any], str, Any]:
        """Where it shows that the model's tensors are others now, so that a prepared step is none any more: an object
        that a mapping has under a name."""
        return {"": None}, "", None

    def restore(self, codec: Codec, own: dict[str, Tensor]) -> Codec:
        """What :meth:`start` gave, with :meth:`Codec.own_tensors` that were stored.

        Raises:
            ValueError: where they are not its own.
        """
        if own:
            raise ValueError(f"this codec keeps nothing of a sequence, got {sorted(own)}")
        return codec
