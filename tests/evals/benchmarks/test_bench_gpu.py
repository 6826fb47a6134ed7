"""The GPU benchmark: its checks run anywhere, its timings only on a GPU."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from headq_ao.evals.benchmarks import bench_gpu
from headq_ao.evals.benchmarks.triton_table import Case

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_did_not_run(tmp_path, capsys):
    assert bench_gpu.main(["--json", str(tmp_path / "bench.json")]) == 0
    assert "did not run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_checks_pass_on_the_cpu():
    """The same functions that guard the timings, over the CPU's operators."""
    assert max(bench_gpu.output_errors(Case(4, 2, 64, 2, 2), 1, 96, CPU)) <= bench_gpu.OUTPUT_ERROR
    assert max(bench_gpu.output_errors(Case(4, 1, 32, 3, 3), 2, 96, CPU)) <= bench_gpu.OUTPUT_ERROR
    assert bench_gpu.same_rows(16, CPU) >= bench_gpu.SAME_ROWS


def test_wrong_results_are_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gpu, "output_errors", lambda *_: (0.0, 0.1))
    monkeypatch.setattr(bench_gpu, "same_rows", lambda *_: 1.0)
    monkeypatch.setattr(bench_gpu, "compare", lambda *_: pytest.fail("timed"))
    assert bench_gpu.main(["--json", str(tmp_path / "bench.json")]) == 1
    assert "nothing was timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--cells", "4096"], ["--cells", "1x100"], ["--steps", "0x64"], ["--layers", "0"]]
)
def test_wrong_arguments_are_refused(arguments, capsys):
    assert bench_gpu.main(arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_table_and_plot_of_a_result(tmp_path):
    pytest.importorskip("matplotlib")
    from headq_ao.evals.benchmarks.bench_plot import plot_gpu

    times = {"packed": 10.0, "attend": 12.0, "bf16": 40.0, "gqa": 50.0, "folded": 200.0}
    row = {
        **dataclasses.asdict(bench_gpu.CASES[0]), "batch": 2, "slots": 4096, "microseconds": times,
        "packed_gb_per_s": 1000.0, "bf16_gb_per_s": 2000.0,
    }  # fmt: skip
    kind = {"ms": 2.0, "ms_mean": 2.5, "prefill_s": 1.0, "cache_bytes": 3e6, "peak_bytes": 4e6}
    result = {
        "complete": True, "errors": {"x": 1e-4}, "same_rows": {"64": 1.0}, "copy_gb_per_s": 2500.0, "rows": [row],
        "encode": [{"width": 64, "rows": 8, "microseconds": 5.0}],
        "steps": [{"model": "m", "batch": 1, "context": 8, "dense": kind, "packed": kind, "kl": 0.0}],
        "environment": {"device": "chip", "versions": {"torch": "2", "triton": "3"}},
    }  # fmt: skip
    text = bench_gpu.readme_table(result)
    assert (
        "| 32/8/128, 2/2 | 2 × 4,096 | 10.0 | 12.0 | 40.0 | 50.0 | 200.0 | 3.33 / 4.17 / 16.67 | 1000 / 2000 |" in text
    )
    assert "| m, 1 × 8 | 2.0 | 2.0 | 1.00 | 2.5 / 2.5 | 3 → 3 | 4 → 4 |" in text
    with pytest.raises(ValueError, match="not whole"):
        bench_gpu.readme_table(result | {"complete": False})
    assert "cut off" in bench_gpu.readme_table(result | {"complete": False, "note": "cut off"})
    plot_gpu(result, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 5000


def test_readme_shows_the_stored_result(tmp_path):
    readme = Path(__file__).resolve().parents[3] / "README.md"
    copy = tmp_path / "README.md"
    begin, end = "<!-- bench_gpu -->", "<!-- /bench_gpu -->"
    copy.write_text(re.sub(f"{begin}.*{end}", begin + end, readme.read_text(), flags=re.DOTALL))
    assert bench_gpu.main(["--readme", str(copy)]) == 0
    assert copy.read_text() == readme.read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_writes_a_result(tmp_path):
    path = tmp_path / "bench.json"
    cells = ["--cells", "1x1024", "--steps", "2x600", "--layers", "1"]
    assert bench_gpu.main([*cells, "--repeats", "3", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len(result["rows"]) == len(bench_gpu.CASES) and len(result["steps"]) == 1
    assert "HeadQ" in bench_gpu.readme_table(result)
