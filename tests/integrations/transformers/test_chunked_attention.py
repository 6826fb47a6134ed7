"""Layers whose queries see no token before the chunk of positions that they are in: Llama 4."""

import copy

import pytest
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.cache.masks import first_visible
from headq_ao.evals.models.sweep import one
from headq_ao.evals.models.sweep_checks import OPTIONS, kernels_on, limit, noisy_cache, relative, stream
from headq_ao.evals.models.tiny import OWN, tiny_model
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.models import with_cache

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own, about configs
CHUNK = OWN["llama4_text"]["attention_chunk_size"]


def llama4(**own):
    model = tiny_model("llama4_text", "Llama4ForCausalLM", own)
    return model, copy.deepcopy(model), torch.randint(5, 100, (2, 400), generator=torch.Generator().manual_seed(0))


def calibrated(model, ids):
    quantize_(model, headq_config(calibration=calibrate(model, [ids[:, :200]], progress=False), **OPTIONS))


def test_first_visible():
    at = torch.tensor([[0, 3, 4, 7, 8]])
    assert first_visible(at, 4, True).tolist() == [[0, 0, 4, 4, 8]]
    assert first_visible(at, 4).tolist() == [[0, 0, 1, 4, 5]]
    assert first_visible(at, None).tolist() == [[0] * 5]


def test_shapes_say_which_layers():
    shapes = layer_shapes(llama4()[0].config)
    assert [(s.sliding_window, s.chunked) for s in shapes] == [(CHUNK, True), (None, False)]


@pytest.mark.parametrize("name", ["llama4", "llama4_text"])
def test_the_checks_of_the_sweep(name):
    found = one("causal", name)
    assert (found["kind"], found["wrong"]) == ("native", []), found


# up to the end of a chunk and beyond it; calls over one end, over several, of one chunk, of a chunk and one token
@pytest.mark.parametrize(
    "sizes", [[96, *[1] * 60], [2 * CHUNK, 1, 1, 1], [90, 20, 100, 1], [CHUNK] * 4, [CHUNK + 1, CHUNK - 1, 1, 5, 17]]
)
@pytest.mark.parametrize("pads", [0, 11])
@pytest.mark.parametrize("compiled_kernels", [False, True])
def test_ends_of_chunks(sizes, pads, compiled_kernels):
    model, dense, ids = llama4()
    mask = torch.ones_like(ids[:, : sum(sizes)])
    mask[0, :pads] = 0
    exact = stream(dense, ids, DynamicCache(config=dense.config), sizes, mask)[mask != 0][None]
    control = relative(stream(dense, ids, noisy_cache(dense, 0), sizes, mask)[mask != 0][None], exact)
    calibrated(model, ids)
    with kernels_on(compiled_kernels):
        got = stream(model, ids, HeadQCache(model), sizes, mask)[mask != 0][None]
    assert relative(got, exact) <= limit(control)


def test_a_mask_that_hides_cached_tokens_is_refused():
    """transformers takes its zeros for padding, and moves the ends of chunks."""
    model, _, ids = llama4()
    calibrated(model, ids)
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :100], **with_cache(cache))
        mask = torch.ones_like(ids[:, :101])
        mask[0, :7] = 0
        with pytest.raises(ValueError, match="hides tokens that are cached, and in layers of chunked attention"):
            model(ids[:, 100:101], attention_mask=mask, **with_cache(cache))
        assert cache.get_seq_length() == 100
        model(ids[:, 100:101], attention_mask=torch.ones_like(mask), **with_cache(cache))


def test_a_window_that_slides_would_be_seen():
    """By the error that these tests allow."""
    model, dense, ids = llama4()
    calibrated(model, ids)
    for layer in (cache := HeadQCache(model)).packed:
        layer.shape = layer.shape.__class__(**vars(layer.shape) | {"chunked": False})
    exact = stream(dense, ids, DynamicCache(config=dense.config), [2 * CHUNK + 5, *[1] * 8])
    state = model._headq
    state.shapes[:] = [layer.shape for layer in cache.packed]
    assert relative(stream(model, ids, cache, [2 * CHUNK + 5, *[1] * 8])[:, -8:], exact[:, -8:]) > 0.05


def test_weights_and_counts():
    model, dense, ids = llama4(attn_implementation="eager")
    calibrated(model, ids)
    cache, plain = HeadQCache(model), DynamicCache(config=dense.config)
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        for part in ids[:, :130].split([100, 30], 1):
            got, exact = (
                who(part, **with_cache(held), output_attentions=True).attentions[0]
                for who, held in ((model, cache), (dense, plain))
            )
    width = exact.shape[-1]
    torch.testing.assert_close(got[..., -width:], exact, atol=0.01, rtol=0.02)
    seen = sum(sum(p % CHUNK + 1 for p in range(130)) + 130 * 131 // 2 for _ in range(2))
    assert cache.rows_read[1] == seen


def test_in_a_graph():
    model, dense, ids = llama4()
    calibrated(model, ids)
    sizes = [90, 20, *[1] * 40]
    exact = stream(dense, ids, DynamicCache(config=dense.config), sizes)
    control = relative(stream(dense, ids, noisy_cache(dense, 0), sizes), exact)
    torch.compiler.reset()
    compiled, cache = torch.compile(model, backend="eager", fullgraph=True), HeadQCache(model, 256, 2)
    with torch.no_grad():
        got = torch.cat(
            [compiled(part, **with_cache(cache)).logits for part in ids[:, : sum(sizes)].split(sizes, 1)], 1
        )
    assert relative(got, exact) <= limit(control)


def conversed(forward, cache, ids, sizes, mask):
    """Logits of real tokens; with position ids, as ``generate`` passes them, a model is not given the mask."""
    at, found = 0, []
    with torch.no_grad():
        for n in sizes:
            of_call = slice(at, at + n)
            given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, of_call]}
            given |= {} if bool(mask.all()) else {"attention_mask": mask[:, : at + n]}
            found.append(forward(ids[:, of_call], **given, **with_cache(cache)).logits)
            at += n
    return torch.cat(found, 1)[mask != 0][None]


ROUTES = {
    "called": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "in a compiled function": lambda model: torch.compile(
        lambda ids, **given: model(input_ids=ids, **given), backend="eager", fullgraph=True
    ),
}


# calls over an end of a chunk that is another one where slots, or the call's own, are counted; longer than a chunk
@pytest.mark.parametrize("sizes", [[90, 20, 1, 1], [70, 100], [2 * CHUNK - 1, 2]])
@pytest.mark.parametrize("pads", [0, 11])
@pytest.mark.parametrize("route", ROUTES)
def test_chunks_begin_at_tokens(sizes, pads, route):
    model, dense, ids = llama4()
    ids = ids[:, : sum(sizes)]
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    exact, noisy = (
        conversed(dense, cache, ids, sizes, mask)
        for cache in (DynamicCache(config=dense.config), noisy_cache(dense, 0))
    )
    calibrated(model, ids)
    torch.compiler.reset()
    got = conversed(ROUTES[route](model), HeadQCache(model, 256, 2), ids, sizes, mask)
    assert relative(got, exact) <= limit(relative(noisy, exact))


def test_a_crop_over_an_end_of_a_chunk():
    model, dense, ids = llama4()
    calibrated(model, ids)
    n = 2 * CHUNK + 1
    cache = HeadQCache(model)
    stream(model, ids, cache, [n - 3, 1, 1, 1])
    cache.crop(-3)
    again = stream(model, ids[:, n - 3 :], cache, [3])
    exact = stream(dense, ids, DynamicCache(config=dense.config), [n])[:, -3:]
    assert float((again - exact).norm() / exact.norm()) < 0.01
