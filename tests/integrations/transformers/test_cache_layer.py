"""A packed layer by the names that transformers calls."""

import pytest

from headq_ao import HeadQCache


def test_offloading_is_refused(model):
    with pytest.raises(NotImplementedError, match="drop offloading"):
        HeadQCache(model).layers[0].offload()
