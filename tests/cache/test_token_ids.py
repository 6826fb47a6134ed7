"""Which ids a cache was filled with, slot by slot."""

import pytest
import torch

from headq_ao.cache.schedule import Span
from headq_ao.cache.token_ids import EMBEDDED, PAD, UNKNOWN, TokenIds


def ids(batch, first, n):
    return (torch.arange(first, first + n) + 100 * torch.arange(batch)[:, None]).to(torch.int64)


def noted(*calls):
    """Of calls ``(tokens, length, seen, spans)``."""
    made = TokenIds()
    for tokens, length, seen, spans in calls:
        made.note(tokens, 2, length, seen, spans)
    return made


def test_ids_follow_each_other():
    made = noted((ids(2, 0, 5), 5, 0, None), (ids(2, 5, 1), 1, 5, None), (ids(2, 6, 70), 70, 6, None))
    held = made.of_slots(76)
    assert held.dtype == torch.int32 and held.tolist() == ids(2, 0, 76).tolist()
    assert made.of_slots(3).tolist() == ids(2, 0, 3).tolist() and made.count == 76
    assert made.capacity >= 76 and made.nbytes(76) == 2 * 76 * 4 and made.nbytes(10) == 80
    assert [t.shape for t in made.tensors()] == [(2, made.capacity)]


@pytest.mark.parametrize(
    ("tokens", "mark"),
    [
        (None, UNKNOWN),
        (torch.randn(2, 3, 8), EMBEDDED),
        (torch.ones(2, 3, 8, dtype=torch.int64), UNKNOWN),
        ([[1]], UNKNOWN),
    ],
    ids=["none", "embeddings", "3-D", "list"],
)
def test_calls_without_ids_are_marked(tokens, mark):
    made = noted((ids(2, 0, 4), 4, 0, None), (tokens, 3, 4, None))
    assert made.of_slots(7)[:, 4:].tolist() == [[mark] * 3] * 2
    assert made.of_slots(7)[:, :4].tolist() == ids(2, 0, 4).tolist()


def test_padding_is_marked_whatever_stands_there():
    made = noted((ids(2, 0, 5), 5, 0, [Span(2, 5), Span(0, 4)]), (None, 2, 5, [Span(0, 2), Span(1, 2)]))
    assert made.of_slots(7).tolist() == [
        [PAD, PAD, 2, 3, 4, UNKNOWN, UNKNOWN], [100, 101, 102, 103, PAD, PAD, UNKNOWN],
    ]  # fmt: skip


def test_calls_that_it_was_not_told_of_are_unknown():
    """A prompt that bypassed the pre-hook, between calls or before any."""
    made = noted((ids(2, 0, 2), 2, 0, None), (ids(2, 5, 2), 2, 5, None))
    assert made.of_slots(9)[0].tolist() == [0, 1, UNKNOWN, UNKNOWN, UNKNOWN, 5, 6, UNKNOWN, UNKNOWN]
    assert noted().of_slots(4) is None and noted().nbytes(4) == noted().capacity == 0 and noted().tensors() == []


def test_a_failed_calls_slots_are_written_again():
    made = noted((ids(2, 0, 4), 4, 0, None), (ids(2, 50, 3), 3, 4, None), (ids(2, 4, 2), 2, 4, None))
    assert made.of_slots(6).tolist() == ids(2, 0, 6).tolist()


def test_a_first_call_starts_anew_and_one_of_another_batch_is_left_to_the_layers():
    made = noted((ids(2, 0, 4), 4, 0, None))
    made.note(ids(3, 0, 2), 3, 2, 4, None)
    assert made.count == 4 and made.held.shape[0] == 2
    made.note(ids(3, 7, 2), 3, 2, 0, None)
    assert made.of_slots(2).tolist() == ids(3, 7, 2).tolist()


def test_sequences_are_kept_reordered_and_cropped():
    made = noted((ids(2, 0, 6), 6, 0, None))
    made.select(torch.tensor([1, 0, 1]))
    assert made.of_slots(6).tolist() == ids(2, 0, 6)[[1, 0, 1]].tolist()
    made.crop(4)
    made.note(ids(3, 90, 1), 3, 1, 4, None)
    assert made.of_slots(5)[0].tolist() == [100, 101, 102, 103, 90]
    made.crop(0)
    assert made.held is None and made.of_slots(2) is None
    made.select(torch.tensor([0]))


def test_what_was_stored_is_taken_over_with_its_room():
    made = TokenIds()
    made.put(ids(2, 0, 5).int(), 12)
    assert made.of_slots(5).tolist() == ids(2, 0, 5).tolist() and (made.capacity, made.count) == (12, 5)
    made.note(ids(2, 5, 7), 2, 7, 5, None)
    assert made.capacity == 12 and made.of_slots(12).tolist() == ids(2, 0, 12).tolist()
    made.put(None, 12)
    assert made.held is None


@pytest.mark.parametrize("first", [True, False])
def test_written_in_and_outside_inference_mode(first):
    made = TokenIds()
    for i, mode in enumerate((first, not first, first)):
        with torch.inference_mode(mode):
            made.note(ids(2, 3 * i, 3), 2, 3, 3 * i, None)
            if i == 1:
                made.select(torch.tensor([0, 1]))
    assert made.of_slots(9).tolist() == ids(2, 0, 9).tolist() and not made.held.is_inference()
