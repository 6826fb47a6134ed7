"""Names of a package that are imported when they are first used."""

import sys

import pytest

import headq_ao
from headq_ao import lazy


def test_a_module_is_imported_when_a_name_of_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "planted_home.py").write_text("answer = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    homes = {"answer": "planted_home", "other": "planted_home"}
    assert "planted_home" not in sys.modules
    try:
        found = lazy.find("package", "answer", homes)
        assert found is sys.modules["planted_home"].answer is lazy.find("package", "answer", homes)
        with pytest.raises(AttributeError, match="'planted_home' has no attribute 'other'"):
            lazy.find("package", "other", homes)
    finally:
        sys.modules.pop("planted_home", None)


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'package' has no attribute 'gone'"):
        lazy.find("package", "gone", {})
    with pytest.raises(AttributeError, match="module 'headq_ao' has no attribute 'gone'"):
        headq_ao.gone  # noqa: B018
