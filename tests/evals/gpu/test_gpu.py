"""The GPU stages: tried on the CPU with tiny shapes, kernels in the interpreter; timed on a GPU only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headq_ao.evals.benchmarks.triton_table import Case
from headq_ao.evals.gpu import __main__ as gpu
from headq_ao.evals.gpu import chunks, coding, layers, report, steps

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
    run = subprocess.run([*command, "--stages", "steps", "layers"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "at most 800 s" in run.stdout
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert found.keys() == {"steps", "layers"} and all(result["complete"] for result in found.values())
    (step,) = found["steps"]["rows"]
    assert step["batch"] == 1 and step["kl"] < 1e-3 and step["packed"]["ms"] > 0
    layer, mix, chunk = found["layers"]["rows"]
    assert layer["times_as_fast"] > 0 and mix["mix"] == [2, 3]
    assert (chunk["new"], chunk["packed"]) == (40, 160) and chunk["over_flash"] > 0
    assert max(found["layers"]["chunk_errors"].values()) <= layers.BF16_ERROR
    table = report.chunks_table([chunk])
    assert "| 4/2/32, 2/2 |" in table and "| 40 over 160 |" in table and not report.chunks_table([])


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
