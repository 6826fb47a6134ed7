"""Moments against states taken from the model by hooks, and the file they are kept in."""

import dataclasses
import itertools
import json
import os
import stat

import pytest
import safetensors.torch
import torch

from headq_ao import Calibration, calibrate, headq_config, quantize_
from headq_ao.calibration.observers import IMPORTANCE_EVERY, RECORDER, MomentAccumulator, Recorder
from headq_ao.calibration.rope import rotation_of
from headq_ao.files import checksum
from headq_ao.integrations.transformers.models import fingerprint, layer_shapes, rotary_embedding
from headq_ao.statistics.moments import TENSORS, LayerMoments

N_SINK = 3
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


def assert_same(a, b):
    assert (a.fingerprint, a.meta) == (b.fingerprint, b.meta)
    assert_same_moments(a, b)


def assert_same_moments(a, b):
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert (x.tokens, x.groups, x.effective) == (y.tokens, y.groups, y.effective)
        for name in TENSORS:
            assert torch.equal(getattr(x, name), getattr(y, name)), name


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


SEEN = ("q_seen_outer", "k_seen", "k_seen_sum", "k_seen_outer", "v_seen", "v_seen_sum", "v_seen_outer")


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


def test_queries_count_in_the_frames_of_the_keys_that_they_read(llama):
    """``Σ a (1 − a) (Rᵀ q)(Rᵀ q)ᵀ`` over pairs of a query and a key, against a loop over segments."""
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


def test_seen_mixes_a_quarter_of_plain_statistics(made):
    moments = made.layers[0]
    for side in ("k", "v"):
        weight, plain, seen = (
            torch.tensor([2.0, 5.0]),
            *(getattr(moments, f"{side}_{n}") for n in ("sum", "seen_sum")),
        )
        setattr(moments, f"{side}_seen", weight)
        mean, outer = moments.weighted(side)
        torch.testing.assert_close(mean, 0.25 * plain / 7 + 0.75 * seen / weight[:, None])
        plain, seen = (getattr(moments, f"{side}_{n}") for n in ("outer", "seen_outer"))
        torch.testing.assert_close(outer, 0.25 * plain / 7 + 0.75 * seen / weight[:, None, None])
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    moments.q_seen_outer = q.mT @ q
    torch.testing.assert_close(moments.weighted_c_q, q.mT @ q / 21)  # 7 tokens of 3 query heads


def test_what_was_never_seen_counts_as_plain(made):
    """A head without weight, say of a calibration of sequences shorter than the window that stays exact."""
    moments = made.layers[0]
    for side in ("k", "v"):
        weight = getattr(moments, f"{side}_seen")
        weight[0], weight[1] = 0.0, 3.0
        getattr(moments, f"{side}_seen_sum")[0] = getattr(moments, f"{side}_seen_outer")[0] = 0.0
        mean, outer = moments.weighted(side)
        torch.testing.assert_close(mean[0], getattr(moments, f"{side}_sum")[0] / 7)
        torch.testing.assert_close(outer[0], getattr(moments, f"{side}_outer")[0] / 7)
        assert not torch.allclose(mean[1], getattr(moments, f"{side}_sum")[1] / 7)
    moments.q_seen_outer = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    torch.testing.assert_close(moments.weighted_c_q, torch.stack([moments.c_q[0], torch.eye(4) / 21]))


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


@pytest.fixture
def made():
    """A small calibration with exact numbers in every field."""
    g = torch.Generator().manual_seed(0)
    shapes = {"outer": (2, 4, 4), "sum": (2, 4), "seen": (2,), "rows": (5, 2, 4)}

    def moments(tokens):
        tensors = {name: torch.randn(shapes[name.rpartition("_")[2]], generator=g) for name in TENSORS}
        tensors["k_rows"] = tensors["k_rows"].transpose(1, 2).mT
        return LayerMoments(tokens, 3, **tensors)

    print_ = {"model_type": "llama", "layers": 2, "rope": "None", "weights": [0.1, 0.25]}
    return Calibration([moments(7), moments(9)], print_, {"source": "text, “quoted”", "tokens": 16})


@pytest.mark.parametrize("as_path", [str, lambda p: p])
def test_save_and_load(made, tmp_path, as_path):
    path = as_path(tmp_path / "made.safetensors")
    made.save(path)
    assert_same(Calibration.load(path), made)


def test_save_and_load_of_a_model(llama, batches, tmp_path):
    calibration = run(llama, batches, source="random ids")
    calibration.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert_same(loaded, calibration)
    loaded.check_model(fingerprint(llama))
    loaded.check_model(fingerprint(llama.to(torch.bfloat16)))


def test_saving_over_a_file_that_was_loaded(made, tmp_path):
    path = tmp_path / "c.safetensors"
    made.save(path)
    loaded = Calibration.load(path)
    Calibration([], {}).save(path)
    assert_same(loaded, made)
    assert Calibration.load(path).layers == []


def test_the_file_is_readable_to_others(made, tmp_path):
    """As any file one writes: what the umask leaves."""
    (tmp_path / "plain").write_text("")
    made.save(tmp_path / "c.safetensors")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "c.safetensors")}
    assert len(modes) == 1


def test_the_file_is_plain_safetensors(made, tmp_path, monkeypatch):
    """Nothing in it is code: torch.load and pickle are not used to read it."""
    path = tmp_path / "c.safetensors"
    made.save(path)
    assert set(safetensors.torch.load_file(path)) == {f"{i}.{name}" for i in range(2) for name in TENSORS}

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("pickle.loads", "pickle.load", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert_same(Calibration.load(path), made)


def test_a_pickle_is_not_loaded(tmp_path):
    path = tmp_path / "c.safetensors"
    torch.save({"layers": []}, path)
    with pytest.raises(ValueError, match="is not a usable headq_ao calibration"):
        Calibration.load(path)


def rewrite(path, change=None, drop=(), edit=None, signed=True):
    """The file with another description, other tensors or without some; ``signed``: with a checksum that fits."""
    with safetensors.safe_open(path, "pt") as f:
        metadata = dict(f.metadata())
    tensors = {n: t.clone() for n, t in safetensors.torch.load_file(path).items() if n not in drop}
    if edit:
        edit(tensors)
    head = json.loads(metadata["headq_calibration"])
    text = change(head) if change else head
    metadata["headq_calibration"] = text if isinstance(text, str) else json.dumps(text)
    if signed:
        metadata["headq_sha256"] = checksum(metadata["headq_calibration"], tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def without(head, key):
    return {k: v for k, v in head.items() if k != key}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), ""),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:40]), ""),
    "truncated body": (lambda p: p.write_bytes(p.read_bytes()[:-4]), ""),
    "longer body": (lambda p: p.write_bytes(p.read_bytes() + b"0000"), ""),
    "flipped header": (lambda p: p.write_bytes(p.read_bytes().replace(b"F32", b"F99", 1)), ""),
    "flipped last bit": (lambda p: flip(p, -1), "its checksum does not fit its content"),
    "text": (lambda p: p.write_text("0123456789" * 9), ""),
    "other safetensors": (
        lambda p: safetensors.torch.save_file({"w": torch.ones(1)}, p),
        "no headq_calibration entry; make one with calibrate",
    ),
    "newer": (lambda p: rewrite(p, lambda h: h | {"version": 99}), "version 99 is newer than .*; update headq_ao"),
    "older": (
        lambda p: rewrite(p, lambda h: h | {"version": 1}),
        "version 1 is older than .*; make one with calibrate",
    ),
    "uniform moments alone": (  # what headq_ao wrote before it weighted them by attention
        lambda p: rewrite(
            p, lambda h: h | {"version": 2}, drop=[f"{i}.{n}" for i in (0, 1) for n in TENSORS if "seen" in n]
        ),
        "version 2 is older than .*; make one with calibrate",
    ),
    "no seen moments": (lambda p: rewrite(p, drop=("0.q_seen_outer",)), "it has no '0.q_seen_outer'"),
    "a scalar for each layer": (
        lambda p: rewrite(p, edit=lambda t: t.update({"1.v_seen": torch.ones(1)})),
        r"layer 1: v_seen must be \(2,\), got \(1,\)",
    ),
    "older, no checksum yet": (lambda p: rewrite(p, lambda h: h | {"version": 1}, signed=False), "version 1 is older"),
    "no version": (lambda p: rewrite(p, lambda h: without(h, "version")), "version"),
    "a version of another kind": (lambda p: rewrite(p, lambda h: h | {"version": "2"}), "no version, got '2'"),
    "no fingerprint": (lambda p: rewrite(p, lambda h: without(h, "fingerprint")), "it has no 'fingerprint'"),
    "another fingerprint": (
        lambda p: rewrite(p, lambda h: h | {"fingerprint": {}}, signed=False),
        "it was changed or damaged; make one with",
    ),
    "another number": (lambda p: rewrite(p, edit=lambda t: t["0.k_sum"].mul_(1.5), signed=False), "changed or damaged"),
    "no JSON": (lambda p: rewrite(p, lambda h: "{"), ""),
    "another JSON": (lambda p: rewrite(p, lambda h: [1]), ""),
    "layers of another kind": (lambda p: rewrite(p, lambda h: h | {"layers": [3]}), ""),
    "no tokens": (lambda p: rewrite(p, lambda h: h | {"layers": [{"tokens": 0, "groups": 1}] * 2}), "layer 0: tokens"),
    "more layers": (lambda p: rewrite(p, lambda h: h | {"layers": h["layers"] * 2}), "2.q_outer"),
    "fewer layers": (lambda p: rewrite(p, lambda h: h | {"layers": h["layers"][:1]}), "tensors that no layer has: 1.k"),
    "a lost tensor": (lambda p: rewrite(p, drop=("1.v_sum",)), "it has no '1.v_sum'"),
    "another shape": (
        lambda p: rewrite(p, edit=lambda t: t.update({"1.q_outer": torch.ones(1, 4, 4)})),
        r"layer 1: q_outer must be \(2, 4, 4\), got \(1, 4, 4\)",
    ),
    "not finite": (lambda p: rewrite(p, edit=lambda t: t["1.v_outer"].fill_(torch.nan)), "v_outer must hold finite"),
    "another dtype": (lambda p: rewrite(p, edit=lambda t: t.update({"0.v_sum": torch.ones(2, 4).half()})), "float32"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(made, tmp_path, name):
    path = tmp_path / "c.safetensors"
    made.save(path)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(ValueError, match=f"c.safetensors' is not a usable headq_ao calibration: .*{message}"):
        Calibration.load(path)


def framed(layers, segment_tokens):
    return [{**without(x, "segment_tokens"), **segment_tokens} for x in layers]


def test_files_say_whether_keys_are_in_the_frame_of_their_segment(made, tmp_path):
    """Those of version 4 do not, and their keys are not."""
    path, layers = tmp_path / "c.safetensors", [dataclasses.replace(x, segment_tokens=512) for x in made.layers]
    Calibration(layers, made.fingerprint, made.meta).save(path)
    assert [x.segment_tokens for x in Calibration.load(path).layers] == [512, 512]
    rewrite(path, lambda h: h | {"layers": framed(h["layers"], {})})
    with pytest.raises(ValueError, match="segment_tokens must be a whole number of at least 0, got 'left out'"):
        Calibration.load(path)
    rewrite(path, lambda h: h | {"version": 4, "layers": framed(h["layers"], {})})
    assert [x.segment_tokens for x in Calibration.load(path).layers] == [0, 0]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no calibration file at '.*nowhere'; make one with calibrate"):
        Calibration.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a folder, not a calibration file"):
        Calibration.load(tmp_path)


def test_no_folder(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*gone' to write 'c.safetensors' to; create it first"):
        made.save(tmp_path / "gone" / "c.safetensors")


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_failed_save_leaves_the_old_file(made, tmp_path, monkeypatch, when):
    path = tmp_path / "c.safetensors"
    made.save(path)
    before = path.read_bytes()

    def half_written(tensors, target, metadata):
        with open(target, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    def fail(*args):
        raise OSError("disk full")

    if when == "writing":
        monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Calibration([], {}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_another_model(made):
    made.check_model(made.fingerprint)
    made.check_model(made.fingerprint | {"weights": [0.1002, 0.2495]})
    made.check_model({k: v for k, v in made.fingerprint.items() if k != "weights"})
    with pytest.raises(ValueError, match="made on another model: layers is 3 here and 2 there; run calibrate on this"):
        made.check_model(made.fingerprint | {"layers": 3})
    with pytest.raises(ValueError, match="another model: its weights differ; run"):
        made.check_model(made.fingerprint | {"weights": [0.1, 0.26]})
    with pytest.raises(ValueError, match="head_dim is 64 here and None there"):
        made.check_model(made.fingerprint | {"head_dim": 64})


def test_a_calibration_of_another_model_is_refused(tiny, llama, batches, tmp_path):
    calibration = run(llama, batches)
    other = tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2, seed=1)
    with pytest.raises(ValueError, match="the calibration was made on another model: its weights differ; run"):
        quantize_(other, headq_config(calibration=calibration))
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        quantize_(llama, headq_config(calibration=str(tmp_path / "gone.safetensors")))
    assert llama.config._attn_implementation == "sdpa"
