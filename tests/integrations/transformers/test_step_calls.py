"""What a decoding step runs of our own Python: few calls, in few files, the same at every step."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import headq_ao
from headq_ao import HeadQCache, calibrate, headq_config, ops, quantize_

FOLDERS = tuple(str(Path(package.__file__).resolve().parent) for package in (headq_ao, ops))
PROMPT, STEPS = 200, 70  # two pages are filled on the way


def calls_of_steps(model, cache, tokens):
    """For each step, calls by file and function."""
    found = []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDERS):
            calls[frame.f_code.co_filename, frame.f_code.co_name] += 1

    for i in range(PROMPT, PROMPT + STEPS):
        calls = Counter()
        sys.setprofile(note)
        try:
            model(tokens[:, i : i + 1], cache=cache)
        finally:
            sys.setprofile(None)
        found.append(calls)
    return found[2:]  # the first ones put the step together


@pytest.fixture
def steps(tiny, token_ids):
    def make(layers, **options):
        model = tiny("llama", layers=layers)
        calibration = calibrate(model, list(token_ids(8, 256, seed=1).split(1)), progress=False)
        quantize_(model, headq_config(calibration=calibration, **options))
        cache = HeadQCache(model, max_length=PROMPT + STEPS)
        tokens = token_ids(2, PROMPT + STEPS)
        with torch.no_grad():
            model(tokens[:, :PROMPT], cache=cache)
            return calls_of_steps(model, cache, tokens)

    return make


@pytest.mark.parametrize("options", [{}, {"k_bits": 2}, {"key_codec": "affine", "value_codec": "affine"}])
def test_a_layer_takes_few_calls_and_the_same_at_every_step(steps, options):
    one, three = steps(1, **options), steps(3, **options)
    for found in (one, three):
        assert all(calls == found[0] for calls in found)
    layer = three[0] - one[0]
    assert layer.total() / 2 <= 25
    assert len({file for file, _ in layer}) <= 6
    assert one[0].total() < 73, "as many as a model of one layer took before tokens were packed one by one"
