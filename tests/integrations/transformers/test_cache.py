"""Cache objects in the hands of users: copies, pickles, small mistakes; nothing is left half-changed."""

import copy
import os
import pickle

import pytest
import torch

from headq_ao import Calibration, HeadQCache, calibrate
from tests.conftest import build_tiny


@torch.no_grad()
def filled(model, ids):
    cache = HeadQCache(model)
    model(ids, cache=cache)
    return cache


@torch.no_grad()
def following(model, cache, ids):
    return torch.cat([model(part, cache=cache).logits for part in ids.split([20] + [1] * 20, 1)], 1)


def contents(cache):
    """All that a failed call must leave as it was."""
    lengths = cache.batch.lengths
    layers = [[x.seen for x in cache.layers], lengths.totals(), lengths.packed(), lengths.trailing_pads()]
    return layers, [t.clone() for t in cache.tensors()], cache.batch_size


def assert_unchanged(cache, before):
    after = contents(cache)
    assert after[0] == before[0] and after[2] == before[2]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))


# Pickles and copies
@pytest.mark.parametrize(
    "write", [pickle.dumps, lambda c: torch.save({"cache": c}, os.devnull)], ids=["pickle", "torch"]
)
def test_a_pickle_is_refused_by_name(model, token_ids, write):
    for cache in (HeadQCache(model), filled(model, token_ids(1, 100))):
        before = contents(cache)
        with pytest.raises(TypeError, match=r"cannot be pickled: .*cache.save\(path\).*HeadQCache.load\(path, model\)"):
            write(cache)
        assert_unchanged(cache, before)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda c: copy.deepcopy({"a": c})["a"]], ids=["cache", "within"])
def test_deep_copies_go_on_alike_and_apart(model, token_ids, tmp_path, make):
    cache = filled(model, token_ids(1, 150))
    branch = make(cache)
    before = contents(cache)
    assert branch.layers[0].batch is branch.batch is not cache.batch
    for layer, own in zip(cache.packed, branch.packed, strict=True):
        assert (layer.step is None) == (own.step is None) and (own.step is not layer.step or own.step is None)
    out = following(model, branch, token_ids(1, 40, seed=1))
    assert_unchanged(cache, before)
    assert torch.equal(following(model, cache, token_ids(1, 40, seed=1)), out)
    branch.save(tmp_path / "c")
    assert HeadQCache.load(tmp_path / "c", model).get_seq_length() == 190
    again = copy.deepcopy([cache, cache])
    assert again[0] is again[1]


def test_a_shallow_copy_shares_its_layers(model, token_ids):
    cache = filled(model, token_ids(1, 100))
    other = copy.copy(cache)
    assert other.layers is cache.layers and other.batch is cache.batch


# Crops and selections
def half_failed(model, cache, ids):
    """A call that fails before the attention of its second layer."""

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        model(ids, cache=cache)
    hook.remove()


def test_crop_after_a_failed_call(model, token_ids):
    cache = filled(model, token_ids(1, 100))
    half_failed(model, cache, token_ids(1, 3))
    before = contents(cache)
    with pytest.raises(RuntimeError, match=r"cannot crop: .* layers hold 100 to 103 tokens; call reset\(\)"):
        cache.crop(-3)
    assert_unchanged(cache, before)
    cache.reset()
    assert torch.equal(following(model, cache, token_ids(1, 40)), following(model, HeadQCache(model), token_ids(1, 40)))


MISTAKES = {
    "crop 5": (lambda c: c.crop(5), r"negative number.*got 5; crop\(-5\) removes the last 5"),
    "crop 1.5": (lambda c: c.crop(-1.5), "whole number, minus the tokens to remove, got -1.5"),
    "crop None": (lambda c: c.crop(None), "whole number, minus the tokens to remove, got None"),
    "index 2": (lambda c: c.batch_select_indices(torch.tensor([0, 2])), r"sequences 0 to 1 held, got \[0, 2\]"),
    "index -1": (lambda c: c.batch_select_indices(torch.tensor([-1])), r"sequences 0 to 1 held, got \[-1\]"),
    "no index": (lambda c: c.batch_select_indices(torch.tensor([], dtype=torch.long)), r"at least one .*, got \[\]"),
    "all masked": (lambda c: c.batch_select_indices(torch.tensor([False, False])), r"at least one .*, got \[\]"),
    "mask of 3": (
        lambda c: c.batch_select_indices(torch.ones(3, dtype=torch.bool)),
        r"a mask \[2\] .* torch.bool \(3,\)",
    ),
    "two dims": (lambda c: c.batch_select_indices(torch.zeros(1, 2, dtype=torch.long)), r"torch.int64 \(1, 2\)"),
    "fractions": (lambda c: c.reorder_cache(torch.tensor([0.0, 1.0])), r"whole numbers \[n\].*torch.float32 \(2,\)"),
    "beam 5": (lambda c: c.reorder_cache(torch.tensor([0, 5])), r"sequences 0 to 1 held, got \[0, 5\]"),
    "repeats 0": (lambda c: c.batch_repeat_interleave(0), "repeats must be a whole number of at least 1, got 0"),
    "repeats 1.5": (lambda c: c.batch_repeat_interleave(1.5), "repeats must be a whole number of at least 1, got 1.5"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_with_a_filled_cache(model, token_ids, name):
    cache = filled(model, token_ids(2, 100))
    call, message = MISTAKES[name]
    before = contents(cache)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert_unchanged(cache, before)
    with torch.no_grad():
        model(token_ids(2, 4), cache=cache)


def test_a_new_cache_takes_all_of_it(model):
    cache = HeadQCache(model)
    assert cache.get_seq_length() == 0 and cache.batch_size is None and cache.get_memory_footprint() == 0
    cache.crop(-5)
    cache.reset()
    cache.batch_select_indices(torch.tensor([3]))
    cache.batch_repeat_interleave(4)
    assert cache.get_seq_length() == 0 and cache.batch_size is None


@pytest.mark.parametrize("empty", [lambda c: c.reset(), lambda c: c.crop(-100), lambda c: c.crop(-1000)])
def test_an_emptied_cache_is_a_new_one(model, token_ids, empty):
    """Also for another batch size."""
    cache = filled(model, token_ids(2, 100))
    empty(cache)
    assert cache.get_seq_length() == 0 and cache.batch_size is None and cache.get_memory_footprint() == 0
    ids = token_ids(3, 40)
    assert torch.equal(following(model, cache, ids), following(model, HeadQCache(model), ids))


def test_what_a_cache_is_made_for(model, tmp_path):
    for wrong, message in (
        (build_tiny(), r"LlamaForCausalLM has no HeadQ config; call quantize_\(model, headq_config\(\)\) first"),
        (torch.nn.Linear(2, 2), "Linear has no HeadQ config"),
        (torch.nn.ModuleList([model, copy.deepcopy(model)]), "ModuleList holds 2 models with a HeadQ config"),
        ("model", "made for a model that quantize_ was given, got a str"),
        (None, "made for a model that quantize_ was given, got a NoneType"),
        (model.config, "got a LlamaConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            HeadQCache(wrong)
        with pytest.raises(ValueError, match=message):
            HeadQCache.load(tmp_path / "c", wrong)


def test_what_wraps_a_model_is_looked_into(model, token_ids, tmp_path):
    ids = token_ids(1, 100)
    wrapped = torch.nn.ModuleDict({"inner": model})
    cache = HeadQCache(wrapped)
    with torch.no_grad():
        model(ids, cache=cache)
    cache.save(tmp_path / "c")
    assert HeadQCache.load(tmp_path / "c", wrapped).get_seq_length() == 100


def test_what_load_and_save_are_given(model, token_ids, tmp_path):
    cache = filled(model, token_ids(1, 100))
    cache.save(tmp_path / "c")
    calibrate(model, [token_ids(2, 300)], progress=False).save(tmp_path / "calibration")
    (tmp_path / "text").write_text("no tensors at all")
    (tmp_path / "empty").write_bytes(b"")
    again = "fill a HeadQCache with the prompt and save it again"
    for path, error, message in (
        (model, ValueError, "takes a path, then the model; got a LlamaForCausalLM as the path"),
        (None, ValueError, "takes a path, then the model; got a NoneType"),
        (tmp_path, FileNotFoundError, "is a folder, not a prompt cache file; name the file in it"),
        (tmp_path / "gone", FileNotFoundError, f"no prompt cache file at .*gone'; {again}"),
        (tmp_path / "text", ValueError, f"text' is not a usable .*: it is no whole safetensors file .*{again}"),
        (tmp_path / "empty", ValueError, f"it is no whole safetensors file .*{again}"),
        (tmp_path / "calibration", ValueError, "no headq_prompt_cache entry: it is a calibration"),
    ):
        with pytest.raises(error, match=message):
            HeadQCache.load(path, model)
    with pytest.raises(ValueError, match="no headq_calibration entry: it is a prompt cache; make one with calibrate"):
        Calibration.load(tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"holds no tokens yet; call the model with it first, model\(ids, cache=cache\)"
    ):
        HeadQCache(model).save(tmp_path / "d")
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        cache.save(tmp_path)
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        cache.save(f"{tmp_path}/new/")
    assert sorted(os.listdir(tmp_path)) == ["c", "calibration", "empty", "text"]
