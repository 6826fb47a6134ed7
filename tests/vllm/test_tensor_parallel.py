"""Two ranks on the CPU: each holds its own heads' pages, and they say what one says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engines import PLAIN

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(PLAIN, reason="of the plug-in")
def test_two_ranks_hold_half_of_the_heads_each_and_say_what_one_says(tiny):
    found = []
    for ranks in (1, 2):
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.tensor_parallel", *tiny, str(ranks)],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
        assert lines, done.stdout[-2000:] + done.stderr[-2000:]
        found.append(json.loads(lines[0]))
    one, two = found
    assert two["tokens"] == one["tokens"]
    assert [rank["kv_heads"] for rank in two["ranks"]] == [1, 1]
    first, second = (rank["page_bytes"] for rank in two["ranks"])
    assert [rank["kept"] for rank in two["ranks"]] == [[*map(max, first, second)]] * 2
    whole = one["ranks"][0]
    assert [a + b for a, b in zip(first, second, strict=True)] == whole["page_bytes"] == whole["kept"]
    assert first != second, "heads of different bits: the case that counts"
