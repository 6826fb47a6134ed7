"""The examples in docstrings run, each module's in an empty folder."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import headq_ao

KERNELS = ("triton_kernel",)  # importing one needs triton
OPTIONAL = ("headq_ao.lm_eval",)


def module_names():
    names = (m.name for m in pkgutil.walk_packages(headq_ao.__path__, "headq_ao."))
    return ["headq_ao", *(n for n in names if not n.endswith(KERNELS))]


@pytest.mark.parametrize("name", module_names())
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if name in OPTIONAL:
        pytest.importorskip(name)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    assert not list(tmp_path.iterdir()), "an example left a file"


def test_examples_are_found():
    found = [
        example
        for name in ("headq_ao.calibration", "headq_ao.ops.layout", "headq_ao.ops.encode_keys.op")
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(found) > 5


def test_no_example_names_a_fixed_path():
    for folder in ("headq_ao", "ops", "evals"):
        for path in (Path(__file__).resolve().parents[1] / folder).rglob("*.py"):
            for line in path.read_text(encoding="utf-8").splitlines():
                assert not (line.lstrip().startswith((">>>", "...")) and "/tmp" in line), f"{path}: {line}"
