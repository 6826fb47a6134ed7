"""The entry point, and what is read of vLLM at start."""

import importlib.metadata

import pytest

from tests.vllm.engines import PLAIN

pytestmark = pytest.mark.skipif(PLAIN, reason="of the plug-in")


def test_vllm_finds_the_plugin():
    found = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.value.startswith("headq_ao")]
    assert len(found) == 1
    found[0].load()()
    found[0].load()()  # vLLM calls it in every process, and may call it twice in one


def test_the_backend_is_the_custom_one():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    importlib.metadata.entry_points(group="vllm.general_plugins")["headq"].load()()
    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert backend.get_name() == "CUSTOM" and backend.__module__.startswith("headq_ao.integrations.vllm")
