"""One version, links that lead somewhere, a README of a page, pins for what is asked for, tests for each module."""

import ast
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


# Folders whose tests run by themselves, in an environment of their own.
APART = {"integrations/vllm": "vllm", "integrations/kvpress": "kvpress"}
UNTESTED = {"headq_ao/lm_eval.py": "an alias: tests/evals/lm_eval"}


def home_of(module):
    """``headq_ao/FOLDER/NAME.py``: ``tests/FOLDER/test_NAME.py``; ``ops/FOLDER/NAME.py``: ``tests/ops/FOLDER/..``."""
    folder = module.parent.as_posix().removeprefix("headq_ao").removeprefix("/")
    return Path("tests", APART.get(folder, folder), f"test_{module.name}")


def kernels_alone(tree):
    """Whether a module has nothing but kernels: they are run by ``tests/ops/*_interpreted.py``, compiled together."""
    made = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    kinds = ("triton.jit", "triton.constexpr_function")
    return bool(made) and all(any(ast.unparse(d).startswith(kinds) for d in n.decorator_list) for n in made)


def without_tests(root):
    """The modules of ``headq_ao`` and ``ops`` that have no file of tests of their name, or none in it."""
    found = []
    for path in sorted(p for folder in ("headq_ao", "ops") for p in (root / folder).rglob("*.py")):
        module, home = path.relative_to(root), root / home_of(path.relative_to(root))
        if path.name == "__init__.py" or kernels_alone(ast.parse(path.read_text(encoding="utf-8"))):
            continue
        if not home.exists() or not re.search(r"^def test_", home.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(module.as_posix())
    return found


def test_each_module_has_a_file_of_tests_of_its_name():
    assert without_tests(ROOT) == sorted(UNTESTED)


def test_a_module_without_tests_is_found(tmp_path):
    files = {
        "headq_ao/cache/new.py": "def one(): ...", "headq_ao/cache/old.py": "def one(): ...",
        "headq_ao/integrations/vllm/of_engine.py": "", "headq_ao/empty.py": "", "headq_ao/cache/__init__.py": "",
        "ops/made/triton_both.py": "@triton.jit\ndef one(x): ...\ndef launch(): ...",
        "ops/made/triton_jit.py": "@triton.jit(do_not_specialize=['n'])\ndef one(n): ...", "ops/made/op.py": "",
        "tests/cache/test_old.py": "def test_one(): ...", "tests/vllm/test_of_engine.py": "def test_one(): ...",
        "tests/test_empty.py": "import headq_ao.empty\n", "tests/ops/test_op.py": "def test_one(): ...",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lacking = ["headq_ao/cache/new.py", "headq_ao/empty.py", "ops/made/op.py", "ops/made/triton_both.py"]
    assert without_tests(tmp_path) == lacking
