"""What a layer holds, before its first call and in copies of it."""

import copy

import pytest
import torch

from tests.cache.streams import stream
from tests.cache.test_invariants import assert_same_state, make

KINDS = ["calibrated", "uncalibrated"]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_their_own_way(kind):
    engine = make(kind)
    q, k, v = stream(2, 300)
    engine.feed(*(x[:, :, :200] for x in (q, k, v)), [190, *[1] * 10])
    made, before = copy.deepcopy(engine), [t.clone() for t in engine.layer.tensors()]
    assert made.layer.batch is made.batch and made.layer.table is made.batch.tables[None]
    assert made.layer.source is engine.layer.source
    made.feed(*(x[:, :, :60] for x in (q, k, v)), [1, 1, 8, 50])
    assert all(torch.equal(a, b) for a, b in zip(engine.layer.tensors(), before, strict=True))
    assert engine.lengths.totals() == [200, 200] and made.lengths.totals() == [260, 260]
    other = make(kind)
    other.feed(*(x[:, :, :200] for x in (q, k, v)), [200])
    for x in (engine, other):
        x.feed(*(y[:, :, 200:] for y in (q, k, v)), [1] * 100)
    assert_same_state(engine, other, 1, 1)


def test_a_layer_before_its_first_call():
    engine = make("calibrated")
    layer = engine.layer
    assert (layer.tokens_read, layer.packed_sides, layer.tensors(), layer.is_initialized) == ((0, 0), (), [], False)
    engine.feed(*stream(), [300])
    assert layer.packed_sides == ("key", "value") and len(layer.tensors()) > 4
    engine.clear()
    assert (layer.tokens_read, layer.tensors(), layer.is_initialized, layer.seen) == ((0, 0), [], False, 0)
