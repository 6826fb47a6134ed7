"""Which arguments of an attention call leave its scores alone."""

import pytest
import torch

from headq_ao.integrations.transformers.arguments import HARMLESS, SINKS, unknown_argument

SOME = torch.ones(1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {}, dict.fromkeys(HARMLESS, SOME), {"bias": None}, {"softcap": None}, {"flag": True}, {"flag": False},
        {"kind": "text"}, {"output": ("a",)},
    ],
    ids=["none", "harmless", "bias", "softcap", "true", "false", "kind", "output"],
)  # fmt: skip
def test_what_is_served(kwargs):
    assert unknown_argument(kwargs) is None


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [("softcap", 30.0, "30.0"), ("bias", SOME, "a tensor"), ("window", 0, "0"), (SINKS, SOME, "a tensor")],
)
def test_what_may_change_the_scores(name, value, shown):
    """Named with its value, whatever harmless ones stand around it; zero is a number too."""
    told = unknown_argument({"use_cache": True, name: value, "labels": SOME})
    assert told.startswith(f"the attention call passes {name}={shown}, which may change the scores")
    assert "restore_(model)" in told


def test_numbers_that_the_model_takes_are_options_of_the_whole_call():
    """Not tensors of such a name: these reach attention to be added or multiplied."""
    options = frozenset({"keep", "bias"})
    assert unknown_argument({"keep": 3}, options) is None
    assert "passes bias=a tensor" in unknown_argument({"keep": 3, "bias": SOME}, options)
    assert "passes other=3" in unknown_argument({"keep": 3, "other": 3}, options)
