"""Codecs of layers whose queries nobody sees."""

import pytest
import torch

from headq_ao import headq_config
from headq_ao.codecs.layer_codec import LayerCodec
from headq_ao.codecs.unseen import UnseenQueries, isotropic_queries
from headq_ao.layer_shape import LayerShape


@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
def test_queries_favour_no_direction(tokens):
    """As many groups of them as it takes; each KV head's own add up to a multiple of one, but for the last ones."""
    q = isotropic_queries(torch.zeros(2, 3, tokens, 16, dtype=torch.float64))
    assert q.shape == (2, 3 * -(-16 // tokens), tokens, 16) and q.dtype == torch.float64
    for one in q.unflatten(1, (3, -1)).flatten(2, 3).flatten(0, 1):
        outer = one.T @ one / 16
        counts = outer.diagonal()
        assert torch.equal(outer, torch.diag(counts)) and float(counts.max() - counts.min()) <= 1
        assert float(counts.sum()) == len(one)


def test_statistics_of_a_prompt_rest_on_its_keys_alone():
    g = torch.Generator().manual_seed(0)
    q, other = torch.randn(2, 1, 4, 100, 32, generator=g).unbind(0)
    k = torch.randn(1, 2, 100, 32, generator=g)
    given = headq_config(), LayerShape(4, 2, 32, None), None, torch.device("cpu")
    unseen, seen = UnseenQueries(*given), LayerCodec(*given)
    one, same = unseen.from_prompt(q, k, 0.1), unseen.from_prompt(other, k, 3.0)
    assert one.tensors().keys() == same.tensors().keys() and "q_factor" in one.own
    assert all(torch.equal(x, same.tensors()[name]) for name, x in one.tensors().items())
    assert not torch.equal(one.spread, seen.from_prompt(q, k, 0.1).spread)
