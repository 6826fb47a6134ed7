"""The GPU benchmark: its checks run anywhere, its timings only on a GPU."""

import json

import pytest
import torch

from headq_ao.evals import bench_gpu
from headq_ao.evals.triton_table import Case

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_it_did_not_run(tmp_path, capsys):
    assert bench_gpu.main(["--json", str(tmp_path / "bench.json")]) == 0
    assert "did not run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_checks_pass_on_the_cpu():
    """The same functions that guard the timings, over the CPU's operators."""
    assert bench_gpu.output_error(Case(4, 2, 64, 2, 2), 96, CPU) <= bench_gpu.OUTPUT_ERROR
    assert bench_gpu.output_error(Case(4, 1, 32, 3, 3), 96, CPU) <= bench_gpu.OUTPUT_ERROR
    assert bench_gpu.same_rows(16, CPU) >= bench_gpu.SAME_ROWS


def test_wrong_results_are_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gpu, "output_error", lambda *_: 0.1)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_writes_a_result(tmp_path):
    path = tmp_path / "bench.json"
    cells = ["--cells", "1x1024", "--steps", "2x600", "--layers", "1"]
    assert bench_gpu.main([*cells, "--repeats", "3", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert len(result["rows"]) == len(bench_gpu.CASES) and len(result["steps"]) == 1
    assert "HeadQ" in bench_gpu.readme_table(result)
