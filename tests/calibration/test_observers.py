"""What is collected while attention runs, against loops over tokens."""

import itertools

import torch

from headq_ao.calibration.observers import IMPORTANCE_EVERY, MomentAccumulator, Recorder
from headq_ao.calibration.rope import rotation_of
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.models import rotary_embedding
from tests.calibration.moments import N_SINK, SEEN


def test_queries_count_in_the_frames_of_the_keys_that_they_read(tiny):
    """``Σ a (1 − a) (Rᵀ q)(Rᵀ q)ᵀ`` over pairs of a query and a key, against a loop over segments."""
    llama = tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2)
    torch.manual_seed(0)
    frame = rotation_of(rotary_embedding(llama), llama.model.layers[0].self_attn, layer_shapes(llama.config)[0])
    frame = frame.frame(32, 128, torch.device("cpu"))
    recorder = Recorder(1, 8, N_SINK, 0, frames=[frame])
    q, k, v = torch.randn(2, 4, 110, 32), torch.randn(2, 2, 110, 32), torch.randn(2, 2, 110, 32)
    recorder.begin(torch.ones(2, 110, dtype=torch.bool))
    recorder.record(0, q, k, v, 0.2, None)
    wanted, recent = torch.zeros(2, 32, 32), 110 // 4
    for b, h, t in itertools.product(range(2), range(4), range(recent, 110, IMPORTANCE_EVERY)):
        a = (0.2 * k[b, h // 2, : t + 1] @ q[b, h, t]).softmax(0)
        for s in range((t - N_SINK) // 32 + 1):
            part = slice(N_SINK + 32 * s, min(N_SINK + 32 * (s + 1), t + 1 - recent))
            weight = (a * (1 - a))[part].sum() if part.start < part.stop else 0.0
            x = frame.into(q[b, h, t], torch.tensor(s))
            wanted[h // 2] += IMPORTANCE_EVERY * weight * torch.outer(x, x)
    found = recorder.layers[0].moments()
    assert found.segment_tokens == 32
    torch.testing.assert_close(found.q_seen_outer, wanted, rtol=1e-4, atol=1e-4)


def test_the_accumulator_weights_each_row():
    """Sums by hand, over two calls: ``Σ w x``, ``Σ w x xᵀ``, each query head with its own weight."""
    g = torch.Generator().manual_seed(0)
    accumulator, sums = MomentAccumulator(4), {}
    for n in (5, 3):
        q, k, v = (torch.randn(n, heads, 4, generator=g) for heads in (4, 2, 2))
        weights = [torch.rand(n, heads, generator=g) for heads in (4, 2, 2)]
        accumulator.add(q, k, v, weights, torch.rand(n, generator=g))
        for i in range(n):
            for h in range(2):
                rows = [("q", q[i, 2 * h], weights[0][i, 2 * h]), ("q", q[i, 2 * h + 1], weights[0][i, 2 * h + 1])]
                rows += [("k", k[i, h], weights[1][i, h]), ("v", v[i, h], weights[2][i, h])]
                for side, x, w in rows:
                    terms = {"seen": w, "seen_sum": w * x, "seen_outer": w * torch.outer(x, x)}
                    for name, term in terms.items():
                        sums[f"{side}_{name}", h] = sums.get((f"{side}_{name}", h), 0) + term
    moments = accumulator.moments()
    assert (moments.tokens, moments.groups) == (8, 2)
    for name in SEEN:
        torch.testing.assert_close(getattr(moments, name), torch.stack([sums[name, h] for h in range(2)]), msg=name)


def test_the_sample_is_uniform():
    """Every token is kept equally often, wherever its batch stands."""
    counts = torch.zeros(40)
    g = torch.Generator().manual_seed(0)
    for _ in range(400):
        accumulator = MomentAccumulator(10)
        for start in (0, 5, 25):
            n = {0: 5, 5: 20, 25: 15}[start]
            x = torch.arange(start, start + n).float()[:, None, None]
            accumulator.add(x, x, x, [torch.ones(n, 1)] * 3, torch.rand(n, generator=g))
        counts[accumulator.moments().k_rows.flatten().long()] += 1
    assert counts.sum() == 4000
    assert float((counts - 100).abs().max()) < 4.5 * (400 * 0.25 * 0.75) ** 0.5
