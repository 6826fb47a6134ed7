"""The GPU stages: tried on the CPU with tiny shapes, kernels in the interpreter; timed on a GPU only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headq_ao.evals.benchmarks.triton_table import Case
from headq_ao.evals.gpu import __main__ as gpu
from headq_ao.evals.gpu import chunks, coding, layers, profiles, report, steps

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_checks_pass_on_the_cpu():
    """The same functions that guard the timings, over the CPU's operators."""
    assert max(layers.output_errors(Case(4, 2, 64, 2, 2), 1, 96, CPU)) <= layers.OUTPUT_ERROR
    assert max(layers.output_errors(Case(4, 1, 32, 3, 3), 2, 96, CPU)) <= layers.OUTPUT_ERROR
    assert chunks.error(Case(4, 2, 32, 2, 2), CPU, (2, 3)) <= layers.BF16_ERROR
    assert coding.same_rows(16, CPU) >= coding.SAME_ROWS


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(layers, "output_errors", lambda *_: (0.0, 0.1))
    monkeypatch.setattr(layers, "compare", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"differs from the reference by 0\.1"):
        layers.measure(gpu.CASES, gpu.CELLS, 1, CPU, None)
    monkeypatch.setattr(chunks, "error", lambda *_: 0.1)
    monkeypatch.setattr(chunks, "compare", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match=r"a chunk differs from the reference by 0\.1"):
        chunks.measure(gpu.CASES, gpu.CHUNKS, 1, CPU, None)
    monkeypatch.setattr(coding, "same_rows", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match=r"only 50\.0%"):
        coding.measure((64,), 8, 1, 100, CPU, 1, None)


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All stages, each in a process of its own, leave a whole result."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "headq_ao.evals.gpu", "--dry-run", "--limit", "400", "--out", str(tmp_path)]
    run = subprocess.run(
        [*command, "--stages", "steps", "layers", "profile"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "at most 1200 s" in run.stdout
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert found.keys() == {"steps", "layers", "profile"} and all(result["complete"] for result in found.values())
    (step,) = found["steps"]["rows"]
    assert step["batch"] == 1 and step["kl"] < 1e-3 and step["packed"]["ms"] > 0
    layer, mix, chunk = found["layers"]["rows"]
    assert layer["times_as_fast"] > 0 and mix["mix"] == [2, 3]
    assert (chunk["new"], chunk["packed"]) == (40, 160) and chunk["over_flash"] > 0
    assert max(found["layers"]["chunk_errors"].values()) <= layers.BF16_ERROR
    table = report.chunks_table([chunk])
    assert "| 4/2/32, 2/2 |" in table and "| 40 over 160 |" in table and not report.chunks_table([])

    rows = {(r["cache"], r["phase"]): r for r in found["profile"]["rows"]}
    assert list(rows) == [(cache, phase) for cache in ("dense", "packed") for phase in profiles.PHASES]
    for row in rows.values():
        named = list(row["kernels"].values())
        assert row["microseconds"] == pytest.approx(sum(x["microseconds"] for x in named)) and len(named) > 5
        assert named[0]["microseconds"] == max(x["microseconds"] for x in named) and named[0]["launches"] >= 1
    table = report.profile_table(found["profile"], 2)
    assert table.count("× dense") == 3 and len(table.splitlines()) == 2 + 6


def test_kernels_by_name():
    """Of a trace: one category alone, launches counted, times added, the most of each counter."""
    one = {"cat": "kernel", "name": "f", "dur": 2.0, "args": {"registers per thread": 40, "shared memory": 512}}
    other = {"cat": "kernel", "name": "g", "dur": 9.0, "args": {"est. achieved occupancy %": 31}}
    trace = [one, {"cat": "cuda_runtime", "name": "f", "dur": 50.0}, {"ph": "M", "name": "f"}, other,
             one | {"dur": 3.0, "args": {"registers per thread": 64}}]  # fmt: skip
    found = profiles.by_name({"traceEvents": trace}, "kernel")
    assert list(found.items()) == [
        ("g", {"launches": 1, "microseconds": 9.0, "occupancy_percent": 31}),
        ("f", {"launches": 2, "microseconds": 5.0, "registers": 64, "shared_bytes": 512}),
    ]


def test_a_stage_that_takes_too_long_is_cut(tmp_path, capfd):
    assert gpu.main(["--dry-run", "--stages", "coding", "--limit", "1", "--out", str(tmp_path)]) == 1
    assert "coding was cut after 1 s" in capfd.readouterr().out


def test_sequences_do_not_share_what_is_timed(tiny, token_ids):
    """A batch reads as much memory as so many prompts would."""
    from headq_ao import headq_config, quantize_

    model = tiny(head_dim=64)
    quantize_(model, headq_config(k_bits=8, v_bits=8))
    ids = token_ids(1, 300)
    with torch.no_grad():
        cache, _ = steps.filled("packed", model, ids, 3)
        pages = cache.batch.tables[None].host
        assert len(set(pages.flatten().tolist())) == pages.numel()
        step, first = steps.one_step(model, cache, ids[:, -1:].repeat(3, 1), 300)
        alone, _ = steps.filled("packed", model, ids, 1)
        _, expected = steps.one_step(model, alone, ids[:, -1:], 300)
        step()
    torch.testing.assert_close(first[0], expected[0].expand(3, -1), rtol=1e-4, atol=1e-4)
