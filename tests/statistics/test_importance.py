"""Weights by attention against loops over queries and keys, and what they are worth in the formula they come from."""

import math

import pytest
import torch

from headq_ao.statistics import importance as seen
from headq_ao.statistics.importance import importance_weights, mixed


def states(batch=1, heads=4, kv_heads=2, tokens=40, head_dim=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, h, tokens, head_dim, generator=g, dtype=torch.float64).to(dtype) for h in (heads, kv_heads)
    ]


def by_hand(q, k, scaling, n_sink, window=None, every=1):
    """Query by query, key by key."""
    batch, heads, tokens, _ = q.shape
    kv_heads, recent = k.shape[1], min(64, tokens // 4)
    of_q, of_k, of_v = (torch.zeros(batch, h, tokens, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    for b in range(batch):
        for h in range(heads):
            kv = h * kv_heads // heads
            for i in range(recent, tokens, every):
                visible = [j for j in range(i + 1) if window is None or i - j < window]
                s = [scaling * float(q[b, h, i] @ k[b, kv, j]) for j in visible]
                total = sum(math.exp(x - max(s)) for x in s)
                for j, x in zip(visible, s, strict=True):
                    a = math.exp(x - max(s)) / total
                    if j >= n_sink and i - j >= recent:
                        of_q[b, h, i] += a * (1 - a)
                        of_k[b, kv, j] += a * (1 - a)
                        of_v[b, kv, j] += a * a
    return of_q, of_k, of_v


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"batch": 2, "heads": 6, "kv_heads": 2}, {}),
        ({"heads": 2}, {"n_sink": 0}),
        ({"heads": 2, "kv_heads": 1}, {"window": 15}),
        ({}, {"window": 11, "n_sink": 20}),
        ({}, {"window": 1000}),
        ({}, {"every": 4}),
        ({"tokens": 41}, {"every": 7, "window": 20}),
        ({}, {"scaling": 1.7}),
        ({"tokens": 3}, {}),
        ({"tokens": 5}, {"n_sink": 0}),
        ({"heads": 1, "kv_heads": 1, "tokens": 150}, {"every": 5}),  # more than two QUERY_TILEs of keys; 37 are recent
        ({"heads": 1, "kv_heads": 1, "tokens": 300}, {"every": 31}),  # 64 keys are recent, not a quarter
    ],
    ids=str,
)
def test_against_a_loop(shape, options):
    q, k = states(**shape)
    options = {"scaling": 0.4, "n_sink": 4} | options
    found = importance_weights(q, k, **options)
    for x, want, like in zip(found, by_hand(q, k, **options), (q, k, k), strict=True):
        assert x.shape == like.shape[:3] and x.dtype == k.dtype
        torch.testing.assert_close(x, want, rtol=1e-9, atol=1e-12)


def test_tiles_of_queries_add_up(monkeypatch):
    q, k = states(tokens=100)
    whole = importance_weights(q, k, 0.4, n_sink=4, every=3)
    monkeypatch.setattr(seen, "QUERY_TILE", 7)
    for a, b in zip(importance_weights(q, k, 0.4, n_sink=4, every=3), whole, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_count():
    """Sinks, keys that no query sees from afar, queries that come early, and queries that are not taken."""
    q, k = states(tokens=80)
    of_q, of_k, of_v = importance_weights(q, k, 0.4, n_sink=6, every=2)
    recent = 80 // 4
    for x in (of_k, of_v):
        assert bool((x[..., :6] == 0).all()) and bool((x[..., 80 - recent :] == 0).all())
        assert bool((x[..., 6 : 79 - recent] > 0).all())  # the last one is for query 79, which is not taken
    taken = torch.zeros(80, dtype=torch.bool)
    taken[recent::2] = True
    assert bool((of_q[..., ~taken] == 0).all())
    assert bool((of_q[..., recent + 6 :][..., taken[recent + 6 :]] > 0).all())


def test_a_sink_draws_attention_from_the_others():
    q, k = (x.abs() for x in states(tokens=40))
    plain, drawn = (importance_weights(q, torch.cat([k[:, :, :4] * x, k[:, :, 4:]], 2), 0.4, n_sink=4) for x in (0, 4))
    assert all(bool((b.sum() < 0.2 * a.sum()).all()) for a, b in zip(plain, drawn, strict=True))


def test_later_rows_and_hidden_ones_have_no_influence():
    """The weights of a prompt's queries do not depend on what follows, nor on keys outside of the window."""
    q, k = states(tokens=60)
    of_q, _, _ = importance_weights(q, k, 0.4, n_sink=4, window=20)
    changed = k.clone()
    changed[:, :, 50] += 100
    other, _, _ = importance_weights(q, changed, 0.4, n_sink=4, window=20)
    assert torch.equal(of_q[..., :50], other[..., :50]) and not torch.equal(of_q[..., 50:], other[..., 50:])
    changed = k.clone()
    changed[:, :, 10] += 100
    other, _, _ = importance_weights(q, changed, 0.4, n_sink=4, window=20)
    assert torch.equal(of_q[..., 30:], other[..., 30:]) and not torch.equal(of_q[..., :30], other[..., :30])


def test_heads_and_sequences_are_their_own():
    q, k = states(batch=2, heads=6, kv_heads=3)
    whole = importance_weights(q, k, 0.4, n_sink=4)
    for b in range(2):
        for h in range(3):
            of_q, of_k, of_v = importance_weights(
                q[b : b + 1, 2 * h : 2 * h + 2], k[b : b + 1, h : h + 1], 0.4, n_sink=4
            )
            torch.testing.assert_close(whole[0][b, 2 * h : 2 * h + 2], of_q[0])
            torch.testing.assert_close(whole[1][b, h], of_k[0, 0])
            torch.testing.assert_close(whole[2][b, h], of_v[0, 0])


def test_weights_predict_the_damage():
    """½ Σ_j w_j (q·e_j)² averaged over small independent errors is the KL that attention shows; A² the value error."""
    g = torch.Generator().manual_seed(1)
    tokens, recent, scaling = 48, 12, 1.0
    q, k = states(heads=1, kv_heads=1, tokens=tokens)
    of_q, of_k, of_v = importance_weights(q, k, scaling, n_sink=0)
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    a = (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1)[0, 0]
    packed = torch.ones(tokens, tokens).tril(-recent).bool()
    delta = 1e-2 * torch.randn(4000, tokens, tokens, generator=g, dtype=torch.float64) * packed
    kl = (a * delta.exp()).sum(-1).log() - (a * delta).sum(-1)
    assert float(kl.sum(-1).mean()) == pytest.approx(0.5e-4 * float(of_q.sum()), rel=0.02)
    assert float(of_k.sum()) == pytest.approx(float(of_q.sum()))
    torch.testing.assert_close(of_v[0, 0], (a * packed).square().sum(0))


@pytest.mark.parametrize("window", [None, 20])
def test_weights_predict_the_damage_under_a_softcap(window):
    """As above, errors of scores before they are capped; the slope at the cap is what makes the difference."""
    g, tokens, recent, cap = torch.Generator().manual_seed(1), 48, 12, 2.0
    q, k = states(heads=1, kv_heads=1, tokens=tokens)
    of_q, of_k, of_v = importance_weights(q, k, 1.0, n_sink=0, window=window, softcap=cap)
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (age < 0) | (age >= (window or tokens))
    s = (q @ k.mT)[0, 0]
    capped = (cap * (s / cap).tanh()).masked_fill(hidden, float("-inf"))
    a, packed = capped.softmax(-1), age >= recent
    delta = 1e-2 * torch.randn(4000, tokens, tokens, generator=g, dtype=torch.float64) * packed
    moved = (cap * ((s + delta) / cap).tanh()).masked_fill(hidden, float("-inf"))
    kl = (a * (a.log() - moved.log_softmax(-1)).nan_to_num(0.0)).sum(-1)
    assert float(kl.sum(-1).mean()) == pytest.approx(0.5e-4 * float(of_q.sum()), rel=0.03)
    assert float(of_k.sum()) == pytest.approx(float(of_q.sum()))
    torch.testing.assert_close(of_v[0, 0], (a * packed).square().sum(0))
    assert float(importance_weights(q, k, 1.0, n_sink=0, window=window)[0].sum()) > 1.3 * float(of_q.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_between_bounds(dtype):
    q, k = states(batch=2, tokens=90, dtype=dtype)
    of_q, of_k, of_v = importance_weights(50 * q, k, 1.0, n_sink=0)  # nearly one-hot
    for x in (of_q, of_k, of_v):
        assert bool((x >= 0).all()) and bool(torch.isfinite(x).all())
    assert bool((of_q <= 1).all())


def test_mixed():
    weights = torch.tensor([[[1.0, 3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(mixed(weights), torch.tensor([[[0.625, 1.375, 0.25, 1.75], [1.0, 1.0, 1.0, 1.0]]]))
    torch.testing.assert_close(mixed(1e-9 * weights), mixed(weights))
    assert mixed(weights).mean(-1).tolist() == [[1, 1]]
    assert float(mixed(weights)[0, 0].min()) == seen.UNIFORM
