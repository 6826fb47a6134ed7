"""The table of modes and architectures: each mark names a test that exists and is collected."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r'\[✓\]\(\.\./(tests/[\w/]+\.py) "([^"]+)"\)')


@pytest.mark.slow
def test_every_mark_is_a_collected_test():
    page = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
    table = page.split("<!-- modes -->")[1].split("<!-- /modes -->")[0]
    marks = {f"{path}::{test}" for path, test in MARK.findall(table)}
    assert len(marks) > 50
    assert table.count("✓") == len(MARK.findall(table))
    files = sorted({mark.split("::")[0] for mark in marks})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=150)
    assert done.returncode == 0, done.stdout[-3000:]
    # xdist's loadgroup appends "@group" to the names of grouped tests; plain collection does not
    assert marks <= set(done.stdout.splitlines()), sorted(marks - set(done.stdout.splitlines()))
