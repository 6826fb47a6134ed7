"""What an engine says of a model call."""

import copy

import torch

from headq_ao.cache.call import CallMetadata


def test_a_copy_knows_the_call_and_not_its_masks():
    """Views are of this call's masks, by their identity; what the call said of itself holds for the copy too."""
    call = CallMetadata(custom=True, hidden=torch.tensor([3]), weights=True, views={("mask", 1): object()})
    made = copy.deepcopy(call)
    assert (made.custom, made.weights, made.views) == (True, True, {}) and made.hidden is call.hidden
    assert len(call.views) == 1


def test_calls_do_not_share_views():
    one, other = CallMetadata(), CallMetadata()
    one.views["x"] = 1
    assert other.views == {} and (one.custom, one.hidden, one.weights) == (False, None, False)
