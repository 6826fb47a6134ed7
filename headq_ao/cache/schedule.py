"""When the tokens of a cache are packed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from headq_ao.codecs.protocol import CodecSource
from headq_ao.config import MOST, HeadQConfig

MOST_SINKS = 2**16  # room for sinks is made at once; more of them stand for a window that no sequence leaves
SLACK = 16  # tokens of a draft that may be rejected without shrinking the window


@dataclass(frozen=True)
class Span:
    """New slots ``start:stop`` of one call that hold real tokens of a sequence; the others are padding."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """When body tokens (those behind the sinks) are packed.

    Attributes:
        n_sink: first tokens of a sequence, always in full precision.
        window: newest body tokens in full precision, at least.
        slack: body tokens that the ring holds beyond them, so that a rejected draft does not shrink the window.
        granularity: body tokens packed together; up to ``window + granularity − 1`` are in full precision.
        warmup: body tokens that must have left the window before a sequence's first is packed.
    """

    n_sink: int
    window: int
    slack: int
    granularity: int = 1
    warmup: int = 0

    @cached_property
    def ring(self) -> int:
        """Body tokens that the ring holds."""
        return self.window + self.slack + self.granularity - 1

    def packable(self, total: int, packed: int = 0) -> int:
        """Body tokens that are to be in pages, of a sequence of ``total`` tokens, ``packed`` of which are."""
        left = max(total - self.n_sink - self.window, 0) // self.granularity * self.granularity
        return max(left if packed or left >= self.warmup else 0, packed)

    def packable_on_device(self, total: Tensor, packed: Tensor) -> Tensor:
        """:meth:`packable` of each sequence."""
        left = (total - (self.n_sink + self.window)).clamp_(min=0)
        if self.granularity > 1:
            left = left // self.granularity * self.granularity
        if self.warmup:
            left.masked_fill_((left < self.warmup) & (packed == 0), 0)
        return left.maximum(packed)


def schedule_of(config: HeadQConfig, sources: Sequence[CodecSource]) -> Schedule:
    """Of a cache whose layers have those codecs: all pack at the same tokens."""
    codecs = [source.prototype for source in sources]
    group, warmup = math.lcm(*(codec.granularity for codec in codecs)), max(codec.warmup for codec in codecs)
    if config.n_sink > MOST_SINKS:
        return Schedule(0, MOST, SLACK, group, warmup)
    return Schedule(config.n_sink, config.residual_length, SLACK, group, warmup)


def page_tokens(config: HeadQConfig, schedule: Schedule) -> int:
    """P: a multiple of the tokens that are packed together."""
    return math.lcm(config.block_size, schedule.granularity)
