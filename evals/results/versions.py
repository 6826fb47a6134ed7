"""What a test run in an environment of other versions left: ``python -m headq_ao.evals.results.versions --help``."""

import argparse
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.table import markdown_table

COUNTS = ("tests", "failures", "errors", "skipped")
PACKAGES = ("python", "torch", "torchao", "transformers")


def counts(reports: Sequence[Path]) -> dict[str, Any]:
    """Tests, failures, errors, skipped tests and seconds of pytest's ``--junitxml`` files, summed."""
    suites = [suite for path in reports for suite in ET.parse(path).getroot().iter("testsuite")]
    found: dict[str, Any] = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in COUNTS}
    return {**found, "seconds": sum(float(suite.get("time", 0)) for suite in suites)}


def table(folder: Path) -> str:
    """A row for each combination of versions, oldest first; what was not run is named beneath the table in the page."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    rows = []
    for result in sorted(found, key=_versions):
        n, versions = result["counts"], result["environment"]["versions"]
        passed = n["tests"] - n["failures"] - n["errors"] - n["skipped"]
        shown = [str(passed), str(n["skipped"]), str(n["failures"] + n["errors"]), f"{n['seconds'] / 60:.0f}"]
        rows.append([*(versions[name] for name in PACKAGES), result["part"], *shown])
    header = ["Python", "torch", "torchao", "transformers", "tests of", "passed", "skipped", "failed", "minutes"]
    return markdown_table(header, rows, left=5)


def _versions(result: dict[str, Any]) -> list[list[int]]:
    versions = result["environment"]["versions"]
    return [_numbers(versions[name]) for name in PACKAGES[::-1]]


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split("+")[0].split(".") if part.isdigit()]


def main(argv: Sequence[str] | None = None) -> int:
    """Store the counts beside the versions of this environment."""
    parser = argparse.ArgumentParser("python -m headq_ao.evals.results.versions", description=__doc__)
    parser.add_argument("reports", nargs="+", type=Path, help="of pytest --junitxml, run with this Python")
    parser.add_argument("--part", default="quick", help="which tests ran (quick)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the result, recipes/results/versions/NAME.json")
    args = parser.parse_args(argv)
    write_json(args.out, {"part": args.part, "counts": counts(args.reports), "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
