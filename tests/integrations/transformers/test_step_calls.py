"""What a decoding step runs of our own Python: few calls, in few files, the same at every step.

Counted are the calls of a whole model call, private ones, comprehensions and the model's pre-hook included, of a model
of one layer; and what each further layer adds.
"""

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
    """For each step, calls by file and function, and whether block tables or token ids got more room in it."""
    found = []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(FOLDERS):
            calls[frame.f_code.co_filename, frame.f_code.co_name] += 1

    def room():
        return [table.columns for table in cache.batch.tables.values()], cache.ids.capacity

    for i in range(PROMPT, PROMPT + STEPS):
        calls, before = Counter(), room()
        sys.setprofile(note)
        try:
            model(tokens[:, i : i + 1], cache=cache)
        finally:
            sys.setprofile(None)
        found.append((calls, room() != before))
    return found[2:]  # the first ones put the step together


@pytest.fixture
def steps(tiny, token_ids):
    def make(layers, max_length, **options):
        model = tiny("llama", layers=layers)
        calibration = calibrate(model, list(token_ids(8, 256, seed=1).split(1)), progress=False)
        quantize_(model, headq_config(calibration=calibration, **options))
        cache = HeadQCache(model, max_length=max_length)
        tokens = token_ids(2, PROMPT + STEPS)
        with torch.no_grad():
            model(tokens[:, :PROMPT], cache=cache)
            return calls_of_steps(model, cache, tokens)

    return make


@pytest.mark.parametrize("max_length", [PROMPT + STEPS, None])
@pytest.mark.parametrize("options", [{}, {"k_bits": 2}, {"key_codec": "affine", "value_codec": "affine"}])
def test_a_step_takes_few_calls_and_the_same_at_every_step(steps, options, max_length):
    one, three = steps(1, max_length, **options), steps(3, max_length, **options)
    usual, usual_of_three = (next(calls for calls, grows in found if not grows) for found in (one, three))
    for found, expected in ((one, usual), (three, usual_of_three)):
        assert all(calls == expected for calls, grows in found if not grows)
    assert usual.total() <= 25 and len({file for file, _ in usual}) <= 6
    layer = usual_of_three - usual
    assert layer.total() / 2 <= 6 and len({file for file, _ in layer}) <= 4

    growing = [
        (a.total() - usual.total(), b.total() - usual_of_three.total())
        for (a, grows), (b, _) in zip(one, three, strict=True)
        if grows
    ]
    assert 2 <= len(growing) <= 4, "the token ids' room, and that of pages where it was not made at once"
    assert all(more <= 32 and (more_of_three - more) / 2 <= 12 for more, more_of_three in growing)
