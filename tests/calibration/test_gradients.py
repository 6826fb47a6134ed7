"""Fisher information of cached rows: against autograd through a model, and what it predicts of the model's KL."""

import dataclasses

import pytest
import torch
from transformers import AttentionInterface

from headq_ao import Calibration, calibrate, headq_config, quantize_
from headq_ao.calibration.bit_allocation import coding_errors
from headq_ao.codecs.layer_codec import key_codec
from headq_ao.integrations.transformers import calibrate as calibrating
from headq_ao.integrations.transformers.models import rotary_embedding
from headq_ao.statistics.importance import RECENT
from headq_ao.statistics.moments import FISHER
from tests.calibration.moments import N_SINK

pytestmark = pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")
T = 192


@pytest.fixture
def llama(tiny):
    return tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2)


@pytest.fixture
def ids(token_ids):
    return token_ids(1, T)[0]


def made(model, ids, **options):
    return calibrate(model, [ids], **{"n_sink": N_SINK, "progress": False, "seed": 3} | options)


def with_leaves(model, ids, leaves):
    """Logits ``[T, V]``, where ``leaves[layer]``, of keys and of values, are added to what is read as codes."""

    def attend(module, q, k, v, mask, scaling=None, dropout=0.0, **given):
        dk, dv = leaves[module.layer_idx]
        age = torch.arange(T)[:, None] - torch.arange(T)
        packed = (age >= min(RECENT, T // 4)) & (torch.arange(T) >= N_SINK)
        k, v, dk, dv = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v, dk, dv))
        s = scaling * (q @ k.mT + (q @ dk.mT) * packed)
        a = s.masked_fill(age < 0, float("-inf")).softmax(-1)
        return (a @ v + (a * packed) @ dv).transpose(1, 2).contiguous(), None

    AttentionInterface.register("with_leaves", attend)
    before = model.config._attn_implementation
    model.set_attn_implementation("with_leaves")
    try:
        return model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation(before)


def zeros(layers=2):
    return [tuple(torch.zeros(1, 2, T, 32, requires_grad=True) for _ in "kv") for _ in range(layers)]


def test_sums_of_gradients_are_autograds(llama, ids):
    """``Σ g gᵀ`` in the frame of segments, for the same signs; and ``Σ (g·e)²`` of what 1 to 4 bits leave."""
    found, plain = made(llama, ids), made(llama, ids, gradients=False)
    leaves = zeros()
    logits = with_leaves(llama, ids, leaves).float()
    p = logits.detach().softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int8) * 2.0 - 1
    u = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
    shown = found.layers[0].tokens == T - N_SINK
    assert shown  # every token counts
    (logits * u).sum().backward()
    serving = calibrating.serving_of(llama)
    frames = calibrating.layer_frames(llama, serving)
    states = rows_of(llama, ids)
    for number, moments in enumerate(found.layers):
        frame, (by_k, by_v) = frames[number], (x.grad for x in leaves[number])
        k, v = states[number]
        whole = k.shape[2]
        for side, errors, by in zip((0, 1), coding_errors(plain.layers[number], k, v, n_sink=N_SINK, frame=frame),
                                    (by_k, by_v), strict=True):  # fmt: skip
            want = torch.stack([(by[:, :, :whole] * e).sum(-1).square().sum((0, 2)) for e in errors], -1)
            torch.testing.assert_close(moments.loss[:, side], want, rtol=2e-3, atol=1e-9)
        turned = frame.into(by_k, frame.of(torch.arange(T) - N_SINK))
        for got, x in ((moments.k_fisher, turned), (moments.v_fisher, by_v)):
            torch.testing.assert_close(got, torch.einsum("bhtd,bhte->hde", x, x), rtol=1e-3, atol=2e-6)


def rows_of(model, ids):
    """Keys and values of each layer, from a dense cache."""
    with torch.no_grad():
        cache = model(input_ids=ids[None], use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def test_directions_have_the_covariance_of_the_score(llama):
    """``diag(p) − p pᵀ``, over many signs."""
    recorder = calibrating.GradientRecorder([], 0, 0)
    logits, counted = torch.tensor([[[2.0, 1.0, 0.0, -1.0]] * 20000]), torch.ones(20000, dtype=torch.bool)
    u = recorder._directions(logits, counted)[0]
    p = logits[0, 0].softmax(-1)
    torch.testing.assert_close(u.T @ u / len(u), p.diag() - torch.outer(p, p), rtol=0, atol=5e-3)
    assert not recorder._directions(logits, ~counted).any()


def test_it_predicts_the_kl(llama, ids):
    """``½ Σ e_jᵀ F e_j`` of small random errors of one layer's keys or values, within what twelve directions allow."""
    many = [made(llama, ids, seed=s) for s in range(12)]
    with torch.no_grad():
        exact = with_leaves(llama, ids, zeros()).log_softmax(-1)
        for number in range(2):
            for side, name in enumerate(("k_fisher", "v_fisher")):
                fisher = torch.stack([getattr(c.layers[number], name) for c in many]).mean(0)
                kl = []
                for seed in range(16):
                    leaves = zeros()
                    e = 1e-2 * torch.randn(1, 2, T, 32, generator=torch.Generator().manual_seed(seed))
                    leaves[number][side].copy_(e)
                    off = with_leaves(llama, ids, leaves).log_softmax(-1)
                    kl.append((exact.exp() * (exact - off)).sum().item())
                predicted = 0.5 * 1e-4 * fisher.diagonal(dim1=-2, dim2=-1).sum().item()
                measured = sum(kl) / len(kl)
                assert 0.7 < measured / predicted < 1.4, (number, name, measured, predicted)


def test_the_metric_is_used_and_bits_follow_it(llama, ids):
    found, plain = made(llama, ids), made(llama, ids, gradients=False)
    assert found.meta["gradients"] and not plain.meta["gradients"]
    for with_, without in zip(found.layers, plain.layers, strict=True):
        assert all(getattr(without, name) is None and getattr(with_, name) is not None for name in FISHER)
        assert not torch.equal(key_codec(headq_config(), with_).hessian, key_codec(headq_config(), without).hessian)
        share = torch.tensor(without.relative_errors(1))
        torch.testing.assert_close(with_.key_metric.diagonal(0, 1, 2).mean(-1), torch.ones(2), rtol=1e-4, atol=1e-4)
        assert torch.isfinite(share).all()


def test_relative_errors_are_geometric_means(llama, ids):
    moments = made(llama, ids).layers[1]
    plain = dataclasses.replace(moments, k_fisher=None, v_fisher=None, loss=None)
    want = (torch.tensor(plain.relative_errors(0)) * moments.loss[:, 0]).sqrt()
    torch.testing.assert_close(torch.tensor(moments.relative_errors(0)), want)


def test_heads_that_nobody_reads_fall_back(llama, ids):
    moments = made(llama, ids).layers[0]
    fisher = moments.k_fisher.clone()
    fisher[1] = 0
    moments = dataclasses.replace(moments, k_fisher=fisher, v_fisher=torch.zeros_like(moments.v_fisher))
    assert torch.equal(moments.key_metric[1], moments.shrunk_c_q[1])
    assert torch.equal(moments.value_metric, torch.eye(32).expand(2, 32, 32))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(llama, ids, frozen, mode):
    llama.requires_grad_(not frozen).train()
    before = made(llama.eval(), ids)
    llama.train()
    with mode():
        found = made(llama, ids)
    assert llama.training and all(p.grad is None and p.requires_grad is not frozen for p in llama.parameters())
    assert llama.config._attn_implementation != "headq"
    for a, b in zip(before.layers, found.layers, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in FISHER)


def test_a_quantized_model_gives_the_same(llama, ids):
    plain = made(llama, ids)
    quantize_(llama, headq_config())
    for a, b in zip(plain.layers, made(llama, ids).layers, strict=True):
        assert torch.equal(a.k_fisher, b.k_fisher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama, ids, dtype):
    """Gradients are rounded; the metric keeps its directions."""
    wide, half = made(llama, ids), made(llama.to(dtype), ids)
    for a, b in zip(wide.layers, half.layers, strict=True):
        for x, y in ((a.k_fisher, b.k_fisher), (a.v_fisher, b.v_fisher)):
            alike = torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1))
            assert (alike > 0.8).all(), alike


@pytest.mark.parametrize("kind", [NotImplementedError, TypeError])
def test_without_gradients_a_warning_and_the_rest(llama, ids, monkeypatch, kind):
    """What fails is named; the calibration is that of ``gradients=False``."""
    plain = made(llama, ids, gradients=False)

    def refuse(*args, **kwargs):
        raise kind("derivative for aten::_weird is not implemented\nmore")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.warns(
        UserWarning, match="no gradients of this model .derivative for aten::_weird is not implemented.;"
    ):
        found = made(llama, ids)
    assert not found.meta["gradients"] and found.layers[0].loss is None
    assert torch.equal(found.layers[0].errors, plain.layers[0].errors)


def test_long_rows_are_read_in_pieces(llama, token_ids, monkeypatch):
    """Each of at most the tokens that layers are profiled on, and no more than the limit."""
    seen = []
    run = calibrating.GradientRecorder.run

    def watched(self, model, row, counted, **given):
        seen.append(len(row))
        run(self, model, row, counted, **given)

    monkeypatch.setattr(calibrating.GradientRecorder, "run", watched)
    monkeypatch.setattr(calibrating, "PROFILED_TOKENS", 100)
    monkeypatch.setattr(calibrating, "GRADIENT_TOKENS", 260)
    made(llama, token_ids(1, 230)[0])
    assert seen == [100, 100]  # the last 30 are too few
    seen.clear()
    calibrate(llama, token_ids(3, 120), n_sink=N_SINK, progress=False)
    assert seen == [100, 100]


def test_pieces_of_a_long_row_are_in_the_frame_of_segments(llama, token_ids):
    """A piece that starts behind the first segment counts as the same text in a row of its own."""
    ids = token_ids(1, 2048)[0]
    long, apart = made(llama, ids), calibrate(llama, ids.view(2, 1024), n_sink=N_SINK, seed=3, progress=False)
    for a, b in zip(long.layers, apart.layers, strict=True):
        assert a.segment_tokens == 256
        torch.testing.assert_close(a.k_fisher, b.k_fisher)
        torch.testing.assert_close(a.v_fisher, b.v_fisher)


def test_short_rows_are_joined(llama, token_ids, monkeypatch):
    """All tokens serve though no row is long enough by itself; first tokens of a row do not count."""
    seen = []
    run = calibrating.GradientRecorder.run

    def watched(self, model, row, counted, **given):
        seen.append((len(row), int(counted.sum())))
        run(self, model, row, counted, **given)

    monkeypatch.setattr(calibrating.GradientRecorder, "run", watched)
    rows = [token_ids(1, 30, seed=i)[0] for i in range(10)] + [token_ids(1, 300, seed=10)[0]]
    found = calibrate(llama, rows, n_sink=N_SINK, progress=False)
    assert found.meta["gradients"] and seen == [(300, 300 - 9 * N_SINK), (300, 300)]
    seen.clear()
    llama.config.max_position_embeddings = 100  # no joined row is longer than the model's positions
    calibrate(llama, rows[:10], n_sink=N_SINK, progress=False)
    assert [n for n, _ in seen] == [90, 90, 90]


def test_a_model_without_logits_is_calibrated(llama, ids):
    with pytest.warns(UserWarning, match="no gradients of this model .it returns no logits.;"):
        found = made(llama.base_model, ids)
    assert not found.meta["gradients"] and found.layers[0].errors is not None


def test_an_error_without_words_is_named(llama, ids):
    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    llama.lm_head.register_forward_hook(lambda module, args, out: Refusing.apply(out))
    with pytest.warns(UserWarning, match="no gradients of this model .NotImplementedError.;"):
        assert not made(llama, ids).meta["gradients"]


def test_all_layers_have_gradients_or_none(llama, ids):
    """Bits are shared among layers: what was measured of some alone is no measure for all."""
    llama.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: (out[0].detach(), *out[1:]))
    with pytest.warns(UserWarning, match="its logits do not depend on attention in layer 0 by a gradient"):
        found = made(llama, ids)
    assert all(layer.loss is None for layer in found.layers)


def test_modes_do_not_reach_what_is_kept(llama, ids, monkeypatch):
    """Costs are not rounded by autocast, and tensors can be used outside inference mode."""
    recorder = calibrating.GradientRecorder
    fold, folded = recorder._fold, []

    def watched(self, *given):
        folded.append(torch.is_autocast_enabled("cpu"))
        fold(self, *given)

    monkeypatch.setattr(recorder, "_fold", watched)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = made(llama, ids)
    assert folded == [False, False]
    assert not any(getattr(layer, name).is_inference() for layer in found.layers for name in FISHER)


def test_half_precision_behind_fp32_logits(llama, ids):
    """Directions are as large as where logits are fp16 too: it is inside that small gradients vanish."""
    llama.half()
    narrow = made(llama, ids)
    llama.lm_head.register_forward_hook(lambda module, args, out: out.float())
    for a, b in zip(narrow.layers, made(llama, ids).layers, strict=True):
        torch.testing.assert_close(b.v_fisher, a.v_fisher, rtol=0.2, atol=0.02 * float(a.v_fisher.abs().max()))


def test_files_hold_it(llama, ids, tmp_path):
    found = made(llama, ids)
    found.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert all(torch.equal(a.loss, b.loss) for a, b in zip(found.layers, again.layers, strict=True))
    broken = dataclasses.replace(found.layers[0], v_fisher=None)
    with pytest.raises(ValueError, match="layer 0: k_fisher, v_fisher, loss must come together"):
        broken.check(0)


def test_no_rope_no_frame(tiny, token_ids):
    """GPT-2: keys as they are."""
    model = tiny("gpt2", head_dim=32, heads=2, layers=1)
    found = made(model, token_ids(1, T)[0])
    assert rotary_embedding(model) is None and found.layers[0].segment_tokens == 0
    assert (found.layers[0].k_fisher.diagonal(0, 1, 2) > 0).all()
