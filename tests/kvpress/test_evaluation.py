"""HeadQPress in kvpress's evaluation, which `make test-kvpress` takes from the sdist: its own data are on a hub, so it
reads rows of RULER's form from a folder here."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

SPEC = importlib.util.find_spec("kvpress")
FOLDER = Path(SPEC.origin).parents[1] / "evaluation" if SPEC else Path("evaluation")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="kvpress's evaluation is not there: make test-kvpress")
RUN = """
import json, sys
from evaluate import CliEntryPoint
from evaluate_registry import DATASET_REGISTRY, PRESS_REGISTRY
from headq_ao import headq_config
from headq_ao.integrations.kvpress import HeadQPress

data, model, press, options, out = sys.argv[1:]
DATASET_REGISTRY["ruler"] = data
PRESS_REGISTRY["headq"] = HeadQPress(headq_config(warmup_tokens=32, residual_length=16, **json.loads(options)))
CliEntryPoint()("", dataset="ruler", model=model, press_name=press, output_dir=out, device="cpu", compression_ratio=0.5)
"""


@pytest.fixture
def evaluate(tiny_folder, tmp_path):
    """``evaluate(press, **options)``: rows of predictions.csv and the metrics."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder, bos_token="<s>")
    tokenizer.save_pretrained(tiny_folder)
    (tmp_path / "data").mkdir()
    rows = [
        {"task": task, "context": " ".join(f"w{i * step % 100}" for i in range(300)), "question": question}
        | {"answer": ["w1"], "answer_prefix": " w5", "max_new_tokens": 6}
        for task, step in (("niah_single", 7), ("qa_one", 9))
        for question in ("w1 w2", "w3")
    ]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def run(press, **options):
        out = tmp_path / f"out-{len(options)}-{press}"
        given = [str(tmp_path / "data"), str(tiny_folder), press, json.dumps(options), str(out)]
        path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
        told = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", RUN, *given]
        done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = out.iterdir()
        with open(folder / "predictions.csv", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        return found, json.loads((folder / "metrics.json").read_text(encoding="utf-8"))

    return run


def test_answers_scores_and_the_ratio_are_those_of_packed_tokens(evaluate):
    rows, scores = evaluate("headq")
    assert len(rows) == 4 and all(row["predicted_answer"] for row in rows)
    assert all(0 < float(row["compression_ratio"]) < 0.9 and row["compression_ratio"] != "0.5" for row in rows)
    assert set(scores) == {"niah_single", "qa_one"}
    assert all(0 <= score["string_match"] <= 100 for score in scores.values())


def test_at_eight_bits_it_says_what_no_press_says(evaluate):
    def answers(found):
        return sorted((row["task"], row["question"], row["predicted_answer"]) for row in found[0])

    exact = evaluate("no_press")
    fine = evaluate("headq", k_bits=8, v_bits=8)
    assert answers(fine) == answers(exact) and fine[1] == exact[1]
