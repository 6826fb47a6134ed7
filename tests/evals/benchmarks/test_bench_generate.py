"""The generation benchmark on a tiny random model: command from start to table, refusals, memory in a child."""

import json
import subprocess

import pytest
import torch

from headq_ao import headq_config
from headq_ao.evals.benchmarks import bench_generate, bench_memory
from headq_ao.evals.benchmarks.bench_generate import both, decode, filled
from headq_ao.evals.benchmarks.bench_timing import linear_fit

SMALL = [
    "--model", "tiny", "--contexts", "128", "160", "192", "--threads", "1", "--steps", "32", "--batch", "2",
    "--batch-context", "128", "--prefill-context", "128", "--prefill-repeats", "1", "--memory", "none",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(bench_generate, "load_average", lambda: 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_both_models_share_weights(tiny, token_ids):
    model = tiny(head_dim=64)
    ids = token_ids(1, 40)
    with torch.no_grad():
        before = model(ids).logits
        models = both(model, headq_config())
        assert torch.equal(model(ids).logits, before)
    assert not hasattr(models["dense"], "_headq") and hasattr(models["packed"], "_headq")
    for a, b in zip(models["dense"].parameters(), models["packed"].parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr()


def test_decoding_takes_turns(tiny, token_ids):
    models = both(tiny(head_dim=64), headq_config(warmup_tokens=32))
    caches = filled(models, token_ids(1, 160))
    found = decode(models, caches, token_ids(1, 1, seed=1), 32, threads=1)
    assert [caches[kind].get_seq_length() for kind in ("dense", "packed")] == [192, 192]
    assert all(len(found[kind]["steps_ms"]) == 32 for kind in ("dense", "packed"))
    assert found["speedup"] > 0 and found["packed"]["ms_mean"] >= min(found["packed"]["steps_ms"]) > 0
    assert found["dense"]["cache_bytes"] == 2 * 2 * 192 * 2 * 64 * 4
    assert found["packed"]["cache_bytes"] == caches["packed"].get_memory_footprint()


def test_linear_fit():
    fit = linear_fit([1, 2, 4, 8], [10, 12, 16, 24.0])
    assert fit == pytest.approx({"at_0": 8, "slope": 2, "r2": 1})
    assert linear_fit([1, 2, 3, 4], [1, 5, 2, 4])["r2"] < 0.5
    assert linear_fit([1, 2, 3], [4, 4, 4])["r2"] == 1.0


def test_command_from_start_to_table(tmp_path, capsys):
    json_path, plot = tmp_path / "out" / "bench.json", tmp_path / "bench.png"
    assert bench_generate.main([*SMALL, "--json", str(json_path)]) == 0
    assert "batch 2, 128 tokens, 1 threads" in capsys.readouterr().out
    result = json.loads(json_path.read_text(encoding="utf-8"))
    assert result["complete"]
    assert [(c["batch"], c["context"]) for c in result["cells"]] == [(1, 128), (1, 160), (1, 192), (2, 128)]
    assert [fit["cache"] for fit in result["fits"]] == ["dense", "packed"]
    assert result["prefill"][0]["ratio"] > 0 and result["memory"] == []

    memory = {"before": 10_000_000, "prefill_peak": 35_000_000, "decode_peak": 30_000_000, "after": 30_000_000}
    result["memory"] = [
        {
            "model": "tiny",
            "context": 100,
            "dense": memory | {"cache": 20_000_000},
            "packed": memory | {"cache": 3_000_000},
        }
    ]
    text = bench_generate.result_table(result)
    assert "| 1 | 160 |" in text and "| 2 | 128 |" in text
    assert "25 → 25 MB at the peak, 20 → 20 MB while decoding, of which the cache is 20 → 3 MB" in text

    pytest.importorskip("matplotlib")
    from headq_ao.evals.benchmarks.bench_plot import plot_generate

    plot_generate(result, plot)
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("fault", ["wrong rows", "nothing packed"])
def test_a_wrong_cache_is_not_reported(tmp_path, capsys, monkeypatch, fault):
    """Another model behind the packed cache, or full-precision tokens alone: exit status 1, no cell, no table."""
    arguments = [*SMALL]
    if fault == "wrong rows":
        monkeypatch.setattr(bench_generate, "KL_LIMIT", 1e-12)
        message = "the next token from the packed cache differs"
    else:
        arguments[arguments.index("--contexts") + 1 : arguments.index("--threads")] = ["40"]
        message = "no packed token was read"
    json_path = tmp_path / "bench.json"
    assert bench_generate.main([*arguments, "--json", str(json_path)]) == 1
    assert message in capsys.readouterr().err
    result = json.loads(json_path.read_text(encoding="utf-8"))
    assert result["cells"] == [] and not result["complete"] and message in result["refused"]
    with pytest.raises(ValueError, match="not whole"):
        bench_generate.result_table(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "10"], "multiple of 32"),
        (["--contexts", "0"], "at least 1"),
        (["--memory", "smollm2"], "MODEL:TOKENS"),
        (["--preset", "fast"], "preset must be one of"),
    ],
)
def test_bad_arguments_end_before_work(arguments, message, capsys):
    assert bench_generate.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [bench_generate, bench_memory])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert "example" in capsys.readouterr().out


@pytest.mark.skipif(not bench_memory.Resident.CLEAR.exists(), reason="this system does not tell peaks")
def test_memory_of_both_caches(capsys):
    """A 4k context: the dense cache is 16.8 MB, and the process grows by most of that at least."""
    found = {}
    for kind in bench_memory.CACHES:
        assert bench_memory.main(["--model", "tiny", "--context", "4096", "--cache", kind]) == 0
        found[kind] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["dense"]["cache"] == 4 * 2 * (4096 + bench_memory.STEPS) * 2 * 64 * 4
    assert found["packed"]["cache"] < found["dense"]["cache"] / 5
    for peak in ("prefill_peak", "decode_peak"):
        assert found["dense"][peak] - found["dense"]["before"] > 0.7 * found["dense"]["cache"]


def test_each_cache_has_a_process_of_its_own(monkeypatch, tmp_path):
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout='noise\n{"cache": 1}\n')

    monkeypatch.setattr(subprocess, "run", run)
    found = bench_memory.peaks("tiny", 64, "quality", tmp_path / "c.safetensors", threads=2)
    assert found == {"model": "tiny", "context": 64, "dense": {"cache": 1}, "packed": {"cache": 1}}
    for kind, command in zip(bench_memory.CACHES, commands, strict=True):
        assert command[1:7] == ["-m", "headq_ao.evals.benchmarks.bench_memory", "--model", "tiny", "--cache", kind]
        assert command[-4:] == ["--preset", "quality", "--calibration", str(tmp_path / "c.safetensors")]
    failed = subprocess.CompletedProcess([], 2, stdout="", stderr="warning\nerror: no such model\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="error: no such model"):
        bench_memory.peaks("none", 64, None, None, threads=1)


def test_memory_refuses_short_contexts(capsys):
    assert bench_memory.main(["--context", "8"]) == 2
    assert "context must be at least 32" in capsys.readouterr().err
