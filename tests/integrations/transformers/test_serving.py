"""How a model's cache is served: natively, or packed in memory and dequantized for the model's own attention."""

import pytest
import torch

from headq_ao import headq_config, quantize_
from headq_ao.cache.tiling import storable
from headq_ao.integrations.transformers import serving as module
from headq_ao.integrations.transformers.fallback import Rows
from headq_ao.integrations.transformers.serving import as_observed, fallback, other_dim, serving_of
from headq_ao.layer_shape import LayerShape


def row(keys, values=None, place=0, sliding=None):
    return Rows(place, keys, keys if values is None else values, sliding)


@pytest.mark.parametrize(
    ("dims", "fits"),
    [
        ((16, None), True),
        ((256, None), True),
        ((24, None), False),
        ((512, None), True),
        ((528, None), False),
        ((64, 128), True),
        ((64, 40), False),
    ],
)
def test_heads_that_codes_are_made_for(dims, fits):
    assert storable(LayerShape(1, 1, dims[0], None, dims[1])) is fits


def test_layers_that_read_packed_tokens(tiny):
    model = tiny("gemma3", 32)
    found = serving_of(model)
    assert found.fallback is None and found.places == [0, 1] and found.tilings == []
    assert found.modules == [layer.self_attn for layer in model.model.layers]
    assert [s.sliding_window for s in found.shapes] == [100, None]


def test_heads_of_another_size_fall_back_unless_any_will_do(tiny):
    """With the sizes in the reason; a codec in plain PyTorch takes them as they are."""
    model = tiny(head_dim=24)
    before = {name: id(x) for name, x in vars(model).items()}
    found = serving_of(model)
    assert found.fallback == (
        "LlamaForCausalLM: packed tokens are read with a head_dim of a multiple of 16 up to 512, got [24]"
    )
    assert found.modules == [] and len(found.tilings) == 2 and all(map(storable, found.shapes))
    assert serving_of(model, any_dim=True).fallback is None
    assert serving_of(model, any_dim=True).shapes[0].head_dim == 24
    assert {name: id(x) for name, x in vars(model).items()} == before, "it is not changed"


def test_a_quantized_model_is_served_as_it_is(tiny):
    model = tiny()
    quantize_(model, headq_config())
    assert serving_of(model) is model._headq.serving


def test_what_no_cache_serves_is_refused(tiny):
    with pytest.raises(ValueError, match="PreTrainedModel, got Linear"):
        serving_of(torch.nn.Linear(2, 2))


def test_neither_way_says_why_of_both(tiny, monkeypatch):
    def none(model):
        raise ValueError("no rows were seen")

    monkeypatch.setattr(module, "observed_rows", none)
    with pytest.raises(ValueError, match=r"got \[24\]; nor can its cache give dequantized rows: no rows were seen"):
        serving_of(tiny(head_dim=24))


def test_shapes_that_were_seen_and_not_told(tiny, monkeypatch):
    """Native where they are heads of a size that codes have; else no word of why, or attention's own."""
    model, asked = tiny(), []

    def layers(model, shapes):
        asked.append(shapes)
        return shapes, ["modules"]

    monkeypatch.setattr(module, "supported_layers", layers)
    rows = [row((2, 32)), row((4, 64), (4, 32), place=2, sliding=50)]
    native, told = as_observed(model, rows)
    assert told is None and native.places == [0, 2] and native.modules == ["modules"]
    assert asked == [[LayerShape(2, 2, 32, None), LayerShape(4, 4, 64, 50, 32)]]
    assert as_observed(model, [row((2, 32), (4, 32))]) == as_observed(model, [row((2, 24))]) == (None, None)

    def refused(model, shapes):
        raise ValueError("its attention adds a bias")

    monkeypatch.setattr(module, "supported_layers", refused)
    assert as_observed(model, rows) == (None, "its attention adds a bias")


def test_the_fallbacks_heads_are_cut_to_size():
    found = fallback([row((3, 40), place=4, sliding=20)], "Model is not supported: it adds a bias")
    (shape,), (tiling,) = found.shapes, found.tilings
    assert found.fallback == "Model: it adds a bias" and found.places == [4] and found.modules == []
    assert storable(shape) and shape.sliding_window == 20 and shape == tiling.shape(20)
    assert other_dim(row((2, 64), (2, 32))) == 32 and other_dim(row((2, 64))) is None
