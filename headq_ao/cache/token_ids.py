"""Which token ids a cache was filled with: a stored prompt stands on these rows of the embedding."""

from typing import Any

import torch
from torch import Tensor

from headq_ao.cache.schedule import Span

# What stands where there is no id: a call that did not say, a call by embeddings, padding.
UNKNOWN, EMBEDDED, PAD = -1, -2, -3


class TokenIds:
    """The id of each slot, int32 ``[B, capacity]`` on the device of the ids; four bytes a token, written by slot.

    Slots behind those that the cache has seen mean nothing: a failed call leaves them, and the next one writes there.

    Args:
        expected: slots, beyond which no spare room is made; None: not known.
    """

    def __init__(self, expected: int | None = None) -> None:
        self.expected = expected
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.held: Tensor | None = None
        self.count = 0

    def note(self, tokens: Any, batch: int, length: int, seen: int, spans: list[Span] | None) -> None:
        """Keep the ids of a call of ``length`` slots after ``seen``.

        Args:
            tokens: ids ``[B, S]``, embeddings ``[B, S, C]``, or None where they are not known.
            batch, length: of the call.
            seen: slots held before it.
            spans: real slots of each row, None: all.
        """
        if seen == 0:
            self.clear()
        elif self.held is not None and self.held.shape[0] != batch:
            return  # the layers will refuse the call
        device = tokens.device if isinstance(tokens, Tensor) else torch.device("cpu")
        held = self._room(batch, seen + length, device)
        if self.count < seen:
            held[:, self.count : seen] = UNKNOWN  # calls that did not come through the model's pre-hook
        at = held[:, seen : seen + length]
        if isinstance(tokens, Tensor) and tokens.ndim == 2 and not tokens.is_floating_point():
            at.copy_(tokens)
        else:
            at.fill_(EMBEDDED if isinstance(tokens, Tensor) and tokens.is_floating_point() else UNKNOWN)
        for b, span in enumerate(spans or ()):
            at[b, : span.start] = PAD
            at[b, span.stop :] = PAD
        self.count = seen + length

    def _room(self, batch: int, slots: int, device: torch.device) -> Tensor:
        """The tensor, with room for that many slots."""
        held = self.held
        if held is None or held.shape[1] < slots or held.is_inference():
            spare = 0 if held is None else held.shape[1] + max(held.shape[1] // 8, 32)
            capacity = max(slots, spare if self.expected is None else min(spare, self.expected))
            with torch.inference_mode(False):  # to be written in any mode
                on = device if held is None else held.device
                larger = torch.full((batch, capacity), UNKNOWN, dtype=torch.int32, device=on)
                if held is not None:
                    larger[:, : self.count] = held[:, : self.count]
            self.held = held = larger
        return held

    def of_slots(self, seen: int) -> Tensor | None:
        """Ids of the first ``seen`` slots, None where nothing was noted."""
        if self.held is None:
            return None
        missing = max(seen - self.count, 0)
        known = self.held[:, : min(self.count, seen)]
        return torch.nn.functional.pad(known, (0, missing), value=UNKNOWN) if missing else known

    @property
    def capacity(self) -> int:
        """Slots that there is room for."""
        return 0 if self.held is None else self.held.shape[1]

    def put(self, ids: Tensor | None, capacity: int) -> None:
        """Take over ids that :meth:`of_slots` gave, with the room that there was."""
        self.clear()
        if ids is not None:
            with torch.inference_mode(False):
                self.held = torch.nn.functional.pad(ids, (0, max(capacity - ids.shape[1], 0)), value=UNKNOWN).clone()
            self.count = ids.shape[1]

    def select(self, index: Tensor) -> None:
        """Keep and reorder sequences."""
        if self.held is not None:
            with torch.inference_mode(False):
                self.held = self.held.index_select(0, index.to(self.held.device))

    def crop(self, seen: int) -> None:
        """Keep the first ``seen`` slots."""
        self.count = min(self.count, seen)
        if seen == 0:
            self.clear()

    def tensors(self) -> list[Tensor]:
        """What is held, as a list."""
        return [] if self.held is None else [self.held]

    def nbytes(self, seen: int) -> int:
        """Bytes of the ids of the first ``seen`` slots; the rest is unused capacity."""
        return 0 if self.held is None else self.held[:, : min(self.count, seen)].nbytes
