"""Tiny quantized models."""

import pytest

from headq_ao import headq_config, quantize_
from tests.integrations.transformers.calling import FINE, OPTIONS


@pytest.fixture
def model(tiny):
    """A tiny Llama with an 8-bit cache: fine enough for equal tokens along different routes."""
    model = tiny()
    quantize_(model, headq_config(**FINE))
    return model


@pytest.fixture
def quantized(tiny):
    def make(family="llama", options=None, **config):
        model = tiny(family, **config)
        quantize_(model, headq_config(**OPTIONS | (options or {})))
        return model

    return make
