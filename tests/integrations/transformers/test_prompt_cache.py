"""A packed cache on disk: bit for bit the same afterwards, and refused wherever it does not fit."""

import copy
import gc
import json
import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.cache.serialize import layer_to_tensors
from headq_ao.evals.harness import inputs
from headq_ao.files import checksum
from headq_ao.integrations.transformers import prompt_cache
from tests.conftest import ROOT

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2"]


def prepared(tiny, token_ids, family="llama", calibrated=False, dtype=torch.float32, **options):
    model = tiny(family).to(dtype)
    calibration = calibrate(model, [token_ids(2, 200, seed=9)], progress=False) if calibrated else None
    quantize_(model, headq_config(**FAST | options, calibration=calibration))
    return model


@torch.no_grad()
def filled(model, ids, sizes=None, mask=None):
    cache, seen = HeadQCache(model), 0
    for part in ids.split(sizes or ids.shape[1], 1):
        seen += part.shape[1]
        model(part, cache=cache, attention_mask=None if mask is None else mask[:, :seen])
    return cache


@torch.no_grad()
def continued(model, cache, ids, mask=None):
    """Logits of a chunk and of 20 single tokens, which close blocks, on this cache."""
    logits, seen = [], cache.get_seq_length()
    for part in ids.split([20] + [1] * 20, 1):
        seen += part.shape[1]
        grown = None if mask is None else torch.nn.functional.pad(mask, (0, seen - mask.shape[1]), value=1)
        logits.append(model(part, cache=cache, attention_mask=grown).logits)
    return torch.cat(logits, 1)


def assert_reads_the_same(model, cache, path, ids, mask=None, shared=False):
    """``shared``: sequences share pages, which a file has once for each of them."""
    cache.save(path)
    loaded = HeadQCache.load(path, model)
    cache.save(f"{path}.compressed", compress=True)
    kept, restored = loaded.packed, HeadQCache.load(f"{path}.compressed", model).packed
    for one, other in zip(kept, restored, strict=True):
        (one, data), (other, same) = layer_to_tensors(one), layer_to_tensors(other)
        assert data == same and one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert loaded.get_seq_length() == cache.get_seq_length()
    reports = loaded.bits_report(), cache.bits_report()
    assert shared or repr(reports[0]) == repr(reports[1])  # nan where nothing is packed
    assert not shared or reports[0].bytes["codes"] > reports[1].bytes["codes"]
    assert loaded.rows_read == cache.rows_read
    assert torch.equal(continued(model, loaded, ids, mask), continued(model, cache, ids, mask))
    assert shared or loaded.get_memory_footprint() == cache.get_memory_footprint()


@pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_after_loading(tiny, token_ids, tmp_path, family, calibrated):
    model = prepared(tiny, token_ids, family, calibrated)
    cache = filled(model, token_ids(2, 200), [150, 50])
    assert cache.bits_report().packed_rows > 0
    assert_reads_the_same(model, cache, tmp_path / "c", token_ids(2, 40, seed=1))


OPTIONS = [
    {"v_bits": None},
    {"k_bits": None},
    {"rank": 8, "basis": "score_optimal"},
    {"preset": "headq_paper"},
    {"key_codec": "affine"},
    {"key_codec": "affine", "rank": 0, "value_codec": "affine"},
    {"key_codec": "affine", "basis": "score_optimal"},
    {"k_bits": 3, "v_bits": 5, "value_codec": "affine", "v_group_size": 16, "v_zero_point": True, "block_size": 32},
    {"error_feedback": False, "whitening": 0.5},
    {"key_gauge": False, "rotation": False},
    {"adapt": "prompt"},
]


@pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_every_kind_of_row(tiny, token_ids, tmp_path, options, calibrated):
    model = tiny("llama")
    calibration = calibrate(model, [token_ids(2, 200, seed=9)], progress=False) if calibrated else None
    quantize_(model, headq_config(**FAST | options, calibration=calibration))
    cache = filled(model, token_ids(2, 200))
    assert_reads_the_same(model, cache, tmp_path / "c", token_ids(2, 40, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(tiny, token_ids, tmp_path, dtype):
    model = prepared(tiny, token_ids, dtype=dtype)
    assert_reads_the_same(model, filled(model, token_ids(1, 200)), tmp_path / "c", token_ids(1, 40, seed=1))


@pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])
@pytest.mark.parametrize("length", [3, 40, 90])
def test_short_and_padded_prompts(tiny, token_ids, tmp_path, length, calibrated):
    """Statistics still awaited by one row or all, fewer tokens than sinks, pads on the left."""
    model = prepared(tiny, token_ids, calibrated=calibrated)
    mask = torch.ones(3, 130, dtype=torch.long)
    mask[1, : 130 - length] = 0
    ids = token_ids(3, 40, seed=1)
    assert_reads_the_same(model, filled(model, token_ids(3, 130), mask=mask), tmp_path / "padded", ids, mask)
    assert_reads_the_same(model, filled(model, token_ids(1, length)), tmp_path / "alone", ids[:1])


def test_after_selection_and_crops(tiny, token_ids, tmp_path):
    model = prepared(tiny, token_ids)
    cache = filled(model, token_ids(2, 200))
    cache.batch_repeat_interleave(2)
    assert cache.batch.lengths.packed() == [160] * 4  # 4 sinks, and at least 32 full-precision tokens behind them
    cache.crop(-110)  # within what is packed
    assert (
        cache.batch.lengths.packed() == [86] * 4
    )  # page 5 is in the making again, and each sequence goes on with its own
    assert_reads_the_same(model, cache, tmp_path / "c", token_ids(4, 40, seed=1), shared=True)
    cache = filled(model, token_ids(2, 200))
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.crop(-110)
    assert_reads_the_same(model, cache, tmp_path / "c", token_ids(2, 40, seed=1))


def test_loaded_caches_are_independent(tiny, token_ids, tmp_path):
    """Two readers of a file, one of which overwrites it, do not see each other."""
    model = prepared(tiny, token_ids)
    cache = filled(model, token_ids(1, 200))
    path, ids = tmp_path / "c", token_ids(1, 40, seed=1)
    cache.save(path)
    one, two = HeadQCache.load(path, model), HeadQCache.load(path, model)
    first = continued(model, one, ids)
    one.save(path)
    assert torch.equal(continued(model, two, ids), first)
    assert HeadQCache.load(path, model).get_seq_length() == 240


def test_generate_goes_on_from_a_loaded_cache(tiny, token_ids, tmp_path):
    model = prepared(tiny, token_ids)
    ids = token_ids(1, 200)
    filled(model, ids[:, :190]).save(tmp_path / "c")
    whole = model.generate(ids, max_new_tokens=20, do_sample=False, cache=filled(model, ids[:, :190]))
    loaded = HeadQCache.load(tmp_path / "c", model)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, cache=loaded), whole)


CHILD = """
import sys, torch
from headq_ao import HeadQCache
from tests.conftest import build_tiny
from headq_ao import headq_config, quantize_
model = build_tiny("llama")
quantize_(model, headq_config(epoch_tokens=64, residual_length=32, block_size=16))
cache = HeadQCache.load(sys.argv[1], model)
with torch.no_grad():
    torch.save(model(torch.tensor([[5]]), cache=cache).logits, sys.argv[2])
"""


def test_another_process_reads_it(tiny, token_ids, tmp_path):
    model = prepared(tiny, token_ids)
    cache = filled(model, token_ids(1, 200))
    cache.save(tmp_path / "c")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "c"), str(tmp_path / "logits")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    with torch.no_grad():
        here = model(torch.tensor([[5]]), cache=cache).logits
    assert torch.equal(torch.load(tmp_path / "logits"), here)


def test_no_unused_capacity_in_the_file(tiny, token_ids, tmp_path):
    model = prepared(tiny, token_ids)
    cache = filled(model, token_ids(1, 2000), 400)
    unused = cache.bits_report().bytes["unused"]
    assert unused > 0
    cache.save(tmp_path / "c")
    tensors = safetensors.torch.load_file(tmp_path / "c")
    layer, report = cache.layers[0], cache.bits_report()
    free = -cache.batch.lengths.packed()[0] % cache.batch.page_tokens  # tokens of the last page, which is stored whole
    of_page = sum(t[0].nbytes for t in layer.pool.tensors) // cache.batch.page_tokens
    known = report.bytes["unused"] + report.bytes["tables"] - len(cache.layers) * free * of_page
    assert sum(t.nbytes for t in tensors.values()) == cache.get_memory_footprint() - known


def other_models(tiny, token_ids):
    plain = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
    ids = token_ids(2, 200, seed=9)

    def changed(edit=lambda m: m, options=None, **kind):
        model = tiny(**kind)
        with torch.no_grad():
            model = edit(model) or model
        options = (options or {}).copy()
        if "calibrate_on" in options:
            options["calibration"] = calibrate(model, [options.pop("calibrate_on")], progress=False)
        quantize_(model, headq_config(**plain | options))
        return model

    def int8(model):
        torchao.quantization.quantize_(model, Int8WeightOnlyConfig(version=2))

    def tuned(model):
        model.model.layers[1].mlp.up_proj.weight += 1e-4

    return {
        "another model: layers is 4 here and 2 there": lambda: changed(layers=4),
        "another model: model_type": lambda: changed(family="qwen3"),
        "another model: rope": lambda: changed(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "other weights.*embed_tokens": lambda: changed(seed=1),
        "other weights.*: model.layers.1.mlp.up_proj.weight$": lambda: changed(tuned),
        "other weights .another model, dtype or weight quantization": lambda: changed(lambda m: m.bfloat16()),
        r"other weights .*: model.layers.0.mlp.down_proj.weight, .* and others": lambda: changed(int8),
        "another config: rank is 0 here and None there": lambda: changed(options={"rank": 0}),
        "out a calibration, unlike this model": lambda: changed(options={"calibrate_on": ids}),
    }


@pytest.mark.parametrize("index", range(9))
def test_another_model_is_refused(tiny, token_ids, tmp_path, index):
    path = tmp_path / "c"
    model = prepared(tiny, token_ids)
    filled(model, token_ids(1, 200)).save(path)
    message, make = list(other_models(tiny, token_ids).items())[index]
    with pytest.raises(ValueError, match=f"c' is not a usable headq_ao prompt cache: it was made with.*{message}"):
        HeadQCache.load(path, make())


@pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])
def test_prompts_of_configs_of_version_1(tiny, token_ids, tmp_path, monkeypatch, calibrated):
    """They do not say that their scales have 16 bits; models say so, be their config of that version or of this one."""
    model, path, ids = prepared(tiny, token_ids, calibrated=calibrated, scale_bits=16), tmp_path / "c", token_ids(1, 40)
    cache, today = filled(model, token_ids(1, 200, seed=1)), prompt_cache.model_head

    def of_version_1(*given):
        head = today(*given)
        config = {n: x for n, x in head["config"].items() if n not in ("scale_bits", "value_weight")}
        return head | {"config": config | {"version": 1}}

    with monkeypatch.context() as patched:
        patched.setattr(prompt_cache, "model_head", of_version_1)
        cache.save(path)
    expected = continued(model, cache, ids)
    for reader in (model, prepared(tiny, token_ids, calibrated=calibrated, version=1)):
        assert torch.equal(continued(reader, HeadQCache.load(path, reader), ids), expected)
    message = "another config: scale_bits is 8 here and 16 there; load it into a model .* or compute the prompt again"
    with pytest.raises(ValueError, match=message):
        HeadQCache.load(path, prepared(tiny, token_ids, calibrated=calibrated))


def test_another_calibration_is_refused(tiny, token_ids, tmp_path):
    one, two, same = tiny(), tiny(), tiny()
    configs = [headq_config(**FAST, calibration=calibrate(one, [token_ids(2, 200, s)], progress=False)) for s in (1, 2)]
    quantize_(one, configs[0])
    quantize_(two, configs[1])
    quantize_(same, configs[0])
    filled(one, token_ids(1, 200)).save(tmp_path / "c")
    assert HeadQCache.load(tmp_path / "c", same).get_seq_length() == 200
    with pytest.raises(ValueError, match=r"another calibration \(layer 0 differs\)"):
        HeadQCache.load(tmp_path / "c", two)


def test_caches_that_cannot_be_saved(tiny, token_ids, tmp_path):
    model, path = prepared(tiny, token_ids), tmp_path / "c"
    with pytest.raises(ValueError, match="holds no tokens yet"):
        HeadQCache(model).save(path)
    cache = filled(model, token_ids(1, 200))
    with pytest.raises(FileNotFoundError, match="no folder"):
        cache.save(tmp_path / "gone" / "c")
    copied = copy.deepcopy(cache)
    restore_(model)
    with pytest.raises(ValueError, match="no longer has its HeadQ config"):
        cache.save(path)
    with pytest.raises(ValueError, match="no HeadQ config; call quantize_"):
        HeadQCache.load(path, model)
    quantize_(model, headq_config(**FAST))
    copied.save(path)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="the model of this cache is gone"):
        cache.save(path)


def rewrite(path, change=lambda head: head, edit=lambda tensors: tensors, signed=True):
    with safetensors.safe_open(path, "pt") as f:
        metadata = dict(f.metadata())
    tensors = {n: t.clone() for n, t in safetensors.torch.load_file(path).items()}
    head = json.loads(metadata["headq_prompt_cache"])
    edit(tensors)
    metadata["headq_prompt_cache"] = json.dumps(change(head) or head)
    if signed:
        metadata["headq_sha256"] = checksum(metadata["headq_prompt_cache"], tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def in_layer(**changes):
    def change(head):
        head["layers"][1] |= changes

    return change


def in_counts(**changes):
    def change(head):
        head["counts"] |= changes

    return change


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), ""),
    "changed byte": (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "changed or damaged; fill a HeadQCache"),
    "unsigned head": (lambda p: rewrite(p, in_layer(ring=999), signed=False), "changed or damaged"),
    "newer": (lambda p: rewrite(p, lambda h: h | {"version": 6}), "version 6 is newer than 5, .*; update headq_ao"),
    "older": (lambda p: rewrite(p, lambda h: h | {"version": 3}), "version 3 is older than 4, .*; fill a HeadQCache"),
    "a calibration": (None, "no headq_prompt_cache entry"),
    "fewer layers": (lambda p: rewrite(p, lambda h: h | {"layers": h["layers"][:1]}), ""),
    "more tokens": (lambda p: rewrite(p, in_counts(tokens=[201])), "counts of tokens are not usable"),
    "other length": (lambda p: rewrite(p, in_counts(slots=201)), r"token ids must be int32 \(1, 201\)"),
    "other batch": (lambda p: rewrite(p, in_counts(pads=[0, 0])), "counts of tokens are not usable"),
    "negative": (lambda p: rewrite(p, in_counts(packed=[-1])), "counts of tokens are not usable"),
    "all packed": (lambda p: rewrite(p, in_counts(packed=[200])), "counts of tokens are not usable"),
    "more packed": (lambda p: rewrite(p, in_counts(packed=[190])), "block tables have no room"),
    "no room": (lambda p: rewrite(p, in_counts(columns={"full": 1})), "block tables have no room"),
    "lost count": (lambda p: rewrite(p, in_counts(ring_low=None)), ""),
    "other pages": (
        lambda p: rewrite(p, in_layer(layout="16;32;32;0:2:,0,1:,0,1")),
        "layer 1: .*its pages have the form",
    ),
    "lost tensor": (lambda p: rewrite(p, edit=lambda t: t.pop("1.page.0") is None), "layer 1: KeyError"),
    "lost tokens": (lambda p: rewrite(p, edit=lambda t: t.pop("1.window.v") is None), "layer 1: .*full-precision"),
    "small ring": (lambda p: rewrite(p, in_layer(ring=3)), "layer 1: .*its ring must hold at least"),
    "other sequences": (lambda p: rewrite(p, in_layer(learned=[True, True])), "layer 1: .*which sequences"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(tiny, token_ids, tmp_path, name):
    model, path = prepared(tiny, token_ids), tmp_path / "c"
    cache = filled(model, token_ids(1, 200))
    cache.save(path)
    damage, message = DAMAGE[name]
    if damage is None:
        calibrate(model, [token_ids(2, 200)], progress=False).save(path)
    else:
        damage(path)
    with pytest.raises(ValueError, match=f"c' is not a usable headq_ao prompt cache: .*{message}"):
        HeadQCache.load(path, model)
    with pytest.raises(FileNotFoundError, match=r"no prompt cache file at .*; fill a HeadQCache"):
        HeadQCache.load(tmp_path / "nowhere", model)


def in_form(**changes):
    def change(head):
        head["compressed"]["1.page.0"] |= changes

    return change


def reversed_stream(tensors):
    tensors["1.page.0"] = tensors["1.page.0"].flip(0)


COMPRESSED_DAMAGE = {
    "more elements": (in_form(shape=[1 << 40]), None, "must give 1099511627776 bytes"),
    "fewer elements": (in_form(shape=[3]), None, "must give 3 bytes a part, got 4"),
    "no such code": (in_form(planes=[["brotli", 4]]), None, "do not make up|must give"),
    "another stream": (None, reversed_stream, "1.page.0"),
    "no form": (lambda head: head["compressed"].pop("1.page.0") and None, None, "it has no '1.page.0'"),
}


@pytest.mark.parametrize("name", COMPRESSED_DAMAGE)
def test_damaged_compressed_files(tiny, token_ids, tmp_path, name):
    model, path = prepared(tiny, token_ids), tmp_path / "c"
    filled(model, token_ids(1, 200)).save(path, compress=True)
    change, edit, message = COMPRESSED_DAMAGE[name]
    rewrite(path, change or (lambda head: head), edit or (lambda tensors: tensors))
    with pytest.raises(ValueError, match=f"c' is not a usable headq_ao prompt cache: .*({message})"):
        HeadQCache.load(path, model)


def test_compressed_files_are_smaller(tiny, token_ids, tmp_path):
    model, path = prepared(tiny, token_ids, dtype=torch.bfloat16, calibrated=True), tmp_path / "c"
    cache, sizes = filled(model, token_ids(1, 2000)), []
    for compress in (False, True):
        cache.save(path, compress=compress)
        with safetensors.safe_open(path, "pt") as f:
            sizes.append(sum(f.get_tensor(name).nbytes for name in f.keys()))  # noqa: SIM118
    assert sizes[1] < 0.95 * sizes[0]


@pytest.mark.real_model
def test_smollm2(tmp_path):
    model, tokenizer = inputs.load("smollm2", None, torch.float32)
    quantize_(model, headq_config())
    ids = inputs.token_rows(tokenizer, inputs.find_text("bundled", "report"), 1, 500)
    cache = filled(model, ids[:, :430], [400, 30])
    assert cache.packed_fraction > 0 or cache.bits_report().packed_rows > 0
    assert_reads_the_same(model, cache, tmp_path / "c", ids[:, 430:470])
