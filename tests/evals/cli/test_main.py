"""``headq``: help that is there at once, and the exit codes."""

import importlib.util
import subprocess
import sys

import pytest

from headq_ao.evals.cli import __main__ as cli
from headq_ao.evals.cli import lm_eval

NAMES = [command.NAME for command in cli.COMMANDS]
LIGHT = """
import sys
from headq_ao.evals.cli.__main__ import main
try:
    main(["--help"])
except SystemExit:
    pass
print(*sorted({"torch", "transformers", "torchao"} & {*sys.modules}), file=sys.stderr)
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "" and "exit codes" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_examples(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "examples:" in shown and f"headq {name.removesuffix('uate')} " in shown


def test_lm_eval_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "headq_ao.evals.lm_eval", raising=False)
    monkeypatch.delitem(sys.modules, "headq_ao.evals.lm_eval.__main__", raising=False)
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else own(name, *more)
    )
    assert lm_eval.main() == 2
    told = capsys.readouterr().err
    assert told == "headq: headq_ao.evals.lm_eval needs lm-eval: pip install 'headq_ao[lm-eval]'\n"


def test_headq_alone_shows_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    for command in cli.COMMANDS:  # each on a line with its title
        assert any(line.split()[:1] == [command.NAME] and len(line.split()) > 3 for line in lines)


class OutOfMemoryError(RuntimeError):
    """torch's, by its name."""


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("so"), 1), (KeyboardInterrupt(), 130), (ImportError("so"), 1), (OutOfMemoryError("so"), 1)],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(cli.calibrate, "run", fail)
    assert cli.main(["calibrate", "m", "-o", "x"]) == code
    assert capsys.readouterr().err.startswith("headq: ")
