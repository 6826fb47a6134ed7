"""When the tokens of a cache are packed."""

import math
from collections.abc import Sequence

from headq_ao.cache.lengths import Schedule
from headq_ao.codecs.protocol import CodecSource
from headq_ao.config import MOST, HeadQConfig

MOST_SINKS = 2**16  # room for sinks is made at once; more of them stand for a window that no sequence leaves
SLACK = 16  # tokens of a draft that may be rejected without shrinking the window


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
