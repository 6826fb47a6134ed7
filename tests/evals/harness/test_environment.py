"""What results say about their making, and what they keep to themselves."""

import json

from headq_ao.evals.harness import environment


def test_is_plain_and_complete():
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"versions", "device", "cpu", "threads", "git", "date", "command"}
    assert found["cpu"] and found["threads"] >= 1


def test_command_hides_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path / "bin" / "python3"), str(tmp_path / "recipes" / "run.py"), "/far/away/core.yaml"]
    arguments += ["--wikitext=/far/away/wikitext", "--set", "k_bits=3"]
    expected = "python recipes/run.py core.yaml --wikitext=wikitext --set k_bits=3"
    assert environment.command_line(arguments) == expected


def test_git_state_is_of_this_package(tmp_path, monkeypatch):
    """A package installed below somebody else's checkout has no commit."""
    monkeypatch.setattr(environment.headq_ao, "__file__", str(tmp_path / "headq_ao" / "__init__.py"))
    assert environment.git_state() is None
