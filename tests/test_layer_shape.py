"""The shape of a layer."""

import pytest

from headq_ao.layer_shape import LayerShape


@pytest.mark.parametrize(("value_dim", "dims"), [(None, (64, 64)), (128, (64, 128)), (64, (64, 64))])
def test_values_are_as_wide_as_keys_unless_they_are_not(value_dim, dims):
    assert LayerShape(8, 2, 64, None, value_dim).dims == dims


def test_shapes_tell_layers_apart():
    """They are keys of what layers share: equal ones are one, and none can be changed."""
    shape = LayerShape(8, 2, 64, None)
    assert {shape, LayerShape(8, 2, 64, None), LayerShape(8, 2, 64, 100), LayerShape(8, 2, 64, None, 32)} == {
        shape, LayerShape(8, 2, 64, 100), LayerShape(8, 2, 64, None, 32),
    }  # fmt: skip
    with pytest.raises(AttributeError):
        shape.head_dim = 32
