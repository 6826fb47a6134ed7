"""lm-eval under torchrun: the documents are split, the results are those of one process, a failure ends all."""

import json
import random
import re
import types

import pytest
import transformers

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM, hash_args
from lm_eval.tasks import TaskManager

from headq_ao.evals.lm_eval import HeadQLM, ModelArgumentError, NothingPackedError
from headq_ao.evals.lm_eval import model as module
from tests.scale.conftest import torchrun

pytestmark = pytest.mark.xdist_group("processes")
FAMILIES = ["llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "gpt2"]
SMALL = {"warmup_tokens": 32, "residual_length": 16, "block_size": 16, "max_length": 400}
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: 1\nnum_fewshot: 2\nfewshot_split: train\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[0]}}'\nrepeats: 2\n"
    "generation_kwargs: {until: [w0], max_gen_toks: 8}\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}]\n",
}


def words(n, seed):
    return " ".join(random.Random(seed).choices([f"w{i}" for i in range(125)], k=n))


def documents(n, seed=0, length=60):
    """Documents of unequal length, three choices each."""
    return [
        {"text": words(length + 9 * i, f"{seed} {i}"), "choices": [words(2 + k, f"{seed} {i} {k}") for k in range(3)]}
        for i in range(n)
    ]


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """``task_folder(name=documents)``: a folder with those tasks of :data:`TASKS`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, documents(9, seed=1, length=10))))

    def make(**tasks):
        for name, docs in tasks.items():
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, docs)))
            files = {"test": str(folder / f"{name}.jsonl"), "train": str(folder / "train.jsonl")}
            head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}\n"
            (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{TASKS[name]}")
        return folder

    return make


@pytest.fixture
def shares():
    """``shares(make, ask)``: what process 0 of two is answered, and its model; they take turns in this one process."""

    def run(make, ask):
        sent = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "gather_object", lambda mine: sent.extend(mine) or sent[::-1])
            for rank in (1, 0):
                lm = make()
                lm.processes = types.SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0)
                answers = ask(lm)
        return answers, lm

    return run


def launch(folder, tasks, arguments, *more):
    """``python -m headq_ao.lm_eval run`` in two processes."""
    pairs = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["-m", "headq_ao.lm_eval", "run", "--model", "headq", "--model_args", pairs, "--batch_size", 2]
    return torchrun(2, *command, "--tasks", ",".join(tasks), "--include_path", folder, *more)


def leaves(answers):
    """The leaves of nested answers, numbers and texts: lm-eval's files have numbers and flags as text."""
    if isinstance(answers, list | tuple):
        return [leaf for each in answers for leaf in leaves(each)]
    try:
        return [float(str(answers))]
    except ValueError:
        return [str(answers)]


@pytest.mark.slow
def test_two_processes_equal_one(task_folder, tiny_folder, tmp_path):
    """Few-shot choices, repeated generation of a single document, texts; calibrated at the start; answers stored."""
    folder = task_folder(choices=documents(5), written=documents(1), rolling=documents(4, length=300))
    (tmp_path / "calibration.txt").write_text(words(600, "calibration"))
    arguments = {"pretrained": str(tiny_folder), "dtype": "float32", **SMALL}
    arguments |= {"calibration": str(tmp_path / "calibration.txt"), "calibration_tokens": 600}
    store = tmp_path / "answers"
    options = ["--log_samples", "--output_path", tmp_path / "out", "--use_cache", store, "--limit", 3]
    done = launch(folder, TASKS, arguments, *options)
    assert done.returncode == 0, done.stdout[-4000:]
    one = lm_eval.simple_evaluate(
        "headq", arguments, list(TASKS), limit=3, batch_size=2, device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, metadata=arguments),
    )  # fmt: skip

    (written,) = (tmp_path / "out").glob("**/results*.json")
    two = json.loads(written.read_text("utf-8"))
    assert done.stdout.count("|packed_fraction|") == 1 and len(re.findall(r"\|word_perplexity *\|", done.stdout)) == 1
    for task, expected in one["results"].items():
        found = two["results"][task]
        assert list(found) == list(expected)
        numbers = [name for name, value in expected.items() if not isinstance(value, str)]
        assert [found[name] for name in numbers] == pytest.approx([expected[name] for name in numbers], rel=1e-5)
    assert two["n-samples"] == one["n-samples"]
    headq = [results["config"]["headq"] for results in (one, two)]
    assert [each.pop("processes") for each in headq] == [1, 2]
    counts = [{name: task | {"bits": None} for name, task in each["tasks"].items()} for each in headq]
    assert counts[0] == counts[1] and {name: count["requests"] for name, count in counts[0].items()} == {
        "choices": 9, "written": 2, "rolling": 3,
    }  # fmt: skip
    assert headq[0]["config"] == json.loads(json.dumps(headq[1]["config"]))

    for task, expected in one["samples"].items():
        (file,) = (tmp_path / "out").glob(f"**/samples_{task}_*.jsonl")
        found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        assert [each["doc_id"] for each in found] == [each["doc_id"] for each in expected] == list(range(len(found)))
        for a, b in zip(expected, found, strict=True):
            assert b["prompt_hash"] == a["prompt_hash"]  # few-shot examples among it
            assert leaves(b["resps"]) == pytest.approx(leaves(a["resps"]), abs=1e-3)

    each = HeadQLM(**arguments, batch_size=2, device="cpu")
    for rank in range(2):  # each process has all answers, and one process goes on with them
        caching = CachingLM(each, f"{store}_rank{rank}.db")
        for task, kind in (("choices", "loglikelihood"), ("written", "generate_until")):
            asked = [Instance(kind, {}, pair, 0) for each in one["samples"][task] for pair in each["arguments"]]
            assert len(getattr(caching, kind)(asked)) == len(asked)
    assert each.tasks == {}


@pytest.mark.slow
def test_failure_of_one_process_ends_all(task_folder, tiny_folder):
    """Process 1 finds an empty choice while process 0 waits for its answers."""
    docs = documents(2)
    docs[1]["choices"][0] = ""
    done = launch(task_folder(choices=docs), ["choices"], {"pretrained": tiny_folder, **SMALL}, "--num_fewshot", 0)
    assert done.returncode != 0
    assert "got 69 and 0; is a choice empty?" in done.stdout
    assert "rank 1 of 2 processes; when one fails, all end" in done.stdout and "|packed_fraction|" not in done.stdout


@pytest.fixture
def make(tiny, tiny_folder):
    """``make(family)``: a function that makes the same model again and again."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    return lambda family="llama": lambda: HeadQLM(tiny(family).double(), tokenizer=tokenizer, batch_size=2, **SMALL)


def instances(kind, docs, task="task"):
    """Requests as lm-eval makes them, three choices of each document."""
    make = {
        "loglikelihood": lambda doc, k: (doc["text"], " " + doc["choices"][k]),
        "loglikelihood_rolling": lambda doc, k: (doc["text"],),
        "generate_until": lambda doc, k: (doc["text"], {"until": ["w0"], "max_gen_toks": 4}),
    }[kind]
    choices = range(3 if kind == "loglikelihood" else 1)
    return [Instance(kind, doc, make(doc, k), k, (task, i, 1)) for i, doc in enumerate(docs) for k in choices]


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_make_the_whole(make, shares, family):
    """The split itself, on each architecture: two tasks of which one has a single document."""
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        requests = instances(kind, documents(3), "three") + instances(kind, documents(1, seed=5), "one")
        whole = make(family)()
        expected = getattr(whole, kind)(requests)
        found, lm = shares(make(family), lambda lm, kind=kind, asked=requests: getattr(lm, kind)(asked))
        assert leaves(found) == pytest.approx(leaves(expected), abs=1e-9)
        counts = [{name: (t.requests, t.packed, t.read) for name, t in each.tasks.items()} for each in (whole, lm)]
        assert counts[0] == counts[1] and counts[0]["three"][1] > 0


def test_each_process_takes_its_share(make, shares, monkeypatch):
    """Every second document, whole: repeated requests of a document stay with one process."""
    requests = [each for each in instances("generate_until", documents(3)) for _ in range(2)]
    asked = []

    def answer(self, requests, disable_tqdm):
        asked.append([each.doc_id for each in requests])
        return [str(each.doc_id) for each in requests]

    monkeypatch.setattr(module.HFLM, "generate_until", answer)
    answers, lm = shares(make(), lambda lm: lm.generate_until(requests))
    assert asked == [[1, 1], [0, 0, 2, 2]]
    assert answers == ["0", "0", "1", "1", "2", "2"] and lm.tasks["task"].requests == 6


@pytest.mark.parametrize("lengths", [(10, 90), (10, 10)])
def test_packed_rows_of_any_process_count(make, shares, lengths):
    """A run fails if no process has read a packed token, and only then."""
    docs = [document for n in lengths for document in documents(1, length=n)]
    _, lm = shares(make(), lambda lm: lm.loglikelihood(instances("loglikelihood", docs)))
    if max(lengths) < 50:
        with pytest.raises(NothingPackedError, match="no packed token was read in task"):
            lm.get_model_info()
    else:
        info = lm.get_model_info()["headq"]
        assert info["processes"] == 2 and 0 < info["tasks"]["task"]["packed_fraction"] < 0.9


def test_stored_answers_of_all_processes(make, shares, tmp_path):
    """Of an unfinished run each process takes what the others hold; answers of another cache stop all."""
    requests = instances("loglikelihood", documents(2))

    def store(lm, rank):
        return CachingLM(lm, str(tmp_path / f"{rank}.db"))

    for rank in range(2):
        store(make()(), rank).loglikelihood(requests[3 * rank : 3 * rank + 3])
    _, lm = shares(make(), lambda lm: store(lm, lm.processes.process_index))
    assert all(hash_args("loglikelihood", each.args) in lm.cache_hook.dbdict for each in requests)

    (tmp_path / "1.db").unlink()
    store(HeadQLM(lm.model, tokenizer=lm.tokenizer, quantized=False), 1).loglikelihood(requests)

    def refused(lm):
        with pytest.raises(ModelArgumentError, match="answers of another model or cache"):
            store(lm, lm.processes.process_index)

    shares(make(), refused)
