"""``import headq_ao`` before or after transformers: either way transformers loads a checkpoint with HeadQ."""

import importlib
import subprocess
import sys

import pytest

from headq_ao import headq_config, quantize_, registration

LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model._headq.config).__name__, model.config._attn_implementation)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module ``planted_module`` to be imported, and an empty list of meta-path finders of ours."""
    (tmp_path / "planted_module.py").write_text("import json\nvalue = 3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    sys.modules.pop("planted_module", None)


def test_the_action_follows_the_import_once(planted):
    seen = []
    sys.meta_path.insert(
        0, registration.AfterImport("planted_module", lambda: seen.append(sys.modules["planted_module"].value))
    )
    assert importlib.util.find_spec("json.tool") is not None and seen == []
    import planted_module

    assert seen == [3] and not any(isinstance(f, registration.AfterImport) for f in sys.meta_path)
    importlib.reload(planted_module)
    assert seen == [3]


def test_a_missing_module_is_still_missing(planted):
    sys.meta_path.insert(0, registration.AfterImport("missing_module", pytest.fail))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("missing_module")


def test_registered_at_once_where_transformers_is_there(planted, monkeypatch):
    seen = []
    monkeypatch.setattr(registration, "register", lambda: seen.append("now"))
    registration.register_with_others()
    assert seen == ["now"]
    monkeypatch.setattr(registration, "TRANSFORMERS", "planted_module")
    registration.register_with_others()
    registration.register_with_others()
    assert seen == ["now"]
    importlib.import_module("planted_module")
    assert seen == ["now", "now"]


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, headq_ao\nfrom transformers import AutoModelForCausalLM",
        "import sys\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM\nimport headq_ao",
    ],
)
def test_checkpoints_load_in_either_order_of_imports(tiny, tmp_path, imports):
    model = tiny()
    quantize_(model, headq_config())
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", imports + LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["HeadQConfig", "headq"]


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, headq_ao\nfrom headq_ao import headq_config\nassert 'torchao' not in sys.modules\nimport torchao",
        "import sys, torchao\nfrom headq_ao import headq_config",
    ],
)
def test_the_config_is_torchaos_in_either_order_of_imports(imports):
    """torchao is not imported for it, and takes it once it is."""
    code = (
        imports
        + """
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict
config = headq_config(k_bits=3)
print(isinstance(config, AOBaseConfig), config_from_dict(config_to_dict(config)) == config)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_public_names():
    import headq_ao
    import headq_ao.cache
    import headq_ao.calibration

    assert set(headq_ao.__all__) <= set(dir(headq_ao))
    assert headq_ao.cache.HeadQCache is headq_ao.HeadQCache
    assert headq_ao.calibration.Calibration is headq_ao.Calibration
    assert "HeadQCache" in dir(headq_ao.cache) and "LayerMoments" in dir(headq_ao.calibration)
    for package in (headq_ao, headq_ao.cache, headq_ao.calibration):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            package.Nothing  # noqa: B018
