"""The Triton kernels compiled for GPUs that are not here: no spills, and room for enough warps."""

import json
import re
from pathlib import Path

import pytest

from headq_ao.evals import triton_table as table
from headq_ao.ops.layout import PIECES

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
LEAST_WARPS = 8  # on a processor: two for each of its schedulers


def budget(found):
    assert found["spills"] == 0
    assert found["shared_bytes"] <= 32 << 10
    assert found["warps_per_processor"] >= LEAST_WARPS
    assert found["binary_bytes"] > 1000


@pytest.mark.parametrize("case", table.CASES, ids=str)
@pytest.mark.parametrize("target", table.CHIPS)
def test_decode_attention(target, case):
    """The loop's instructions per token stay near what the result file reports (measured 8 to 38)."""
    chip = table.CHIPS[target]
    kernel, finish = table.decode_kernels(case, target)
    budget(table.resources(kernel, chip))
    budget(table.resources(finish, chip))
    parts = 8 // min(PIECES[case.v_bits])
    per_token = table.loop_instructions(kernel, chip) * kernel.metadata.num_warps / (16 * parts)
    assert 6 < per_token < 6 + 0.06 * case.head_dim * (case.k_bits + case.v_bits)
    roof = table.roofline(case, per_token, chip)
    assert 1.5 < roof["over_bf16"] <= roof["byte_ratio"]


@pytest.mark.parametrize("width", table.WIDTHS)
@pytest.mark.parametrize("target", table.CHIPS)
def test_feedback_codes(target, width):
    budget(table.resources(table.feedback_kernel(width, target), table.CHIPS[target]))


BEGIN, END = "<!-- triton -->", "<!-- /triton -->"


def test_readme_shows_the_stored_result(tmp_path):
    readme = Path(__file__).resolve().parents[2] / "README.md"
    result = json.loads(table.RESULT.read_text(encoding="utf-8"))
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(f"{BEGIN}.*{END}", BEGIN + END, readme.read_text(), flags=re.DOTALL))
    assert table.main(["--readme", str(copy)]) == 0
    assert copy.read_text() == readme.read_text()
    assert len(result["decode_attention"]) == len(table.CASES) * len(table.CHIPS)
    assert all(row["spills"] == 0 for row in result["decode_attention"] + result["feedback_codes"])


def test_a_readme_without_marks_is_refused(tmp_path, capsys):
    (tmp_path / "README.md").write_text("nothing\n")
    assert table.main(["--readme", str(tmp_path / "README.md")]) == 2
    assert "has no lines" in capsys.readouterr().err
