"""The one command for all numbers: blocks, provenance, typed numbers, and the documents of this checkout."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from headq_ao.evals.results import __main__ as command
from headq_ao.evals.results import documents, messages, tables, versions
from headq_ao.evals.results.blocks import BLOCKS, block
from headq_ao.evals.results.provenance import CHANGED, History, footer

ROOT = Path(__file__).resolve().parents[3]
STORED = ROOT / "recipes" / "results"


def git(folder, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def project(tmp_path):
    """A repository with one source file, the stored result of a benchmark of it, and two documents."""
    git(tmp_path, "init", "-q")
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", "."), git(tmp_path, "commit", "-qm", "code")
    folder = tmp_path / "recipes" / "results" / "bench"
    folder.mkdir(parents=True)
    stored = json.loads((STORED / "bench" / "generate.json").read_text(encoding="utf-8"))
    stored["environment"]["git"] = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (folder / "generate.json").write_text(json.dumps(stored), encoding="utf-8")
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Title\n", encoding="utf-8")
    page = "before\n<!-- generated: generate -->\nold\n<!-- /generated -->\nafter\n"
    (tmp_path / "docs" / "deep" / "page.md").write_text(page, encoding="utf-8")
    sources = command.figure_sources(tmp_path / "recipes" / "results")
    (tmp_path / "recipes" / "results" / "report").mkdir()
    (tmp_path / "recipes" / "results" / "report" / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    return tmp_path


def run(project, *arguments):
    return command.main(["--root", str(project), *arguments])


def page_of(project):
    return (project / "docs" / "deep" / "page.md").read_text(encoding="utf-8")


def test_write_then_check(project, capsys):
    assert run(project, "--check") == 1
    assert "docs/deep/page.md: its numbers are not those" in capsys.readouterr().err and "old" in page_of(project)
    assert run(project) == 0 and "written: docs/deep/page.md" in capsys.readouterr().out
    text = page_of(project)
    assert text.startswith("before\n<!-- generated: generate -->\n| batch |") and text.endswith("-->\nafter\n")
    assert "old" not in text and CHANGED not in text
    assert run(project, "--check") == 0
    assert run(project) == 0 and capsys.readouterr().out == ""  # nothing to write


def test_an_edited_number_is_found(project, capsys):
    run(project)
    (project / "docs" / "deep" / "page.md").write_text(page_of(project).replace("| 1 | 1,024 |", "| 1 | 1,025 |"))
    assert run(project, "--check") == 1


def test_changed_code_is_marked_and_unchanged_code_is_not(project):
    run(project)
    (project / "ops" / "a.py").write_text("x = 2\n")
    assert run(project, "--check") == 1
    run(project)
    assert CHANGED in page_of(project)
    git(project, "add", "."), git(project, "commit", "-qm", "more")  # committing is no change
    assert run(project, "--check") == 0
    (project / "ops" / "a.py").write_text("x = 1\n")
    run(project)
    assert CHANGED not in page_of(project)


def test_without_a_history_the_mark_is_not_compared(project):
    (project / "ops" / "a.py").write_text("x = 2\n")
    run(project)
    assert CHANGED in page_of(project)
    shutil.rmtree(project / ".git")
    assert run(project, "--check") == 0


def test_numbers_typed_by_hand_are_found(project, capsys):
    run(project)
    (project / "README.md").write_text("| HeadQ | 0.0033 |\n\n```\n| code | 0.5 |\n```\n| `x=0.5` | a |\n")
    assert run(project, "--check") == 1
    told = capsys.readouterr().err
    assert "README.md:1: typed by hand: | HeadQ | 0.0033 |" in told and ":4:" not in told and ":6:" not in told


def test_figures_of_other_results_are_found(project, capsys):
    run(project)
    folder = project / "recipes" / "results" / "other"
    folder.mkdir()
    (folder / "a.json").write_text('{"no": "setting"}')
    assert run(project, "--check") == 0
    (folder / "b.json").write_text('{"score": {}}')
    assert run(project, "--check") == 1
    assert "figures were drawn from other results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "no generated block 'nothing'"), ("recipe frontier most", "no generated block")],
)
def test_no_such_block(project, name, message, capsys):
    assert run(project, "--print", name) == 2
    assert message in capsys.readouterr().err
    (project / "README.md").write_text(f"<!-- generated: {name} -->\n<!-- /generated -->\n")
    assert run(project) == 2


def test_a_missing_result(project, capsys):
    assert run(project, "--print", "presets") == 2
    assert "no result file" in capsys.readouterr().err


def test_footer_names_all_that_was_measured_with():
    env = {"versions": {"torch": "2.1", "transformers": "5.9"}, "date": "2026-01-02T03:04", "cpu": "C", "threads": 2}
    first = {"environment": env | {"git": {"commit": "a" * 40, "dirty": False}}}
    second = {"environment": env | {"git": {"commit": "b" * 40, "dirty": True}, "date": "2026-01-09", "device": "cpu"}}
    text = footer([first, second], "recipes/results/x", ("ops",), History(ROOT))
    assert "commits aaaaaaa, bbbbbbb; 2026-01-02 to 2026-01-09; torch 2.1, transformers 5.9; C, 2 threads" in text
    assert "uncommitted changes" in text
    assert CHANGED in text or not History(ROOT).known  # commits that are not in the history


@pytest.mark.parametrize("name", [*BLOCKS, "recipe wikitext", "recipe controls all", "recipe controls panel"])
def test_every_block_can_be_made(name):
    text = block(name).text(STORED, History(ROOT))
    assert text.count("| --") + text.count("|---") >= 1
    assert text.rstrip().endswith("</small>") or name.startswith("messages")


def test_controls_are_compared_row_by_row():
    def result(kl, options, calibrated=True):
        score = {"mean_kl": sum(kl) / len(kl), "kl_by_row": kl, "exact_perplexity": 20.4}
        protocol = dict(dtype="float32", rows=2, row_length=64, prefill=8, chunk=4, calibration_tokens=128)
        return dict(model="m", options=options, calibrated=calibrated, score=score, protocol=protocol)

    found = [
        result([0.1, 0.3], {"k_bits": 2}),
        result([0.2, 0.2], {"k_bits": 2, "value_weight": 0}),
        result([0.1, 0.1], {}, False),
        result([0.2, 0.2], {"value_weight": 0}, False),
    ]
    told = tables.controlled(found, {0: "none", 1: "all"}, 1, 0, lambda r: r["options"].get("value_weight", 1))
    assert "| 2 bits | 0.2 | 0.2 | 1.00 | 1 of 2 |" in told
    assert "| default bits, uncalibrated | 0.2 | 0.1 | 0.50 | 2 of 2 |" in told
    assert "ratio to none" in told and "perplexity 20; 2 rows of 64 tokens" in told


def test_every_message_of_the_library_is_in_a_topic():
    assert messages.left_out(ROOT) == []
    text = "".join(messages.table(ROOT, topic) for topic in messages.TOPICS)
    assert "| warning | HeadQ: …; this call runs on dense keys and values |" in text
    assert "| ValueError | preset must be one of … or None, got … |" in text
    assert text.count("\n") > 200


def test_messages_of_a_file(tmp_path):
    code = "warn(f'HeadQ: {x} is so')\nraise ValueError('a' 'b c ' + f'd {y}')\nraise E('short')\n"
    (tmp_path / "a.py").write_text(code)
    assert list(messages.messages(tmp_path / "a.py")) == [("warning", "HeadQ: … is so"), ("ValueError", "ab c d …")]


def test_the_documents_of_this_checkout():
    """What ``make lint`` checks too."""
    assert command.problems(ROOT, STORED) == []
    assert sum(len(documents.names(path.read_text(encoding="utf-8"))) for path in documents.documents(ROOT)) > 10


def test_versions_are_counted_from_reports(tmp_path):
    suite = '<testsuite tests="9" failures="1" errors="1" skipped="2" time="120"></testsuite>'
    for name in ("a.xml", "b.xml"):
        (tmp_path / name).write_text(f"<testsuites>{suite}</testsuites>", encoding="utf-8")
    out = tmp_path / "results" / "one.json"
    assert versions.main([str(tmp_path / "a.xml"), str(tmp_path / "b.xml"), "-o", str(out)]) == 0
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert stored["counts"] == {"tests": 18, "failures": 2, "errors": 2, "skipped": 4, "seconds": 240.0}
    older = stored | {"environment": {"versions": stored["environment"]["versions"] | {"transformers": "5.9.1"}}}
    (tmp_path / "results" / "two.json").write_text(json.dumps(older), encoding="utf-8")
    *_, first, last = versions.table(out.parent).splitlines()
    assert "| 5.9.1 | quick | 10 | 4 | 4 | 4 |" in first and "5.9.1" not in last
