"""A tiny calibrated model with a registered codec, and what a layer of it has stored."""

import pytest
import torch

from headq_ao import calibrate, headq_config, quantize_
from headq_ao.evals.baselines import neighbours as neighbours  # registers the baselines
from headq_ao.evals.baselines import residual_vq


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def quantized(tiny, token_ids):
    """``quantized(method, options, **model options)``: a model with that codec."""

    def make(name, options, **model_options):
        model = tiny(**model_options)
        calibration = calibrate(model, [token_ids(3, 200, seed=9)], progress=False)
        own = {"block_size": 16, "residual_length": 16, "calibration": calibration}
        quantize_(model, headq_config(codec=name, codec_options=options, **own))
        return model

    return make


@pytest.fixture
def books(tiny, token_ids, tmp_path):
    """A file of 4 codebooks of 64 entries for the tiny model of ``layers``."""

    def make(layers=2, **model_options):
        path = tmp_path / f"books{layers}.safetensors"
        residual_vq.train(
            tiny(layers=layers, **model_options), list(token_ids(2, 120, seed=4)), out=path, books=4, entries=64,
            progress=False,
        )  # fmt: skip
        return str(path)

    return make
