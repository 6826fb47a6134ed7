"""Real pixels in a first and in a later call: the sweep's checks, short turns, graphs, ``generate``."""

import copy

import pytest
import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.evals.models.pixels import IMAGE, PICTURES, ROWS, conversation, conversed, turn
from headq_ao.evals.models.sweep import entries, one
from headq_ao.evals.models.sweep_checks import OPTIONS, limit, noisy_cache, relative
from headq_ao.evals.models.tiny import tiny_model
from headq_ao.integrations.transformers.models import rotary_embedding, with_cache

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own, about configs, kernels and padding


def vlm(name, side):
    model = tiny_model(*entries("pixels")[name], PICTURES[name].config(side))
    return model, copy.deepcopy(model), PICTURES[name]


@pytest.mark.parametrize("name", PICTURES)
def test_images_in_a_first_and_in_a_later_call(name):
    found = one("pixels", name)
    assert (found["kind"], found["wrong"]) == ("native", []), found


@pytest.mark.parametrize("name", ["gemma3", "gemma4_unified", "molmo2", "paligemma", "paligemma 2"])
def test_turns_shorter_than_the_slack_of_the_ring(name):
    """Their tokens are packed as they come, before attention; left padding too."""
    model, dense, pictures = vlm(name, 2)
    generator = torch.Generator().manual_seed(1)
    calls = [turn(pictures, None, 2, generator, 100, 40)]
    for _ in range(4):
        calls.append(turn(pictures, calls[-1][pictures.types], 2, generator, 3, 4))
    ids = torch.randint(5, 100, (2, 200), generator=generator)
    quantize_(model, headq_config(calibration=calibrate(model, [ids], progress=False), **OPTIONS))
    for pads in (0, 11):
        exact = conversed(dense, calls, DynamicCache(config=dense.config), pads)
        control = relative(conversed(dense, calls, noisy_cache(dense, 0), pads), exact)
        assert relative(conversed(model, calls, HeadQCache(model), pads), exact) <= limit(control)


@pytest.mark.parametrize("compiled_by_caller", [False, True])
def test_image_blocks_of_a_later_call_in_a_graph(compiled_by_caller):
    """Types of all slots are read by the slots' places, of which a graph's mask of the new ones knows nothing."""
    model, dense, pictures = vlm("gemma3", 4)
    generator = torch.Generator().manual_seed(3)
    calls = [turn(pictures, None, 4, generator)]
    calls.append(turn(pictures, calls[0][pictures.types], 4, generator, 10, 20))
    calls = [{"input_ids": call["input_ids"].clamp(max=110), pictures.types: call[pictures.types]} for call in calls]
    calls += [{"input_ids": torch.full((ROWS, 1), 7)}] * 2
    exact = conversed(dense, calls, DynamicCache(config=dense.config))
    shifted = [calls[0], calls[1] | {pictures.types: calls[1][pictures.types].roll(10, 1)}, *calls[2:]]
    assert relative(conversed(dense, shifted, DynamicCache(config=dense.config)), exact) > 0.05
    ids = torch.randint(5, 100, (2, 200), generator=generator)
    quantize_(model, headq_config(calibration=calibrate(model, [ids], progress=False), **OPTIONS))
    torch.compiler.reset()

    def call_it(cache, **kwargs):
        return model(**kwargs, **with_cache(cache))

    compiled = torch.compile(call_it if compiled_by_caller else model, backend="eager", fullgraph=True)

    def run(**kwargs):
        kwargs.pop("use_cache")
        return compiled(**kwargs)

    got = conversed(run, calls, HeadQCache(model, max_length=256, batch_size=ROWS))
    assert relative(got, exact) < 0.01


def test_a_first_call_is_one_where_room_was_made_before():
    """Molmo2 asks its cache whether it is initialized, and has blocks of images in the first call without pixels."""
    model, dense, pictures = vlm("molmo2", 4)
    call = conversation(pictures, (4,))[0]
    kwargs = {"inputs_embeds": model.get_input_embeddings()(call["input_ids"]), pictures.types: call[pictures.types]}
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model, max_length=200, batch_size=ROWS)
    with torch.no_grad():
        assert not cache.is_initialized
        exact = dense(**kwargs, **with_cache(DynamicCache(config=dense.config))).logits
        causal = dense(inputs_embeds=kwargs["inputs_embeds"]).logits
        got = model(**kwargs, **with_cache(cache)).logits
    assert relative(causal, exact) > 0.05
    assert relative(got, exact) < 1e-5
    assert cache.is_initialized


@pytest.mark.parametrize("name", ["gemma3", "llava_onevision", "paligemma 2"])  # Qwen3-VL wants all images again
def test_generate_with_a_second_image(name):
    model, dense, pictures = vlm(name, 4)
    generator = torch.Generator().manual_seed(3)
    first, second = (turn(pictures, None, 4, generator) for _ in range(2))
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)

    def talk(who, cache):
        begun = who.generate(**first, **with_cache(cache), **options)
        ids = torch.cat([begun.sequences, second["input_ids"]], 1)
        told = {pictures.types: torch.where(ids == IMAGE, *pictures.is_image)} if pictures.types else {}
        return torch.stack(who.generate(**second | {"input_ids": ids} | told, **with_cache(cache), **options).logits, 1)

    exact = talk(dense, DynamicCache(config=dense.config))[:, :1]
    control = talk(dense, noisy_cache(dense, 0))[:, :1]
    quantize_(model, headq_config(**OPTIONS))
    got = talk(model, HeadQCache(model))[:, :1]
    error, noise = (float((x - exact).norm() / exact.norm()) for x in (got, control))
    assert error <= limit(noise), (error, noise)


def test_a_vision_tower_is_no_part_of_the_decoder():
    model, _, _ = vlm("gemma4", 4)
    names = [name for name, module in model.named_modules() if module is rotary_embedding(model)]
    assert names == ["model.language_model.rotary_emb"]


@pytest.mark.parametrize("name", ["paligemma", "paligemma 2"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_prefix_without_types(name, weights):
    """A first call that tells no types is a prefix as a whole where the model hands no mask to attention; a later one
    is causal. So it is with transformers' own cache."""
    model, dense, _ = vlm(name, 2)
    ids = torch.randint(5, 100, (ROWS, 60), generator=torch.Generator().manual_seed(0))
    parts = ids.split([40, 19, 1], 1)
    if weights:
        dense.set_attn_implementation("sdpa" if name == "paligemma" else "eager")
    quantize_(model, headq_config(residual_length=64))  # nothing is packed: all must agree

    def run(who, cache, **more):
        with torch.no_grad():
            return [who(input_ids=part, **with_cache(cache), use_cache=True, **more) for part in parts]

    exact, cache = run(dense, DynamicCache(config=dense.config)), HeadQCache(model)
    got = run(model, cache, output_attentions=weights)
    assert cache.packed_fraction == 0
    for mine, theirs in zip(got, exact, strict=True):
        assert relative(mine.logits, theirs.logits) < 1e-5
    if weights:
        above = got[0].attentions[0].triu(1).any()
        assert bool(above) == (name == "paligemma")


def test_types_that_a_graph_cannot_tell_are_refused():
    """Of a sliding window a graph shows what is causal; PaliGemma 2 shows tokens of a block before it."""
    model, _, pictures = vlm("paligemma 2", 4)
    generator = torch.Generator().manual_seed(3)
    calls = [turn(pictures, None, 4, generator)]
    calls.append(turn(pictures, calls[0][pictures.types], 4, generator, 10, 20))
    calls = [{"input_ids": call["input_ids"].clamp(max=110), pictures.types: call[pictures.types]} for call in calls]
    ids = torch.randint(5, 100, (2, 200), generator=generator)
    quantize_(model, headq_config(calibration=calibrate(model, [ids], progress=False), **OPTIONS))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    cache = HeadQCache(model, max_length=256, batch_size=ROWS)
    with torch.no_grad():
        compiled(**calls[0], **with_cache(cache))
        with pytest.raises(ValueError, match="shows of a sliding window what is causal"):
            compiled(**calls[1], **with_cache(cache))
