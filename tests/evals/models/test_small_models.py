"""Small models trained here: they learn, are made once, and are the same each time."""

import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.texts import WIKITEXT, WIKITEXT_VARIABLE, find_text
from headq_ao.evals.models import small_models, small_report, small_training
from headq_ao.evals.models.small_training import Recipe
from headq_ao.integrations.transformers.serving import serving_of

TINY = {
    name: Recipe(r.architecture, vocab=512, heads=1, layers=2, context=128, batch=4, steps=60)
    for name, r in small_models.RECIPES.items()
}
SHORT = dataclasses.replace(TINY["small-gpt2"], steps=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=small_models.NAMES)
def trained(request, tmp_path_factory):
    """Folder and ``training.json`` of a tiny model of each architecture."""
    folder = tmp_path_factory.mktemp("trained") / request.param
    return folder, small_models.train(TINY[request.param], "bundled", folder, progress=False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, tiny recipes, and the bundled texts in place of WikiText's."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for purpose in ("calibrate", "report"):
        shutil.copy(find_text("bundled", purpose), texts / WIKITEXT[purpose])
    monkeypatch.setenv(WIKITEXT_VARIABLE, str(texts))
    monkeypatch.setenv("HEADQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(small_models, "RECIPES", {name: dataclasses.replace(r, steps=2) for name, r in TINY.items()})
    return tmp_path / "cache"


def forbid_training(monkeypatch):
    def fit(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(small_models, "fit", fit)


def training_ids(folder):
    _, tokenizer = inputs.load(str(folder), None, torch.float32)
    text = find_text("bundled", "calibrate").read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text)["input_ids"])


def test_it_learns_more_than_token_counts(trained):
    folder, meta = trained
    ids = training_ids(folder)
    counts = torch.bincount(ids).double()
    unigram_entropy = torch.special.entr(counts / counts.sum()).sum().item()
    assert meta["text_tokens"] == len(ids)
    assert meta["first_loss"] == pytest.approx(math.log(512), abs=1.0)
    assert meta["final_loss"] < unigram_entropy - 0.2
    assert meta["report"]["perplexity"] < meta["report"]["unigram_perplexity"]


def test_saved_and_loaded_it_scores_the_same(trained):
    folder, meta = trained
    model, tokenizer = inputs.load(str(folder), None, torch.float32)
    assert not model.training
    text = "An unseen word: zyxwv – it costs 5 €.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    held_out = find_text("bundled", "report")
    again = small_report.report(model, tokenizer, held_out, training_ids(folder), small_models.REPORT_ROWS, False)
    numbers = {key: value for key, value in meta["report"].items() if key not in ("text_file", "nll_far")}
    assert {key: again[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    assert again["text_file"] == "heldout.txt" and again["nll_far"] is None
    assert again["rows"] * again["row_length"] < len(tokenizer(held_out.read_text(encoding="utf-8"))["input_ids"])


def test_training_file(trained):
    folder, meta = trained
    stored = json.loads((folder / small_models.TRAINING_FILE).read_text(encoding="utf-8"))
    assert stored == meta
    assert stored["recipe"] == dataclasses.asdict(TINY[folder.name])
    assert stored["text"] == "bundled"
    assert stored["text_sha256"] == small_models.text_hash(find_text("bundled", "calibrate"))
    assert stored["tokens_seen"] == 60 * 4 * 128
    assert {"versions", "threads", "date"} <= set(stored["environment"])


@pytest.mark.parametrize("name", small_models.NAMES)
def test_two_trainings_are_equal_and_leave_the_random_state(name, tmp_path):
    recipe = dataclasses.replace(TINY[name], steps=3, dropout=0.1)
    weights = []
    for run, change in enumerate(({}, {}, {"seed": 1})):
        torch.manual_seed(run)
        before = torch.random.get_rng_state()
        with torch.no_grad():
            small_models.train(dataclasses.replace(recipe, **change), "bundled", tmp_path / str(run), progress=False)
        assert torch.equal(torch.random.get_rng_state(), before)
        weights.append(load_file(tmp_path / str(run) / "model.safetensors"))
    first, again, other = weights
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", small_models.NAMES)
def test_load_trains_once(name, cache, monkeypatch):
    model, _ = inputs.load(name, None, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.config.model_type.startswith(name.removeprefix("small-").replace("-", "_"))
    assert [path.name[: len(name)] for path in cache.iterdir()] == [name]
    forbid_training(monkeypatch)
    again, tokenizer = inputs.load(name, None, torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    monkeypatch.delenv(WIKITEXT_VARIABLE)
    without_text, _ = inputs.load(name, None, torch.bfloat16)
    assert torch.equal(without_text.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert len(tokenizer) == 512


def test_one_has_latent_rows_and_one_shares_keys_and_values():
    models = {name: small_training.build(small_models.RECIPES[name], 512) for name in small_models.NAMES[-2:]}
    shapes = {name: serving_of(model.eval()).shapes for name, model in models.items()}
    assert [shape.latent for shape in shapes["small-deepseek-v2"]] == [64] * 4
    assert [(shape.readers, shape.sliding_window) for shape in shapes["small-gemma4"]] == [(3, 256), (3, None)]


def test_experts_are_of_a_mixture_of_them():
    assert Recipe("olmoe").experts == small_training.Experts() and Recipe("gpt2").experts is None
    with pytest.raises(ValueError, match="experts are of 'olmoe' alone"):
        Recipe("gpt2", experts=small_training.Experts())


def test_another_recipe_or_text_is_another_model(cache, monkeypatch, tmp_path):
    inputs.load("small-gpt2", None, torch.float32)
    forbid_training(monkeypatch)
    with monkeypatch.context() as changed:
        changed.setattr(small_models, "RECIPES", {"small-gpt2": SHORT}, raising=True)
        assert small_models.find_or_train("small-gpt2").parent == cache
        changed.setattr(small_models, "RECIPES", {"small-gpt2": dataclasses.replace(SHORT, seed=1)})
        with pytest.raises(AssertionError, match="trained again"):
            inputs.load("small-gpt2", None, torch.float32)
    valid = tmp_path / "texts" / WIKITEXT["calibrate"]
    valid.write_text(valid.read_text(encoding="utf-8") + "More.", encoding="utf-8")
    with pytest.raises(AssertionError, match="trained again"):
        inputs.load("small-gpt2", None, torch.float32)


def test_without_model_and_text_the_error_tells_what_to_do(cache, monkeypatch):
    monkeypatch.delenv(WIKITEXT_VARIABLE)
    with pytest.raises(FileNotFoundError, match=r"small-gpt2 is trained on first use.*set HEADQ_WIKITEXT=FOLDER"):
        inputs.load("small-gpt2", None, torch.float32)


def test_a_killed_training_leaves_nothing(cache, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(small_models, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            inputs.load("small-gpt2", None, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(small_models.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            inputs.load("small-gpt2", None, torch.float32)
    assert list(cache.iterdir()) == []


def test_a_faster_process_wins(trained, tmp_path):
    folder, meta = trained
    model, tokenizer = inputs.load(str(folder), None, torch.float32)
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    small_models.save(model, tokenizer, meta | {"seconds": -1.0}, there)
    assert json.loads((there / small_models.TRAINING_FILE).read_text(encoding="utf-8")) == meta
    (there / small_models.TRAINING_FILE).unlink()
    with pytest.raises(OSError, match="there"):
        small_models.save(model, tokenizer, meta, there)


def test_checks_come_before_training(tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    (tmp_path / "in_use").mkdir()
    (tmp_path / "in_use" / "file").touch()
    for folder in (tmp_path / "in_use", tmp_path / "in_use" / "file"):
        with pytest.raises(ValueError, match="must be a new or an empty folder"):
            small_models.train(SHORT, "bundled", folder)
    with pytest.raises(FileNotFoundError, match="no text file"):
        small_models.train(SHORT, "absent.txt", tmp_path / "new")


def test_a_text_must_be_longer_than_a_row(tmp_path, text_file):
    short = text_file(tokens=20)
    with pytest.raises(ValueError, match="but a training row has 128; give a longer text"):
        small_models.train(SHORT, str(short), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_command(cache, tmp_path, capsys, text_file):
    options = ["--text", "wikitext", "--steps", "3", "--threads", "1", "--no-progress"]
    assert small_models.main(["gpt2", *options]) == 0
    first = capsys.readouterr().out
    assert "bits per byte" in first and "Trained before" not in first
    assert small_models.main(["gpt2", *options]) == 0
    assert capsys.readouterr().out == "Trained before:\n" + first
    mine = tmp_path / "mine"
    command = ["gpt-neox", "--text", str(text_file(tokens=2000)), "--out", str(mine), "--seed", "3", "--no-progress"]
    assert small_models.main(command) == 0
    assert "bits per byte" not in capsys.readouterr().out
    meta = json.loads((mine / small_models.TRAINING_FILE).read_text(encoding="utf-8"))
    assert (meta["recipe"]["seed"], meta["text"], meta["report"]) == (3, "text.txt", None)
    assert small_models.main(command) == 1
    assert "must be a new or an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        small_models.main(["gpt2", "--steps", "0"])


@pytest.mark.parametrize("name", small_models.NAMES)
def test_each_parameter_has_one_optimizer(name):
    model = small_training.build(TINY[name], 512)
    muon, adamw = small_training.optimizers_for(model, TINY[name])
    by_muon = [p for group in muon.param_groups for p in group["params"]]
    by_adamw = [p for group in adamw.param_groups for p in group["params"]]
    assert sorted(map(id, by_muon + by_adamw)) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 and 512 not in p.shape for p in by_muon)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_learning_rate():
    recipe = dataclasses.replace(SHORT, steps=1000, warmup=0.1)
    rates = [small_training.rate(step, recipe) for step in range(1000)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(rates[99]) and rates[99] > 0.97
    assert rates[-1] == pytest.approx(0.05, abs=1e-4)


def test_bigrams_against_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    train, rows = torch.randint(0, 6, (200,), generator=generator), torch.randint(0, 7, (3, 20), generator=generator)
    seen, pairs = train.tolist(), list(itertools.pairwise(train.tolist()))
    low, high = [], []
    for row in rows.tolist():
        for before, after in itertools.pairwise(row):
            unigram = (seen.count(after) + 1) / (len(seen) + 7)
            kinds = len({b for a, b in pairs if a == before})
            starts = sum(a == before for a, _ in pairs)
            bigram = (pairs.count((before, after)) + kinds * unigram) / (starts + kinds) if starts else unigram
            low.append(-math.log(unigram))
            high.append(-math.log(bigram))
    expected = (sum(low) / len(low), sum(high) / len(high))
    assert small_report.bigram_nll(train, rows, 7) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_entropy_of_attention(family, tiny, token_ids):
    model = tiny(family)
    row = token_ids(1, 50)[0]
    entropy, uniform = small_report.attention_entropy(model, row)
    assert uniform == pytest.approx(sum(math.log(i) for i in range(1, 51)) / 50)
    assert 0 < entropy < uniform - 0.01
    assert model.config._attn_implementation == "sdpa"
    for name, parameter in model.named_parameters():
        if "query_key_value" in name or "c_attn" in name:
            parameter.data.zero_()
    assert small_report.attention_entropy(model, row)[0] == pytest.approx(uniform, rel=1e-5)


def test_no_report_on_less_than_a_row(tiny_folder, text_file):
    model, tokenizer = inputs.load(str(tiny_folder), None, torch.float32)
    assert small_report.report(model, tokenizer, text_file(), torch.arange(100), 4, False) is None
