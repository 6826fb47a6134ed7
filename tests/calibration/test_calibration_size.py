"""Calibrations on little, degenerate and padded text: never much worse than none, and never silently left out."""

import dataclasses
import json
import warnings

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from headq_ao import (
    Calibration,
    HeadQCache,
    HeadQQuantizationConfig,
    calibrate,
    estimate_memory,
    headq_config,
    quantize_,
    restore_,
)
from headq_ao.calibration.artifact import COUNTS
from headq_ao.calibration.bit_allocation import allocate_bits, cautious, head_bits
from headq_ao.codecs.layer_codec import key_codec, value_codec
from headq_ao.codecs.linalg import centred_moment
from headq_ao.codecs.whitened import whitened_codec, whitened_value_codec
from headq_ao.evals.harness import inputs
from headq_ao.files import checksum
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.statistics.moments import FISHER
from tests.conftest import load_recipe

recipe = load_recipe("calibration_size")
FAST = {"residual_length": 32, "block_size": 16, "warmup_tokens": 64}
RESTS = "the calibration rests on {} effective tokens .* and needs {}"
SOME = [  # of the recipe's, those that tell most for their time
    "natural, 16 tokens", "natural, 64 tokens", "natural, 320 tokens", "natural, 640 tokens", "natural, 1024 tokens",
    "natural, 40 rows of 20", "random ids, 64", "random ids, 512", "one token, 4 x 512",
    "8 tokens again and again, 4 x 512", "left-padded, 8 x 128 in 256", "left-padded, 8 x 128 in 256, no mask",
    "right-padded, 8 x 128 in 256, no mask", "left-padded, 8 x 32 in 512, no mask",
]  # fmt: skip


def word_ids(purpose, tokens):
    """A bundled text for a model of 128 tokens: its words, numbered by their first and last letters."""
    words = inputs.find_text("bundled", purpose).read_text(encoding="utf-8").split()
    ids = torch.tensor([3 + (7 * ord(word[0]) + 3 * ord(word[-1]) + len(word)) % 125 for word in words])
    return ids.repeat(-(-tokens // len(ids)))[:tokens]


def check(found):
    """What holds for every calibration."""
    for name, entry in found["kinds"].items():
        limit = 2.0 if name.startswith("random") else 1.1
        assert all(ratio <= limit for ratio in entry["ratio"].values()), (name, entry)
        if name.startswith("natural") and entry["tokens"] >= 1024:  # as ever: nothing left out, nothing shrunk
            assert entry["used"] and entry["doubt"] == 0 and entry["counted"] >= entry["tokens"] - 4 * 4


def test_never_much_worse_than_none(tiny):
    model = tiny(head_dim=32)
    rows, text = word_ids("report", 800).view(2, 400), word_ids("calibrate", 4096)
    found = recipe.measure(model, rows, text, SOME, prefill=200, progress=False, **FAST)
    check(found)
    used = {name: entry["used"] for name, entry in found["kinds"].items()}
    assert not any(used[name] for name in (*SOME[:2], "one token, 4 x 512", "8 tokens again and again, 4 x 512"))
    assert used["natural, 640 tokens"] and used["left-padded, 8 x 128 in 256, no mask"]


@pytest.mark.slow
@pytest.mark.real_model
def test_never_much_worse_than_none_on_smollm2():
    model, tokenizer = inputs.load("smollm2", None, torch.float32)
    rows = inputs.token_rows(tokenizer, inputs.find_text("bundled", "report"), 2, 512)
    text = inputs.token_rows(tokenizer, inputs.find_text("bundled", "calibrate"), 1, 4096)[0]
    found = recipe.measure(model, rows, text, SOME, progress=False)
    check(found)
    used = {name: entry["used"] for name, entry in found["kinds"].items()}
    assert used["natural, 640 tokens"] and used["left-padded, 8 x 128 in 256, no mask"]
    assert not used["random ids, 512"]


def test_the_stored_result_holds():
    """What was measured with the whole list."""
    stored = json.loads(recipe.RESULT.read_text(encoding="utf-8"))
    check(stored)
    assert len(stored["kinds"]) == len(recipe.kinds(torch.arange(4096), 100))


def test_a_text_that_is_not_there(capsys):
    assert recipe.main(["--text", "nowhere.txt"]) == 2
    assert "error: no text file 'nowhere.txt'" in capsys.readouterr().err


def few(model, token_ids, n=100):
    with pytest.warns(UserWarning, match=RESTS.format(n - 4, 256) + ".*; quantize_ will not use it"):
        return calibrate(model, token_ids(1, n, seed=1), progress=False)


def quantized_with_warning(model, config):
    with pytest.warns(UserWarning, match=RESTS.format(96, 256) + r".* It is not used: .* k_bits=2 and v_bits=2 hold"):
        quantize_(model, config)


@torch.no_grad()
def logits(model, ids):
    cache = HeadQCache(model)
    return torch.cat([model(part, cache=cache).logits for part in ids.split(100, 1)], 1), cache


@pytest.mark.parametrize("options", [{}, {"adapt": "prompt"}, {"preset": "headq_paper"}, {"preset": "near_lossless"}])
def test_too_few_tokens_are_as_no_calibration(tiny, token_ids, tmp_path, options):
    """From a file or not: the same logits, memory and stored prompts, and a warning; the config is left alone."""
    model, ids = tiny(), token_ids(2, 300)
    plain = headq_config(**FAST | options)
    quantize_(model, plain)
    want, cache = logits(model, ids)
    cache.save(tmp_path / "cache")
    footprint = cache.get_memory_footprint()
    restore_(model)
    calibration = few(model, token_ids)
    calibration.save(tmp_path / "c.safetensors")
    for given in (calibration, tmp_path / "c.safetensors"):
        config = headq_config(**FAST | options, calibration=given)
        with pytest.warns(UserWarning, match=RESTS.format(96, 256) + ".* It is not used"):
            quantize_(model, config)
        assert config.calibration is not None and model._headq.config.calibration is None
        got, cache = logits(model, ids)
        assert torch.equal(got, want) and cache.get_memory_footprint() == footprint
        assert HeadQCache.load(tmp_path / "cache", model).get_seq_length() == 300
        restore_(model)
        with pytest.warns(UserWarning, match="It is not used"):
            one = estimate_memory(model, config, tokens=300, batch_size=2)
        assert one == estimate_memory(model, plain, tokens=300, batch_size=2)


def test_one_warning_each(tiny, token_ids):
    model = tiny()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibration = calibrate(model, token_ids(1, 100), progress=False)
        quantize_(model, headq_config(calibration=calibration))
        logits(model, token_ids(1, 200))
    assert len([w for w in caught if "effective tokens" in str(w.message)]) == 2


def test_enough_tokens_are_used_without_a_word(tiny, token_ids):
    model = tiny()
    calibration = calibrate(model, token_ids(1, 260), progress=False)
    assert (calibration.effective_tokens, calibration.needed_tokens, calibration.suffices) == (256, 256, True)
    quantize_(model, headq_config(calibration=calibration))
    assert model._headq.calibration is calibration


def test_another_model_is_refused_before_the_warning(tiny, token_ids):
    calibration = few(tiny(seed=1), token_ids)
    with pytest.raises(ValueError, match="made on another model"):
        quantize_(tiny(), headq_config(calibration=calibration))


def test_a_model_without_its_calibration_is_saved_as_such(tiny, token_ids, tmp_path):
    """save_pretrained, from_pretrained with such a calibration, and both in turn: the warning once, no calibration."""
    model, ids = tiny(), token_ids(1, 300)
    model.save_pretrained(tmp_path / "dense")
    config = headq_config(**FAST, calibration=few(model, token_ids))
    quantized_with_warning(model, config)
    want, _ = logits(model, ids)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), ids)[0], want)
    given = HeadQQuantizationConfig(config)
    with pytest.warns(UserWarning, match="It is not used"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=given)
    assert torch.equal(logits(loaded, ids)[0], want)
    loaded.save_pretrained(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["calibrated"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids)[0], want)


def as_version_3(path):
    """The file as headq_ao wrote it before it counted effective tokens."""
    with safetensors.safe_open(path, "pt") as f:
        head = json.loads(f.metadata()["headq_calibration"])
    tensors = safetensors.torch.load_file(path)
    tensors = {name: x for name, x in tensors.items() if name.partition(".")[2] not in FISHER}
    head = {**head, "version": 3, "layers": [{k: x[k] for k in ("tokens", "groups")} for x in head["layers"]]}
    text = json.dumps(head)
    safetensors.torch.save_file(tensors, path, {"headq_calibration": text, "headq_sha256": checksum(text, tensors)})


def test_version_3_gives_the_codes_it_gave(tiny, token_ids, tmp_path):
    """Bit for bit, however few its tokens; saved again it stays so."""
    model, path = tiny(), tmp_path / "c.safetensors"
    made = few(model, token_ids)
    made.save(path)
    as_version_3(path)
    for _ in range(2):
        old = Calibration.load(path)
        assert old.effective_tokens is None and old.suffices
        shapes, config = layer_shapes(model.config), headq_config()
        for layer, new in zip(old.layers, made.layers, strict=True):
            mean, outer = layer.weighted("k")
            c_q = layer.weighted_c_q[None]
            want = whitened_codec(config, c_q, mean[None], centred_moment(mean, outer)[None])
            values = whitened_value_codec(config, *(x[None] for x in layer.weighted("v")))
            got = key_codec(config, layer), value_codec(config, shapes[0], layer)
            for a, b in zip((want, values), got, strict=True):
                assert a.tensors().keys() == b.tensors().keys()
                assert all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())
            assert not torch.equal(got[0].encode, key_codec(config, new).encode)
        sensitivity = {
            (i, side, h): layer.relative_errors("kv".index(side))[h]
            for i, layer in enumerate(old.layers) for side in "kv" for h in range(2)
        }  # fmt: skip
        shared = allocate_bits(sensitivity, {part: [1, 2, 3, 4, 5, 6, 8] for part in sensitivity}, config.mean_bits)
        given = head_bits(config, old, shapes)
        assert shared == {(i, s, h): getattr(x, s)[h] for i, x in enumerate(given) for s in "kv" for h in range(2)}
        quantize_(model, headq_config(calibration=str(path)))
        assert model._headq.calibration is not None
        restore_(model)
        old.save(path)


@pytest.mark.parametrize("value", ["left out", -1, 1.5, "3", True, None])
def test_counts_are_checked(tiny, token_ids, tmp_path, value):
    model = tiny()
    made = calibrate(model, token_ids(2, 200), progress=False)
    head, tensors = json.loads(json.dumps(made.head())), made.tensors()
    assert [sorted(layer) for layer in head["layers"]] == [sorted(COUNTS)] * 2
    if value == "left out":
        del head["layers"][1]["effective"]
    else:
        head["layers"][1]["effective"] = value
    if value is None:  # of moments that nobody counted
        assert Calibration.of(head, tensors).layers[1].effective is None
        return
    with pytest.raises(ValueError, match="layer 1: effective must be a whole number of at least 0, got"):
        Calibration.of(head, tensors)


def test_shrinking_by_hand(tiny, token_ids):
    """Towards the isotropic covariance of the same trace; less with each token; not at all where nobody counted."""
    layer = calibrate(tiny(), token_ids(2, 200), progress=False).layers[0]
    shares = []
    for effective in (8, 32, 64, 191):
        counted = dataclasses.replace(layer, effective=effective)
        for side in "kv":
            mean, outer = counted.weighted(side)
            same, shrunk = counted.shrunk(side)
            plain, got = centred_moment(mean, outer), centred_moment(same, shrunk)
            trace = plain.diagonal(dim1=-2, dim2=-1).mean(-1)
            off = ~torch.eye(32, dtype=torch.bool)
            share = 1 - (got[:, off] * plain[:, off]).sum() / plain[:, off].square().sum()
            want = (1 - share) * plain + share * trace[:, None, None] * torch.eye(32)
            assert torch.equal(mean, same)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(trace.max()))
        shares.append(float(share))
    assert shares == pytest.approx([1 / (1 + (n / 32) ** 3) for n in (8, 32, 64, 191)], rel=0.01)
    for effective in (None, 384, 5000):
        plain = dataclasses.replace(layer, effective=effective)
        assert plain.doubt == 0
        assert all(torch.equal(a, b) for a, b in zip(plain.shrunk("k"), plain.weighted("k"), strict=True))
        assert torch.equal(plain.shrunk_c_q, plain.weighted_c_q)


def test_bits_of_few_tokens_are_shared_with_caution(tiny, token_ids):
    """Heads are pulled to what their side does on average: the fewer the tokens, the more."""
    made = calibrate(tiny(layers=4), token_ids(2, 200), progress=False)
    sensitivity = {
        (i, side, h): layer.relative_errors("kv".index(side))[h]
        for i, layer in enumerate(made.layers) for side in "kv" for h in range(2)
    }  # fmt: skip
    spread = []
    for effective in (0, 16, 64, None):
        layers = [dataclasses.replace(layer, effective=effective) for layer in made.layers]
        pulled = cautious(sensitivity, Calibration(layers, made.fingerprint))
        logs = torch.tensor([pulled[part] for part in sensitivity if part[1] == "k"]).log()
        spread.append(float(logs.std(0).mean()))
        own = torch.tensor([sensitivity[part] for part in sensitivity if part[1] == "k"]).log()
        torch.testing.assert_close(logs.mean(0), own.mean(0))
    assert spread[0] < 1e-5 < spread[1] < spread[2] < spread[3]
    assert pulled == sensitivity
