"""What a codec is by default, and which crops of what it has packed it can serve."""

import copy

import pytest
import torch

from headq_ao.codecs.protocol import Codec, CodecSource


class Made(Codec):
    name = "made"

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("attributes", "body", "packed", "problem"),
    [
        ({}, 3, 64, None),
        ({"accumulates": True}, 63, 64, "made sums up what it packs, and 1 of those tokens would go"),
        ({"accumulates": True}, 64, 64, None),
        ({"granularity": 32, "aligned": True}, 33, 64, "32 tokens are coded together here"),
        ({"granularity": 32, "aligned": True}, 32, 64, None),
        ({"granularity": 32, "aligned": True}, 70, 64, None),
        ({"granularity": 32}, 33, 64, None),
    ],
)
def test_crops(attributes, body, packed, problem):
    found = Made(**attributes).crop_problem(body, packed)
    assert found is None if problem is None else found.startswith(problem)


def test_a_codec_of_nothing_but_its_name():
    """All tokens of one codec id, all stay, nothing belongs to sequences, and a copy is the codec itself."""
    codec, tokens, at = Made(), torch.zeros(2, 1, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
    assert codec.segment(torch.tensor([[0, 7]]), 32).tolist() == [[0, 0]]
    assert codec.read_prompt(tokens, tokens, tokens, 1.0, at, at[:, 0], 0) == (codec, None)
    assert codec.index(torch.tensor([1, 1])) is codec is copy.deepcopy(codec)
    assert codec.own_tensors() == {} and codec.plan(None, None, None, 4, 0, None, True) is None
    with pytest.raises(NotImplementedError):
        codec.layout(32)


def test_a_source_restores_what_it_started():
    class Source(CodecSource):
        def start(self, batch, dtype):
            return Made(batch=batch, dtype=dtype)

    source = Source()
    assert (source.prototype.batch, source.prototype.dtype) == (1, torch.float32)
    codec = source.start(3, torch.float64)
    assert source.restore(codec, {}) is codec is source.current(codec)
    with pytest.raises(ValueError, match=r"this codec keeps nothing of a sequence, got \['key.mean', 'value.unit'\]"):
        source.restore(codec, {"value.unit": torch.ones(1), "key.mean": torch.ones(1)})
    mapping, name, found = source.watched()
    assert mapping[name] is found
