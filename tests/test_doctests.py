"""The examples in docstrings run, each module's in an empty folder."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import headq_ao
import headq_ao.evals
import headq_ao.ops

KERNELS = re.compile(r"headq_ao\.ops\.\w+\.triton_\w+")  # importing one needs Triton
# packages that need another one
OPTIONAL = dict.fromkeys(("headq_ao.lm_eval", "headq_ao.evals.lm_eval", "headq_ao.evals.tasks"), "lm_eval")
# not by the names of tests/vllm and tests/kvpress, which are namespaces where tests/ is searched
OPTIONAL |= {"headq_ao.integrations.vllm": "vllm.version", "headq_ao.integrations.kvpress": "kvpress.presses"}
PACKAGES = (headq_ao, headq_ao.ops, headq_ao.evals)  # ops and evals lie beside headq_ao, where a walk does not go


def module_names():
    found = {
        m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".", onerror=lambda _: None)
    }
    # started in a checkout that is not installed, headq_ao looks beside itself too and sees itself
    found = {n for n in found if not n.startswith("headq_ao.headq_ao")}
    return ["headq_ao", *sorted(n for n in found if not (KERNELS.fullmatch(n) or n.endswith("__main__")))]


@pytest.mark.parametrize("name", module_names())
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for package, needed in OPTIONAL.items():
        if name.startswith(package):
            pytest.importorskip(needed)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert not list(tmp_path.iterdir()), "an example left a file"


def test_examples_are_found():
    names = (
        "headq_ao.calibration.artifact",
        "headq_ao.ops.layout",
        "headq_ao.ops.encode.op",
        "headq_ao.evals.metrics.formulas",
    )
    assert set(names) < set(module_names())
    found = [
        example
        for name in names
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(found) > 5


def test_no_example_names_a_fixed_path():
    for folder in ("headq_ao", "ops", "evals"):
        for path in (Path(__file__).resolve().parents[1] / folder).rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                assert not (line.lstrip().startswith((">>>", "...")) and "/tmp" in line), f"{path}: {line}"
