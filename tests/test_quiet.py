"""Nothing but ours is the first thing that a newcomer reads."""

import logging
import subprocess
import sys

import pytest
import torch

from headq_ao import quiet


@pytest.mark.parametrize("first", ["import headq_ao", "from headq_ao import quantize_, headq_config; headq_config()"])
def test_the_first_import_prints_nothing(first):
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def record(name, text):
    return logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)


def test_only_what_is_harmless_is_left_out(monkeypatch):
    failed = record("torchao", "Failed to load x.so: Could not load this library")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quiet.harmless(failed)
    assert not quiet.harmless(record("torchao", "Skipping import of cpp extensions"))
    assert quiet.harmless(record("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now"))
    assert not quiet.harmless(record("torch.utils._pytree", "<enum 'Mine'> is an Enum subclass and is now"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not quiet.harmless(failed)
