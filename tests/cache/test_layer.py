"""One layer: crops, what an update returns, and pages that are counted once."""

import pytest

from headq_ao.cache.tensors import QuantizedKV
from tests.cache.streams import HKV, D, stream
from tests.cache.test_invariants import make


@pytest.mark.parametrize("case", ["window", "window calibrated", "short window"])
def test_crops_that_a_sliding_layer_cannot_serve(case):
    """Sixteen always, more where pages happen to have them; refused before anything changes."""
    engine = make(case)
    engine.feed(*stream(2, 300), [300])
    before = engine.lengths.packed()
    with pytest.raises(RuntimeError, match=r"cannot crop 150 tokens: a sliding-window layer holds what a crop of 16"):
        engine.crop(150)
    assert engine.lengths.totals() == [300, 300] and engine.lengths.packed() == before
    for _ in range(5):
        engine.crop(16)
        engine.feed(*stream(2, 16), [16])


def test_update_returns_all_tokens():
    engine = make("calibrated")
    q, k, v = stream(2, 200)
    engine.feed(*(x[:, :, :150] for x in (q, k, v)), [150])
    engine.batch.begin(2, 3)
    keys, values = engine.layer.update(k[:, :, 150:153], v[:, :, 150:153])
    for x, side in ((keys, "key"), (values, "value")):
        assert isinstance(x, QuantizedKV) and x.shape == (2, HKV, 153, D) and x.side == side and x.layer is engine.layer
    assert keys.new.data_ptr() == k[:, :, 150:153].data_ptr()


def test_distinct_tokens_count_shared_pages_once():
    engine = make("calibrated")
    engine.feed(*stream(), [300])
    assert engine.layer.distinct(engine.lengths.packed()) == 264
    engine.select([0] * 16)
    assert engine.layer.distinct(engine.lengths.packed()) == 256 + 16 * 8
