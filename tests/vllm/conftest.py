"""Engine tests: run by ``make test-vllm`` in an environment that has vLLM, skipped where it is missing."""

import importlib.util
import os

import pytest

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its scheduler and pages can be looked at
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
HAS_VLLM = importlib.util.find_spec("vllm") is not None
ANYWHERE = ("test_settings.py",)  # of modules that import nothing of vLLM


def pytest_collection_modifyitems(items):
    """vLLM's own imports warn; elsewhere warnings are errors."""
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)):
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not HAS_VLLM and item.path.name not in ANYWHERE:
                item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm installs it"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny fp32 Llama, and its calibration."""
    from tests.vllm import checkpoints

    model = checkpoints.llama()
    folder = tmp_path_factory.mktemp("tiny")
    calibration = checkpoints.save_calibration(folder / "tiny.headq.safetensors", model)
    return checkpoints.save(folder / "model", model), calibration
