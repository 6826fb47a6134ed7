"""How a layer is read: the step that is put together once, and all tokens in their order."""

import copy

import pytest

from headq_ao.cache.schedule import Span
from tests.cache.streams import relative, stream
from tests.cache.test_invariants import CASES, assert_same_state, make


def test_a_step_is_put_together_once(monkeypatch):
    """The same plan serves step after step; whatever changes what it stands on makes another."""
    engine = make("calibrated")
    q, k, v = stream(2, 300)
    engine.feed(*(x[:, :, :200] for x in (q, k, v)), [199, 1])
    layer, step = engine.layer, engine.layer.step
    assert step is not None
    monkeypatch.setattr(type(layer), "append", None)
    monkeypatch.setattr(type(layer), "_attend", None)
    engine.feed(*(x[:, :, 200:206] for x in (q, k, v)), [1] * 6)
    assert layer.step is step
    columns = layer.table.columns
    engine.feed(*(x[:, :, 206:280] for x in (q, k, v)), [1] * 74)
    assert layer.step is step and layer.table.columns > columns, "it follows pages that grow"
    engine.crop(74)
    monkeypatch.undo()
    engine.crop(3)
    engine.feed(*(x[:, :, 203:204] for x in (q, k, v)), [1])
    assert layer.step is step, "a crop moves nothing"
    engine.select([1, 0])
    assert layer.step is step, "as many sequences are reordered where they lie"
    engine.select([0, 1, 1])
    engine.select([0, 1])
    assert layer.step is None
    engine.feed(*(x[:, :, 204:206] for x in (q, k, v)), [1, 1])
    assert layer.step not in (None, step)


def test_a_prompt_prepares_the_first_step(monkeypatch):
    """No decoding step takes longer because it is the first: it finds what it needs."""
    engine = make("calibrated")
    q, k, v = stream(2, 210)
    engine.feed(*(x[:, :, :200] for x in (q, k, v)), [200])
    step = engine.layer.step
    assert step is not None
    monkeypatch.setattr(type(engine.layer), "prepare", None)
    engine.feed(*(x[:, :, 200:] for x in (q, k, v)), [1] * 10)
    assert engine.layer.step is step


def test_steps_are_those_of_the_general_way(monkeypatch):
    """Prepared or not: the same attention, the same codes, through many pages and growth."""
    outs, engines = [], []
    for prepared in (True, False):
        engine = make("calibrated")
        if not prepared:
            monkeypatch.setattr(type(engine.layer), "prepare", lambda self: None)
        q, k, v = stream(2, 300)
        outs.append(engine.feed(q, k, v, [40, *[1] * 260]))
        assert (engine.layer.step is not None) == prepared
        engines.append(engine)
    assert relative(*outs) < 1e-6
    for b in (0, 1):
        assert_same_state(*engines, b, b)
    assert engines[0].layer.tokens_read == engines[1].layer.tokens_read


def test_a_model_that_moves_makes_another_step():
    engine = make("calibrated")
    q, k, v = stream(1, 300)
    engine.feed(*(x[:, :, :200] for x in (q, k, v)), [199, 1])
    layer, step = engine.layer, engine.layer.step
    layer.source = copy.deepcopy(layer.source)
    layer.step = step._replace(place=layer.source._buffers)
    engine.feed(*(x[:, :, 200:202] for x in (q, k, v)), [1, 1])
    assert layer.step is not step and layer.step.found is layer.source._buffers[step.name]


def test_tokens_in_order():
    """Keys, values and positions as attention reads them; a sliding layer has those that it still shows."""
    q, k, v = stream(2, 300)
    for case in ("calibrated", "window calibrated", "short window"):
        options, calibrated, window = CASES[case]
        engine = make((options, calibrated and "alike", window), k_bits=8, v_bits=8)
        engine.feed(q, k, v, [250, 50])
        keys, values, position = engine.layer.in_order()
        first = 0 if CASES[case][2] is None else 300 - CASES[case][2] + 1
        assert set(range(first, 300)) <= set(position.tolist()) and position.tolist() == sorted({*position.tolist()})
        shown = position >= first
        assert relative(keys[:, :, shown], k[:, :, position[shown]]) < 0.05
        assert relative(values[:, :, shown], v[:, :, position[shown]]) < 0.05
    engine = make("calibrated")
    engine.call(q, k, v, [Span(0, 300), Span(1, 300)])
    with pytest.raises(ValueError, match="sequences differ in length"):
        engine.layer.in_order()
