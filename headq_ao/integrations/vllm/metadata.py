"""A step's requests, as vLLM hands them to the layers."""

from dataclasses import dataclass, field

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata

from headq_ao.ops.requests import Requests

FEW = 32  # new tokens of a request that are read with all others in one call
SUFFIX = ".newest"


def window_name(layer_name: str) -> str:
    """What the layer that holds another's newest tokens is called."""
    return layer_name + SUFFIX


@dataclass
class HeadQMetadata(AttentionMetadata):
    """A step's requests, as one KV cache group sees them. Lengths keep their addresses from step to step.

    Attributes:
        tokens: new tokens of all requests together.
        most, few: of one of them, and of one that is not long, at most.
        long: requests of more than :data:`FEW` new tokens: number, first token, the one behind the last.
        table: vLLM's block table ``[B, C]`` int32.
        start: ``[B + 1]`` int64, where the new tokens of each request begin.
        held, packed, total: ``[B]`` int64: tokens before the step; those that all queries read as codes; those with it.
        recent: tokens before a query that it reads in full precision.
    """

    tokens: int
    most: int
    few: int
    long: tuple[tuple[int, int, int], ...]
    table: Tensor
    start: Tensor
    held: Tensor
    packed: Tensor
    total: Tensor
    recent: int
    joined: dict[int, Requests] = field(default_factory=dict)

    def requests(self, window: "HeadQMetadata") -> Requests:
        """What the operators take, with the block table of the group that holds a layer's newest tokens."""
        found = self.joined.get(id(window))
        if found is None:
            found = self.joined[id(window)] = Requests(
                self.start, self.held, self.packed, self.total, self.table, window.table, self.most, self.few,
                self.long, self.recent,
            )  # fmt: skip
        return found
