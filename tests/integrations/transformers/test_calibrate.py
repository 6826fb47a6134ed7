"""Moments against states taken from the model by hooks, and what calibrate leaves as it was."""

import pytest
import torch

from headq_ao import Calibration, calibrate, headq_config, quantize_
from headq_ao.calibration.observers import IMPORTANCE_EVERY, RECORDER
from headq_ao.integrations.transformers.models import fingerprint
from tests.calibration.moments import N_SINK, SEEN, assert_same, assert_same_moments

pytestmark = pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")  # most need few tokens here


@pytest.fixture
def llama(tiny):
    return tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2)


@pytest.fixture
def batches(token_ids):
    return [token_ids(1, 20)[0], token_ids(2, 17, seed=1), token_ids(1, 9, seed=2).tolist()]


def rotated(x, positions):
    """RoPE written out: pairs (i, i + D/2) turn by position · 10000^(−2i/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def states_by_hooks(model, batches, n_sink=N_SINK):
    """Per layer ``q [N, Hq, D]``, ``k``, ``v`` ``[N, Hkv, D]`` of all tokens behind the sinks, in order."""
    states = [[[], [], []] for _ in model.model.layers]
    hooks = []
    for i, layer in enumerate(model.model.layers):
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):

            def keep(module, args, out, i=i, j=j):
                x = out.double().unflatten(-1, (-1, 32)).transpose(1, 2)  # [B, H, T, D]
                if j < 2:
                    x = rotated(x, torch.arange(x.shape[2], dtype=torch.float64))
                states[i][j].append(x[:, :, n_sink:].transpose(1, 2).flatten(0, 1))

            hooks.append(getattr(layer.self_attn, name).register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(torch.as_tensor(batch).reshape(-1, torch.as_tensor(batch).shape[-1]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [[torch.cat(x) for x in layer] for layer in states]


def run(model, batches, **options):
    return calibrate(model, batches, **{"n_sink": N_SINK, "progress": False, "context_length": 1} | options)


def test_moments_against_hooks(llama, batches):
    got = run(llama, batches, n_rows=16)
    tokens = (20 - N_SINK) + 2 * (17 - N_SINK) + (9 - N_SINK)
    for moments, (q, k, v) in zip(got.layers, states_by_hooks(llama, batches), strict=True):
        assert (moments.tokens, moments.groups) == (tokens, 2)
        expected = {
            "k_sum": k.sum(0),
            "v_sum": v.sum(0),
            "k_outer": sum(torch.einsum("hd,he->hde", x, x) for x in k),
            "v_outer": sum(torch.einsum("hd,he->hde", x, x) for x in v),
            "q_outer": torch.stack(
                [sum(torch.outer(x[h], x[h]) for x in q for h in (2 * kv, 2 * kv + 1)) for kv in range(2)]
            ),
        }
        for name, want in expected.items():
            value = getattr(moments, name)
            assert value.dtype == torch.float32 and value.device.type == "cpu"
            torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()), msg=name)
        torch.testing.assert_close(moments.c_q, moments.q_outer / (2 * tokens))
        torch.testing.assert_close(moments.k_mean.double(), k.mean(0), rtol=1e-4, atol=1e-4)
        assert moments.k_rows.shape == (16, 2, 32)
        distance = (moments.k_rows.double()[:, None] - k[None]).flatten(2).norm(dim=-1)
        nearest = distance.argmin(1).tolist()
        assert float(distance.min(1).values.max()) < 1e-4, "each sampled row is a key"
        assert nearest == sorted(set(nearest)), "each once, in order"
    assert got.fingerprint == fingerprint(llama)
    assert got.meta["tokens"] == 20 + 34 + 9


def expected_seen(q, k, v, scaling, window=None):
    """The weighted moments of one sequence ``[H, T, D]``: loops over the queries and keys of exact attention."""
    heads, tokens, d = k.shape
    groups, recent = q.shape[0] // heads, min(64, tokens // 4)
    sums = {name: torch.zeros(heads, *[d] * ("sum" in name) + [d, d] * ("outer" in name)).double() for name in SEEN}
    for head in range(q.shape[0]):
        kv = head // groups
        for i in range(recent, tokens, IMPORTANCE_EVERY):
            first = 0 if window is None else max(0, i - window + 1)
            a = (scaling * k[kv, first : i + 1] @ q[head, i]).softmax(0)
            of_q = 0.0
            for j in range(max(first, N_SINK), i + 1 - recent):
                share = float(a[j - first])
                of_q += share * (1 - share)
                for side, x, w in (("k", k[kv, j], share * (1 - share)), ("v", v[kv, j], share**2)):
                    sums[f"{side}_seen"][kv] += IMPORTANCE_EVERY * w
                    sums[f"{side}_seen_sum"][kv] += IMPORTANCE_EVERY * w * x
                    sums[f"{side}_seen_outer"][kv] += IMPORTANCE_EVERY * w * torch.outer(x, x)
            if i >= N_SINK:
                sums["q_seen_outer"][kv] += IMPORTANCE_EVERY * of_q * torch.outer(q[head, i], q[head, i])
    return sums


def test_keys_are_in_the_frame_of_their_segment(llama, token_ids):
    """Body token ``j`` of segment ``j // 256`` as it would be 256 positions for each segment before; whatever context
    is asked for, sequences start at 0."""
    row = token_ids(1, 600)
    got = run(llama, [row], context_length=4000)
    seen = []
    hook = llama.model.layers[1].self_attn.k_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        llama(row, use_cache=False)
    hook.remove()
    k = seen[0][0].unflatten(-1, (2, 32)).transpose(0, 1).double()
    at = torch.arange(600)
    there = rotated(k, (at - (at - N_SINK).clamp(min=0) // 256 * 256).double())[:, N_SINK:]
    assert got.layers[1].segment_tokens == 256 and got.meta["context_length"] == 4000
    torch.testing.assert_close(got.layers[1].k_sum.double(), there.sum(1), rtol=1e-4, atol=1e-3)
    assert_same_moments(got, run(llama, [row]))


def test_models_without_rotary_embeddings_stay_at_their_positions(tiny, token_ids):
    model, rows = tiny("gpt2", layers=1), [token_ids(2, 60)]
    assert_same_moments(run(model, rows, context_length=500), run(model, rows))


@pytest.mark.parametrize("length", [0, 5000, 64.0])
def test_a_context_that_the_model_cannot_have(llama, token_ids, length):
    with pytest.raises(ValueError, match="context_length must be a whole number of at least 1 and at most 4096"):
        run(llama, [token_ids(1, 60)], context_length=length)


def test_weighted_moments_against_a_loop(llama, token_ids):
    """What attention sees, from the states that hooks take; two sequences of a batch add up."""
    ids = token_ids(2, 45)
    got = run(llama, [ids]).layers
    for moments, *parts in zip(got, *(states_by_hooks(llama, [row], n_sink=0) for row in ids), strict=True):
        want = [expected_seen(*(x.transpose(0, 1) for x in part), 32**-0.5) for part in parts]
        for name in SEEN:
            total = want[0][name] + want[1][name]
            value = getattr(moments, name).double()
            torch.testing.assert_close(value, total, rtol=1e-3, atol=1e-4 * float(total.abs().max()), msg=name)


def test_weighted_moments_know_scaling_and_window(tiny, token_ids):
    """Mistral's window of 100 becomes 20: keys further away get no weight; the scaling is the model's own."""
    model = tiny("mistral", sliding_window=20)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    ids = token_ids(1, 45)
    for moments, part in zip(run(model, [ids]).layers, states_by_hooks(model, [ids], n_sink=0), strict=True):
        want = expected_seen(*(x.transpose(0, 1) for x in part), 0.7, window=20)
        for name in SEEN:
            total = want[name]
            value = getattr(moments, name).double()
            torch.testing.assert_close(value, total, rtol=1e-3, atol=1e-4 * float(total.abs().max()), msg=name)


def test_all_keys_are_kept_where_they_are_few(llama, token_ids):
    (moments, _) = run(llama, [token_ids(1, 20)], n_rows=512).layers
    assert moments.k_rows.shape[0] == 20 - N_SINK
    torch.testing.assert_close(moments.k_rows.sum(0), moments.k_sum, rtol=1e-4, atol=1e-4)


def test_same_seed_same_sample(llama, batches):
    first, again, other = (run(llama, batches, n_rows=8, seed=s) for s in (3, 3, 4))
    assert_same(first, again)
    for a, b in zip(first.layers, other.layers, strict=True):
        assert not torch.equal(a.k_rows, b.k_rows)
        assert torch.equal(a.q_outer, b.q_outer)


def test_one_token_set_for_all_layers(llama, batches):
    """The sample keeps the same tokens in each layer."""
    states = states_by_hooks(llama, batches)
    kept = []
    for moments, (_, k, _) in zip(run(llama, batches, n_rows=8).layers, states, strict=True):
        kept.append((moments.k_rows.double()[:, None] - k[None]).flatten(2).norm(dim=-1).argmin(1).tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(llama, batches, attention):
    llama.set_attn_implementation(attention)
    llama.train()
    llama.model.layers[1].eval()  # a part that was frozen stays so
    modes = {name: m.training for name, m in llama.named_modules()}
    weights = {name: p.clone() for name, p in llama.named_parameters()}
    run(llama, batches)
    assert RECORDER.get() is None
    assert {name: m.training for name, m in llama.named_modules()} == modes
    assert llama.config._attn_implementation == attention
    assert all(torch.equal(p, weights[name]) for name, p in llama.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in llama.parameters())


def test_the_model_is_left_as_it_was_after_a_failure(llama, batches, monkeypatch):
    llama.train()

    def fail(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(llama.model.layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(llama, batches)
    assert RECORDER.get() is None
    assert llama.config._attn_implementation == "sdpa"
    assert all(m.training for m in llama.modules())


def test_a_quantized_model_calibrates_as_before(llama, batches):
    plain = run(llama, batches)
    quantize_(llama, headq_config())
    again = run(llama, batches)
    assert_same(plain, again)
    assert llama.config._attn_implementation == "headq"


@pytest.mark.parametrize(
    "bad",
    [[], [[1, 2, 3]], [torch.ones(1, 1, 8, dtype=torch.long)], [torch.ones(8)], [torch.ones(2, N_SINK).long()]],
    ids=["none", "short", "3-D", "floats", "only sinks"],
)
def test_unusable_batches(llama, bad):
    with pytest.raises(ValueError, match=r"token_batches must hold integer token ids .* with T > n_sink = 3, got"):
        run(llama, bad)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_non_finite_states(llama, batches, name):
    with torch.no_grad():
        getattr(llama.model.layers[1].self_attn, name).weight[0, 0] = float("nan")
    what = {"q": "queries", "k": "keys", "v": "values"}[name[0]]
    with pytest.raises(ValueError, match=f"layer 1: calibration met non-finite {what}; run the model in float32"):
        run(llama, batches)


def test_save_and_load_of_a_model(llama, batches, tmp_path):
    calibration = run(llama, batches, source="random ids")
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert_same(loaded, calibration)
    loaded.check_model(fingerprint(llama))
    loaded.check_model(fingerprint(llama.to(torch.bfloat16)))


def test_a_calibration_of_another_model_is_refused(tiny, llama, batches, tmp_path):
    calibration = run(llama, batches)
    other = tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2, seed=1)
    with pytest.raises(ValueError, match="the calibration was made on another model: its weights differ; run"):
        quantize_(other, headq_config(calibration=calibration))
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        quantize_(llama, headq_config(calibration=str(tmp_path / "gone.safetensors")))
    assert llama.config._attn_implementation == "sdpa"
