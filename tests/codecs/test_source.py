"""What an attention module carries: it moves with the model, and tells models apart."""

import copy

import pytest
import torch
import transformers

from headq_ao.codecs.source import ModelNumber, SourceModule


def test_the_number_of_a_model_is_shared_by_its_layers(model):
    assert isinstance(model, transformers.PreTrainedModel)
    twin = copy.deepcopy(model)
    numbers = [{layer.self_attn.headq.model.number for layer in m.model.layers} for m in (model, twin)]
    assert [len(n) for n in numbers] == [1, 1] and numbers[0] != numbers[1]


class Carried(SourceModule):
    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x, persistent=False)


def test_buffers_move_and_are_not_cast():
    source = Carried(torch.randn(1, 2, 8))
    before = source.x
    source.to(torch.bfloat16)
    assert source.x.dtype == torch.float32 and torch.equal(source.x, before)
    source.to("meta")
    assert source.x.device.type == "meta" and source.x.dtype == torch.float32


def test_a_sketch_tells_buffers_apart_whatever_their_size():
    """One number of each head, of unit-norm buffers; the same in each process."""
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    sketch = Carried(x).sketch()
    assert len(sketch) == 3 and sketch == Carried(x.clone()).sketch()
    assert Carried(x * 100).sketch() == pytest.approx(sketch, rel=1e-6)
    other = x.clone()
    other[0, 1, 2, 2] += 0.1
    differs = [abs(a - b) > 1e-4 for a, b in zip(sketch, Carried(other).sketch(), strict=True)]
    assert differs == [False, True, False]
    assert Carried(torch.empty(0)).sketch() == [] and Carried(torch.zeros(1, 2, 4)).sketch() == [0.0, 0.0]


def test_copies_of_a_model_number_are_another():
    one = ModelNumber()
    numbers = {one.number, copy.copy(one).number, copy.deepcopy(one).number, ModelNumber().number}
    assert len(numbers) == 4
    twice = copy.deepcopy([one, one])
    assert twice[0] is twice[1], "layers of one model share it"
