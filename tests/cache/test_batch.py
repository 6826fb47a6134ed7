"""What layers share: room, calls that fail, and what is left to be packed."""

import pytest
import torch

from headq_ao.cache.call import CallMetadata
from headq_ao.cache.schedule import Span
from headq_ao.codecs.planes import PlaneCodec
from tests.cache.streams import Engine, stream
from tests.cache.test_invariants import assert_same_state

BOTH = (None, 80)


def state(engine):
    """Everything that a refused call must leave as it is."""
    batch = engine.batch
    tensors = batch.tensors() + [t for layer in engine.layers for t in layer.tensors()]
    counts = [n for n in vars(batch.lengths.on[torch.device("cpu")])]
    lengths = (batch.lengths.totals(), batch.lengths.packed(), batch.lengths.trailing_pads(), batch.lengths.seen)
    return lengths, counts, [t.clone() for t in tensors], [layer.seen for layer in engine.layers]


def assert_equal(one, other):
    assert one[0] == other[0] and one[3] == other[3]
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@pytest.mark.parametrize("calibrated", [False, True])
def test_too_many_tokens_are_refused_before_anything_changes(calibrated):
    engine = Engine.make({}, calibrated, BOTH, capacity=200)
    q, k, v = stream(2, 240)
    engine.feed(*(x[:, :, :190] for x in (q, k, v)), [150, 40])
    before, metadata = state(engine), engine.batch.metadata
    with pytest.raises(
        ValueError, match=r"has room for 200 tokens and holds 190; 11 more do not fit. Make one with a l"
    ):
        engine.call(*(x[:, :, 190:201] for x in (q, k, v)))
    assert_equal(before, state(engine))
    assert engine.batch.metadata is metadata
    engine.call(*(x[:, :, 190:200] for x in (q, k, v)))
    with pytest.raises(ValueError, match="1 more do not fit"):
        engine.call(*(x[:, :, 200:201] for x in (q, k, v)))
    engine.crop(60)
    engine.feed(*(x[:, :, 140:200] for x in (q, k, v)), [60])
    assert engine.lengths.totals() == [200, 200]


def test_capacity_counts_slots_of_padding():
    engine = Engine.make({}, True, capacity=50)
    q, k, v = stream(1, 60)
    engine.call(*(x[:, :, :45] for x in (q, k, v)), [Span(30, 45)])
    with pytest.raises(ValueError, match="holds 45; 6 more"):
        engine.call(*(x[:, :, 45:51] for x in (q, k, v)))


@pytest.mark.parametrize("capacity", [None, 400])
def test_a_batch_of_another_size_is_refused_before_anything_changes(capacity):
    engine = Engine.make({}, True, BOTH, capacity=capacity)
    q, k, v = stream(3, 100)
    engine.feed(*(x[:2, :, :90] for x in (q, k, v)), [90])
    before = state(engine)
    with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3; start a new cache"):
        engine.call(*(x[:, :, 90:] for x in (q, k, v)))
    assert_equal(before, state(engine))


def test_a_cache_of_fixed_capacity_moves_no_tensor():
    """Captured graphs find tables, counts and pages where they were."""
    engine = Engine.make({}, True, BOTH, capacity=300)
    engine.batch.reserve(2)
    q, k, v = stream(2, 300)
    for layer in engine.layers:
        layer.initialize(torch.float32, torch.device("cpu"))
    tensors = engine.batch.tensors() + [t for layer in engine.layers for t in layer.tensors()]
    where = [t.data_ptr() for t in tensors]
    engine.feed(q, k, v, [100, 1, 1, 50, *[1] * 20])
    engine.crop(12)
    engine.feed(q, k, v, [100])
    assert [t.data_ptr() for t in engine.batch.tensors()] == where[: len(engine.batch.tensors())]
    assert where == [t.data_ptr() for t in engine.batch.tensors() + [t for x in engine.layers for t in x.tensors()]]


def test_selecting_keeps_the_capacity():
    engine = Engine.make({}, True, BOTH, capacity=300)
    q, k, v = stream(3, 300)
    engine.feed(*(x[:, :, :100] for x in (q, k, v)), [100])
    columns = [table.columns for table in engine.batch.tables.values()]
    engine.select([2, 0, 0, 1])
    assert [table.columns for table in engine.batch.tables.values()] == columns
    assert [table.host.shape[0] for table in engine.batch.tables.values()] == [4, 4]


@pytest.mark.parametrize("n", [1, 16, 17, 60])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("where", ["update", "attend", "codec"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_failed_call_is_taken_back_in_all_layers(layer, where, calibrated, n, monkeypatch):
    """Whichever layer fails, and how: the next call gives what it gives in a cache that never saw the failure."""
    windows = (None, None, None)
    engine, other = (Engine.make({}, calibrated, windows) for _ in range(2))
    q, k, v = stream(2, 400)
    for x in (engine, other):
        x.feed(*(y[:, :, :250] for y in (q, k, v)), [200, *[1] * 20, 30])
    with monkeypatch.context() as m:
        failing = engine.layers[layer]
        if where == "codec":
            spoil(m, failing, times=1)
        elif where == "update":
            m.setattr(failing, "_check_finite", fail)
            without_a_step(m, failing)
        else:
            m.setattr(failing, "_attend", fail)
            without_a_step(m, failing)
        with pytest.raises(RuntimeError, match="planted"):
            engine.call(*(x[:, :, 250 : 250 + n] + 7 for x in (q, k, v)))
    assert not engine.batch.broken and engine.lengths.totals() == [250, 250]
    assert [x.seen for x in engine.layers] == [250] * 3 and not any(x.pending or x.due for x in engine.layers)
    for x, y in zip(engine.layers, other.layers, strict=True):
        assert x.batch.lengths.packed()[0] >= y.batch.lengths.packed()[0]
    for x in (engine, other):
        x.feed(*(y[:, :, 250:] for y in (q, k, v)), [1, 1, 40, 108])
    for i in range(3):
        assert_same_state(Engine(engine.batch, engine.layers[i:]), Engine(other.batch, other.layers[i:]))


def fail(*given, **named):
    raise RuntimeError("planted")


def spoil(m, layer, times):
    """Let a layer's codec fail to pack or attend, so many times."""
    left, kept = [times], {name: getattr(PlaneCodec, name) for name in ("pack", "attend")}

    def run(name):
        def maybe(codec, kv, *given):
            mine = any(
                x is layer.pool.tensors for x in (kv, *given, *(getattr(y, "pages", None) for y in (kv, *given)))
            )
            if mine and left[0]:
                left[0] -= 1
                raise RuntimeError("planted")
            return kept[name](codec, kv, *given)

        return maybe

    for name in kept:
        m.setattr(PlaneCodec, name, run(name))
    without_a_step(m, layer)


def without_a_step(m, layer):
    """Let a layer take the general way."""
    layer.step = None
    m.setattr(layer, "prepare", lambda: None)


def test_a_codec_that_fails_again_breaks_the_cache(monkeypatch):
    """What is to be packed when a call is taken back cannot be: the cache says so."""
    engine = Engine.make({}, True, (None, None))
    q, k, v = stream(2, 400)
    engine.feed(*(x[:, :, :250] for x in (q, k, v)), [250])
    with monkeypatch.context() as m:
        spoil(m, engine.layers[1], times=2)
        with pytest.raises(RuntimeError, match="planted"):
            engine.call(*(x[:, :, 250:300] for x in (q, k, v)))
    with pytest.raises(RuntimeError, match="failed part-way"):
        engine.call(*(x[:, :, 250:300] for x in (q, k, v)))


def test_a_first_call_that_fails_leaves_an_empty_cache():
    engine = Engine.make({}, True, BOTH)
    q, k, v = stream(2, 100)
    bad = k.clone()
    bad[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="in sequence 1 from slot 0 on"):
        engine.call(q, bad, v)
    assert engine.lengths.batch == 0 == engine.lengths.seen and not engine.layer.is_initialized
    engine.feed(*stream(3, 100), [100])
    assert engine.lengths.totals() == [100] * 3


@pytest.mark.parametrize("where", [0, 1])
def test_a_long_call_that_fails_behind_a_sliding_layer_breaks_the_cache(where):
    """A sliding layer has let go of tokens for it: the cache says so until it is reset."""
    engine = Engine.make({}, True, (80, None))
    q, k, v = stream(1, 400)
    engine.feed(*(x[:, :, :200] for x in (q, k, v)), [200])
    bad = k.clone()
    bad[:, :, 250] = float("nan")
    if where == 0:
        with pytest.raises(ValueError, match="finite"):
            engine.call(*(x[:, :, 200:300] for x in (q, bad, v)))
        assert not engine.batch.broken, "no layer had run"
        engine.call(*(x[:, :, 200:300] for x in (q, k, v)))
        return
    engine.batch.begin(1, 100)
    engine.layer.update(k[:, :, 200:300], v[:, :, 200:300])
    engine.layer.attend(q[:, :, 200:300], 0.2, k[:, :, 200:300], v[:, :, 200:300])
    with pytest.raises(ValueError, match="finite"):
        engine.layers[1].update(bad[:, :, 200:300], v[:, :, 200:300])
    for act in (lambda: engine.crop(3), lambda: engine.call(q[:, :, :1], k[:, :, :1], v[:, :, :1])):
        with pytest.raises(RuntimeError, match=r"failed part-way; call reset\(\)"):
            act()
    engine.clear()
    engine.feed(q, k, v, [300, 100])
    assert engine.lengths.totals() == [400]


@pytest.mark.parametrize("held", [60, 95])
def test_a_call_that_fails_when_statistics_were_taken_breaks_the_cache(held):
    """Layers that have learned and layers that have not cannot go on together."""
    engine = Engine.make({}, False, (None, None))
    q, k, v = stream(1, 140)
    engine.feed(*(x[:, :, :held] for x in (q, k, v)), [held])
    part = slice(held, 140)
    engine.batch.begin(1, 140 - held)
    engine.layer.update(k[:, :, part], v[:, :, part])
    engine.layer.attend(q[:, :, part], 0.2, k[:, :, part], v[:, :, part])
    assert engine.lengths.packed() == [96] and engine.layer.learned == [True]
    engine.layers[1].batch.take_back()
    with pytest.raises(RuntimeError, match="failed part-way"):
        engine.batch.settle()


def test_layers_that_a_call_did_not_run_are_told_apart():
    engine = Engine.make({}, True, (None, None))
    q, k, v = stream(1, 100)
    engine.feed(*(x[:, :, :90] for x in (q, k, v)), [90])
    engine.batch.begin(1, 1)
    engine.layer.update(k[:, :, 90:91], v[:, :, 90:91])
    engine.batch.begin(1, 1)
    with pytest.raises(RuntimeError, match="a layer holds 90 tokens where others hold 91"):
        engine.layers[1].update(k[:, :, 91:92], v[:, :, 91:92])


def test_an_announced_call_must_come():
    engine = Engine.make({}, True)
    q, k, v = stream(1, 100)
    engine.feed(*(x[:, :, :90] for x in (q, k, v)), [90])
    engine.batch.begin(1, 3)
    with pytest.raises(ValueError, match="a call of 1 sequences of 3 new tokens was announced, and 1 of 2 came"):
        engine.layer.update(k[:, :, 90:92], v[:, :, 90:92])
    assert engine.lengths.totals() == [90]


def test_tables_of_sliding_windows_have_room_for_what_can_be_seen():
    engine = Engine.make({}, True, (None, 33, 80, None, 80, 12))
    tables, plan = [layer.table for layer in engine.layers], engine.lengths.schedule
    assert tables[0] is tables[3] and tables[2] is tables[4] and tables[5] is None and len(engine.batch.tables) == 3
    assert tables[0].most is None
    for sliding, table in ((33, tables[1]), (80, tables[2])):
        # the newest packed token may end a page, the oldest that a draft's rejection shows may begin one
        assert (table.most - 1) * 16 >= sliding + plan.slack


def test_metadata_is_of_the_call():
    engine = Engine.make({}, True)
    assert not engine.batch.metadata.custom
    engine.batch.begin(1, 3, metadata=CallMetadata(weights=True))
    assert engine.batch.metadata.weights
    engine.batch.begin(1, 3)
    assert engine.batch.metadata.custom and not engine.batch.metadata.weights
