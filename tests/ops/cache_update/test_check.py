"""New tokens that cannot be packed are named; what is no token may hold anything."""

import pytest
import torch

from headq_ao.ops.cache_update.check import check_finite, not_finite, refuse_not_finite
from tests.ops.cache_update.streams import LAYOUTS, Stream

START, STOP, POSITION = torch.tensor([0, 2]), torch.tensor([4, 3]), torch.tensor([7, 20])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_only_real_tokens_count(name, bad):
    for b, slot, real in ((0, 0, True), (0, 3, True), (1, 1, False), (1, 2, True), (1, 3, False)):
        k, v = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 5)
        x = k if name == "keys" else v
        x[b, 2, slot, 4] = bad
        if not real:
            check_finite(k, v, START, STOP, POSITION)
            continue
        with pytest.raises(ValueError, match=f"{name} must be finite .* in sequence {b} from slot {(7, 20)[b]} on"):
            check_finite(k, v, START, STOP, POSITION)


def test_the_first_sequence_is_named_and_keys_before_values():
    k, v = torch.full((2, 1, 4, 2), torch.nan), torch.full((2, 1, 4, 2), torch.nan)
    with pytest.raises(ValueError, match=r"keys must be finite .* sequence 0 from slot 7"):
        check_finite(k, v, START, STOP, POSITION)


def test_a_cache_says_which_tokens_are_real():
    """Left padding holds anything, the tokens behind it do not."""
    s = Stream(LAYOUTS["one group"])
    s.kv.total.copy_(torch.tensor([5, 3]))
    s.kv.new_start.copy_(torch.tensor([0, 2]))
    k, v = (x.clone() for x in s.tokens(5, 0))
    k[1, :, :2] = torch.nan
    refuse_not_finite(s.kv, k, v)
    v[1, 0, 2] = torch.inf
    with pytest.raises(ValueError, match=r"values must be finite .* in sequence 1 from slot 0 on"):
        refuse_not_finite(s.kv, k, v)


def test_the_error_says_what_to_do():
    assert "run the model in float32 or bfloat16, or pass check_finite=False" in str(not_finite("keys", 3, 9))
