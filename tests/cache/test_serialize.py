"""What a cache holds as tensors and plain data, and back."""

import json

import pytest
import torch

from headq_ao.cache.schedule import Span
from headq_ao.cache.serialize import batch_from_data, batch_to_data, layer_from_tensors, layer_to_tensors
from tests.cache.streams import CPU, Engine, HeadBits, stream
from tests.cache.test_invariants import assert_same_state

KINDS = {
    "calibrated": ({}, True),
    "uncalibrated": ({}, False),
    "awaiting statistics": ({"epoch_tokens": 512}, False),
    "side code": ({"rank": 8}, False),
    "affine": ({"key_codec": "affine", "value_codec": "affine"}, False),
    "bits by head": ({"head_bits": HeadBits((3, 1), (2, 5)), "block_size": 32}, True),
    "keys only": ({"v_bits": None}, True),
    "values only": ({"k_bits": None}, False),
}
WINDOWS = (None, 80, 20)
SPANS = [Span(0, 230), Span(100, 230), Span(0, 40)]


def written(engine):
    """As a file has it."""
    data = json.loads(json.dumps(batch_to_data(engine.batch)))
    layers = [layer_to_tensors(layer) for layer in engine.layers]
    return data, [({n: t.clone() for n, t in x.items()}, json.loads(json.dumps(y))) for x, y in layers]


def read(engine, data, layers):
    batch_from_data(engine.batch, data)
    for layer, (tensors, description) in zip(engine.layers, layers, strict=True):
        layer_from_tensors(layer, description, tensors, CPU)
    return engine


def filled(kind, capacity=None, ragged=True):
    options, calibrated = KINDS[kind]
    engine, parts = Engine.make(options, calibrated, WINDOWS, capacity=capacity), stream(3, 400)
    engine.call(*(x[:, :, :230] for x in parts), SPANS if ragged else None)
    engine.feed(*(x[:, :, 230:300] for x in parts), [1, 1, 40, 28])
    return engine, [x[:, :, 300:] for x in parts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cropped", [0, 9, 16])
def test_what_is_read_goes_on_as_what_was_written(kind, cropped):
    """Bit for bit: attention, codes, counts of reads."""
    engine, rest = filled(kind)
    if cropped:
        engine.crop(cropped)
    options, calibrated = KINDS[kind]
    made = read(Engine.make(options, calibrated, WINDOWS), *written(engine))
    assert [x.tokens_read for x in made.layers] == [x.tokens_read for x in engine.layers]
    assert (made.lengths.totals(), made.lengths.seen) == (engine.lengths.totals(), engine.lengths.seen)
    at = 0
    for n in (1, 1, 7, 16, 17, 1, 50):
        outs = [x.call(*(y[:, :, at : at + n] for y in rest)) for x in (engine, made)]
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True)), n
        at += n
    assert [x.tokens_read for x in made.layers] == [x.tokens_read for x in engine.layers]
    for i in range(3):
        for b in range(3):
            one, other = (Engine(x.batch, x.layers[i:]) for x in (engine, made))
            assert_same_state(one, other, b, b)


@pytest.mark.parametrize("kind", KINDS)
def test_files_have_no_unused_room(kind):
    engine, _ = filled(kind)
    data, layers = written(engine)
    for layer, (tensors, _) in zip(engine.layers, layers, strict=True):
        pages = [t for n, t in tensors.items() if n.startswith("page.")]
        most = max(engine.lengths.packed()) if layer.packs else 0
        columns = min(-(-most // engine.batch.page_tokens), layer.table.columns) if layer.packs else 0
        assert all(t.shape[0] == 3 * columns for t in pages) and bool(pages) == (columns > 0)
        assert tensors["window.k"].shape[2] == min(max(engine.lengths.totals()), 4 + layer.window.ring)
        assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in tensors.values())
    assert data["tokens"] == [300, 200, 110]


def test_shared_pages_are_read_back():
    engine, rest = filled("calibrated", ragged=False)
    engine.select([0, 0, 1, 1])
    made = read(Engine.make({}, True, WINDOWS), *written(engine))
    rest = [x[[0, 0, 1, 1]] for x in rest]
    outs = [x.feed(*(y[:, :, :60] for y in rest), [1, 9, 50]) for x in (engine, made)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("capacity", [None, 320, 1000])
def test_into_a_cache_of_fixed_capacity(capacity):
    engine, rest = filled("calibrated")
    made = read(Engine.make({}, True, WINDOWS, capacity=capacity), *written(engine))
    outs = [x.feed(*(y[:, :, :15] for y in rest), [1, 9, 5]) for x in (engine, made)]
    assert torch.equal(*outs)


def test_a_cache_that_is_too_small_is_refused():
    engine, _ = filled("calibrated")
    with pytest.raises(ValueError, match="it holds 300 tokens, and there is room for 299"):
        read(Engine.make({}, True, WINDOWS, capacity=299), *written(engine))


COUNTS = {
    "a list is short": lambda d: d["pads"].pop(),
    "a negative count": lambda d: d["tokens"].__setitem__(1, -1),
    "no number": lambda d: d["ring_low"].__setitem__(0, "1"),
    "more packed than there are": lambda d: d["packed"].__setitem__(2, 500),
    "more tokens than slots": lambda d: d.update(slots=250),
    "no sequence": lambda d: d.update({n: [] for n in ("tokens", "pads", "packed", "ring_low", "highest")}),
    "packed below the ring": lambda d: d["ring_low"].__setitem__(0, d["packed"][0] + 1),
    "a small table": lambda d: d["columns"].update(full=1),
    "no columns": lambda d: d["columns"].update(full="9"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_do_not_fit_are_refused(name):
    engine, _ = filled("calibrated")
    data, layers = written(engine)
    COUNTS[name](data)
    with pytest.raises(ValueError, match=r"counts of tokens are not usable|have no room"):
        read(Engine.make({}, True, WINDOWS), data, layers)


LAYERS = {
    "other pages": (lambda t, d: d.update(layout="x"), "its pages have the form"),
    "a small ring": (lambda t, d: d.update(ring=3), "must hold at least 48 tokens, got 3"),
    "a fraction": (lambda t, d: d.update(ring=64.5), "must hold at least 48 tokens, got 64.5"),
    "statistics of others": (lambda t, d: d["learned"].pop(), "which sequences have statistics"),
    "no window": (lambda t, d: t.pop("window.v"), "lacks full-precision tokens"),
    "a window of another shape": (lambda t, d: t.update({"window.k": t["window.k"][:, :1]}), "window.k must be"),
    "pages of another shape": (lambda t, d: t.update({"page.0": t["page.0"][1:]}), "page.0 must be"),
    "statistics that a calibration has not": (lambda t, d: t.update({"own.key.mean": t["window.k"]}), "keeps nothing"),
    "no such dtype": (lambda t, d: d.update(dtype="floaty"), "floaty"),
    "a page is missing": (lambda t, d: t.pop("page.1"), "page.1"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_do_not_fit_are_refused(name):
    spoil, message = LAYERS[name]
    engine, _ = filled("calibrated")
    data, layers = written(engine)
    spoil(*layers[0])
    with pytest.raises((ValueError, KeyError, AttributeError), match=message):
        read(Engine.make({}, True, WINDOWS), data, layers)
