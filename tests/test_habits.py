"""One version, links that lead somewhere, a README of a page, and pins for all that pyproject.toml asks for."""

import re
from pathlib import Path

import pytest
import tomllib
import yaml

import headq_ao
from headq_ao.evals.results import links

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+?)(?:#([\w-]+))?(?: \"[^\"]*\")?\)")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_in_one_place_and_the_others_agree():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert yaml.safe_load(text("CITATION.cff"))["version"] == headq_ao.__version__
    assert re.search(r"^## ([\d.]+)", text("CHANGELOG.md"), re.MULTILINE)[1] == headq_ao.__version__


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links(name):
    """MkDocs checks those of docs itself."""
    found = LINK.findall(text(name))
    assert found or name == "CHANGELOG.md"
    for path, anchor in found:
        assert (ROOT / path).exists(), path
        if anchor:
            heads = {
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", text(path), re.M)
            }
            assert anchor in heads, f"{path}#{anchor}"


def test_a_package_index_gets_absolute_links(tmp_path, capsys):
    readme, site = tmp_path / "README.md", "https://host/owner/name/blob/v1"
    readme.write_text(text("README.md"), encoding="utf-8")
    assert links.main([site, str(readme)]) == 0
    made = readme.read_text(encoding="utf-8")
    assert LINK.findall(text("README.md")) and LINK.findall(made) == []
    assert f"]({site}/docs/results.md" in made and f"]({site.replace('blob', 'raw')}/recipes/results/" in made
    with pytest.raises(SystemExit):
        links.main(["docs", str(readme)])


def test_readme_is_a_page():
    assert len(text("README.md").splitlines()) <= 150


def test_what_is_asked_for_is_pinned():
    lines = [*text("constraints.txt").splitlines(), *text("constraints-vllm.txt").splitlines()]
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    pins |= {"vllm"} & {name.removesuffix("-cpu") for name in pins}  # the distribution for CPUs
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(need for needs in extras.values() for need in needs)]
    names = {re.match(r"[\w-]+", need)[0].lower().replace("_", "-") for need in asked}
    assert names <= pins, names - pins


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_templates(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and all(part["attributes"]["label"] for part in form["body"])
