"""``headq`` and ``python -m headq_ao.evals.cli``: the parser and the exit codes."""

import argparse
import gc
import os
import sys
from collections.abc import Sequence

from headq_ao.evals.cli import calibrate, chat, compare, doctor, estimate, evaluate, loading
from headq_ao.evals.cli.console import PROG, HelpFormatter, UsageError, complain, warnings_as_notes

COMMANDS = (doctor, estimate, calibrate, evaluate, compare, chat)
DESCRIPTION = """\
A packed KV cache for Hugging Face causal language models: keys and values in about 2.5 bits each.

Start with `headq doctor` (does it run well here?) and `headq calibrate MODEL -o FILE` (once per model)."""
EPILOG = """\
exit codes: 0 done; 1 the run failed; 2 refused before any work (a wrong option, a missing file); 130 interrupted.
Results go to stdout, everything else to stderr. `headq COMMAND --help` has examples."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported for it."""
    parser = argparse.ArgumentParser(PROG, description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def version() -> str:
    """``headq`` and the package's version."""
    import headq_ao

    return f"{PROG} {headq_ao.__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Without arguments it is the script ``headq``."""
    if argv is None:  # what imports make stays: the collector would go through all of it again and again
        gc.set_threshold(100_000, 100, 100)
    return command(sys.argv[1:] if argv is None else argv)


def command(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv or ["--help"])
    try:
        with warnings_as_notes():
            code: int = args.run(args)
            return code
    except UsageError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:  # who reads the result has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        complain(loading.told(error))
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        complain(f"{loading.first_line(error)} Take a smaller --batch-size or shorter rows, or another --device")
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
