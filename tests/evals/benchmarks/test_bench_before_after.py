"""The comparison of two versions: the command with one version on both sides, and what it refuses."""

import json
import subprocess
import sys

import pytest

from headq_ao.evals.benchmarks import bench_before_after as bench

TINY = ["--before", sys.executable, "--model", "tiny", "--quick", "--contexts", "256"]


def test_help_names_every_cell(capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(["--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert all(f"\n  {cell} " in told for cell in bench.CELLS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--before needs"),
        (["--before", "python", "--only", "step,speed"], "--only takes step, .*got speed"),
        (["--before", "python", "--contexts", "100"], "at least 200 tokens"),
        (["--before", "python", "--steps", "20"], "multiple of 32"),
    ],
)
def test_what_cannot_be_measured(arguments, message, capsys):
    assert bench.main(arguments) == 2
    capsys.readouterr().err.index("error: ")
    with pytest.raises(ValueError, match=message):
        bench.checked(bench.parser().parse_args(arguments))


@pytest.mark.slow
def test_one_version_on_both_sides(tmp_path, capsys):
    """Equal bytes and equal calls; cells have their rows."""
    path = tmp_path / "result.json"
    assert bench.main([*TINY, "--only", "step,spread,beams,calls,prefill", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["complete"] and result["sides"]["before"] == result["sides"]["after"]
    rows = {row["cell"]: row for row in result["rows"]}
    assert rows.keys() >= {
        "step, model, 256 tokens, median", "step, layer, 256 tokens, mean", "cache, 256 tokens",
        "prefill, model, 256 tokens", "prefill, model in bf16, 256 tokens",
    }  # fmt: skip
    exact = [row for name, row in rows.items() if row["unit"] in ("calls", "files") or name.startswith("cache")]
    assert len(exact) == 6 and all(row["before"] == row["after"] > 0 for row in exact)
    assert rows["cache, 256 tokens"]["dense"] > rows["cache, 256 tokens"]["after"]
    assert all(row["after"] > 0 for row in rows.values())
    assert rows["16 continuations, 256 tokens"]["after"] >= rows["cache, 256 tokens"]["after"]
    assert all(name in capsys.readouterr().out for name in ["before / after"])


@pytest.mark.slow
def test_a_side_that_fails_is_named(capsys, monkeypatch):
    """Too short a context reads no packed token: refused, with the side and the reason."""
    monkeypatch.setattr(bench, "checked", lambda args, checked=bench.checked: shortened(checked(args)))
    assert bench.main([*TINY, "--only", "step"]) == 1
    assert "refused: before, fill: RuntimeError: no packed token was read at 20 tokens" in capsys.readouterr().err


def shortened(args):
    args.contexts = [20]
    return args


def test_sides_that_differ_are_refused():
    """A step is not timed where one side predicts another text."""

    class Faulty(bench.Run):
        def __init__(self):
            self.settings = bench.checked(bench.parser().parse_args([*TINY, "--only", "step"]))

        def both(self, do, **arguments):
            return {"before": {"nll": 3.0, "bytes": 1}, "after": {"nll": 3.2, "bytes": 1}}

    with pytest.raises(RuntimeError, match=r"the sides differ by 0\.2 nats a token at 256 tokens"):
        Faulty().fill(bench.MODEL, 256, dense=False)


def test_the_worker_runs_as_a_file_from_anywhere(tmp_path):
    """As the other version's interpreter runs it: by path, without this folder's modules on the import path."""
    command = [sys.executable, "-P", bench.__file__, "--worker"]
    done = subprocess.run(
        command, input='{"do": "drop"}\n{"do": "no"}\n', capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {"result": None} and second["error"].startswith("AttributeError")
