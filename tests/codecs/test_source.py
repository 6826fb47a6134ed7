"""What an attention module carries: it moves with the model, and tells models apart."""

import copy

import pytest
import transformers

from headq_ao import headq_config, quantize_
from tests.conftest import build_tiny

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}


@pytest.fixture
def model():
    made = build_tiny()
    quantize_(made, headq_config(**FAST))
    return made


def test_the_number_of_a_model_is_shared_by_its_layers(model):
    assert isinstance(model, transformers.PreTrainedModel)
    twin = copy.deepcopy(model)
    numbers = [{layer.self_attn.headq.model.number for layer in m.model.layers} for m in (model, twin)]
    assert [len(n) for n in numbers] == [1, 1] and numbers[0] != numbers[1]
