"""``python -m headq_ao.evals.results``; ``--help`` has examples."""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from headq_ao.evals.harness.environment import write_json
from headq_ao.evals.results import documents, neighbours
from headq_ao.evals.results.blocks import BLOCKS, block
from headq_ao.evals.results.provenance import History

DRAWN = ("bench/decode.json", "bench/generate.json")  # have figures, as recipes' settings have
EPILOG = """\
examples:
  python -m headq_ao.evals.results                      write every block of README.md and docs from recipes/results
  python -m headq_ao.evals.results --check              change nothing; 1 where a block is stale or a number was typed
  python -m headq_ao.evals.results --figures            draw the figures of recipes/results again, too (minutes)
  python -m headq_ao.evals.results --print "recipe frontier all"

A block stands between <!-- generated: NAME --> and <!-- /generated -->. Below it a line names the commit, versions and
machine of its results, and says where the code that they describe has changed since. Table rows with measurements
outside all blocks count as typed by hand.
"""


def figure_sources(results: Path) -> dict[str, str]:
    """A checksum of each result file that figures are drawn from, by name."""
    found = [
        path for path in results.glob("*/*.json") if path.relative_to(results).as_posix() in DRAWN or _scored(path)
    ]
    paths = sorted(path for path in found if path.parent.name != "report")
    return {path.relative_to(results).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def _scored(path: Path) -> bool:
    """Whether it is a setting of a recipe, which the report draws."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(stored, dict) and "score" in stored


def draw(results: Path) -> None:
    """The report's figures and those of the benchmarks, with a note of what they were drawn from.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from headq_ao.evals.benchmarks.bench_plot import plot_decode, plot_generate
    from headq_ao.evals.report.read import find_folders
    from headq_ao.evals.report.write import write_report

    write_report(find_folders(results, []), results / "report")
    neighbours.plot(results, results / "report" / "neighbours.png")
    for name, plot in zip(DRAWN, (plot_decode, plot_generate), strict=True):
        path = results / name
        plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    write_json(results / "report" / "sources.json", figure_sources(results))


def problems(root: Path, results: Path) -> list[str]:
    """What ``--check`` finds: stale blocks, typed numbers, figures of other results."""
    history, found = History(root), list[str]()
    make = functools.cache(lambda name: block(name).text(results, history))
    for path in documents.documents(root):
        where, text = path.relative_to(root), path.read_text(encoding="utf-8")
        if not documents.same(documents.filled(text, make), text, history.known):
            found.append(f"{where}: its numbers are not those of the stored results")
        found += [f"{where}:{n}: typed by hand: {line.strip()[:100]}" for n, line in documents.typed(text)]
    drawn = results / "report" / "sources.json"
    if not drawn.is_file() or json.loads(drawn.read_text(encoding="utf-8")) != figure_sources(results):
        found.append("recipes/results/report: figures were drawn from other results; run with --figures")
    return found


def write(root: Path, results: Path) -> list[Path]:
    """Fill all blocks; returns the documents that changed."""
    history, changed = History(root), list[Path]()
    make = functools.cache(lambda name: block(name).text(results, history))
    for path in documents.documents(root):
        old = path.read_text(encoding="utf-8")
        new = documents.filled(old, make)
        if new != old:
            documents.write(path, new)
            changed.append(path)
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.results",
        description="Write every number of README.md and docs from the stored results.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (.)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something is stale")
    parser.add_argument("--figures", action="store_true", help="draw the figures again (needs matplotlib)")
    parser.add_argument("--print", dest="name", metavar="NAME", help=f"print one block: {', '.join(BLOCKS)}, …")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    results = root / "recipes" / "results"
    try:
        if args.name:
            print(block(args.name).text(results, History(root)))
            return 0
        if args.check:
            found = problems(root, results)
            print(*found, *(["run: python -m headq_ao.evals.results"] if found else []), sep="\n", file=sys.stderr)
            return int(bool(found))
        if args.figures:
            draw(results)
        for path in write(root, results):
            print(f"written: {path.relative_to(root)}")
    except (ValueError, OSError, KeyError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
