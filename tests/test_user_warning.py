"""Warnings point to the user's line."""

import warnings

import torch

from headq_ao import calibrate, headq_config, quantize_
from tests import older_transformers


def test_warnings_point_to_the_users_line(tiny, token_ids):
    """Not to a line of the library that was called in between."""
    model = tiny()

    def live(model):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model.generate(token_ids(1, 20), max_new_tokens=2)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        few = calibrate(model, [token_ids(1, 40)], progress=False)
        quantize_(model, headq_config(calibration=few))
        model(token_ids(1, 20), use_cache=False)
        live(model)
    ours = [w for w in seen if str(w.message).startswith("HeadQ: ")]
    assert len(ours) == 4
    assert {w.filename for w in ours} - {older_transformers.__file__} == {__file__}
