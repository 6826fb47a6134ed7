"""The command ``python -m headq_ao.evals.report``; ``--help`` has examples."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from headq_ao.evals.report.read import find_folders
from headq_ao.evals.report.write import write_report

EPILOG = """\
examples:
  python -m headq_ao.evals.report                                  all recipes of ./recipes/results
  python -m headq_ao.evals.report --recipe wikitext frontier       these recipes only
  python -m headq_ao.evals.report --results elsewhere/results --out elsewhere/report

The results are those of recipes/run.py, one folder per recipe and one file per setting. --out gets report.html, which
holds everything it shows and needs no network, and each plot as a PNG file. Plots need the extra 'plot'.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.report",
        description="Draw the results of recipes, and write one HTML page that says which setting to pick.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=Path("recipes/results"), help="folder of results (./recipes/results)")
    add("--recipe", nargs="+", action="extend", default=[], metavar="NAME", help="recipes to report (all with scores)")
    add("--out", type=Path, default=Path("out/report"), metavar="FOLDER", help="for the page and PNGs (./out/report)")
    add("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, got the file {args.out}")
    try:
        folders = find_folders(args.results, args.recipe)
        page = write_report(folders, args.out, progress=not args.no_progress)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(f"written: {page}, and its plots as PNG files beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
