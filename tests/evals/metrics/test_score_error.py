"""Model-visible errors: each formula and the accumulator by hand, the driver against a model that really ran."""

import itertools
import json
import math

import pytest
import torch
from torch import nn, tensor
from transformers.pytorch_utils import Conv1D

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.calibration.observers import RECORDER
from headq_ao.evals.harness.replay import output_projection
from headq_ao.evals.harness.scoring import NothingPackedError
from headq_ao.evals.metrics import formulas as metrics
from headq_ao.evals.metrics.score_error import ScoreErrors, score_error
from headq_ao.integrations.transformers.models import attention_modules

PREFILL, CHUNK = 64, 40
PACKING = {"warmup_tokens": 32, "residual_length": 16, "block_size": 32}
ALL = tensor([True, True, True])
TWO = tensor([True, True, False])


def test_key_mse_by_hand():
    k_hat, k = tensor([[1.0, 3.0], [0.0, 0.0]]), tensor([[1.0, 1.0], [1.0, 1.0]])
    assert metrics.key_mse(k_hat, k).tolist() == [2, 1]


def test_score_error_by_hand():
    assert metrics.score_error_variance(tensor([1.0, 3.0, 100.0]), TWO) == 1
    assert metrics.score_error_variance(tensor([0.0, 0.0, 3.0]), ALL) == 2
    assert metrics.score_error_variance(tensor([8.0, 8.0, 8.0]), ALL) < 1e-9


def test_fisher_error_by_hand():
    """½ (3/4·1 + 1/4·25 − 2²) = 1.5, and a constant changes nothing."""
    a = tensor([0.75, 0.25])
    assert metrics.fisher_error(a, tensor([1.0, 5.0])) == 1.5
    assert metrics.fisher_error(a, tensor([11.0, 15.0])) == 1.5


@pytest.mark.parametrize(
    ("a", "delta", "expected"),
    [
        ([0.5, 0.5], [0.0, math.log(3)], 0.5 * math.log(4 / 3)),  # â = ¼, ¾
        ([0.25, 0.75], [math.log(3), 0.0], 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),  # â = ½, ½
        ([0.5, 0.5], [0.0, 40.0], 20 - math.log(2)),  # â = e⁻⁴⁰, 1
        ([0.5, 0.5], [-1000.0, 1000.0], 1000 - math.log(2)),
        ([0.5, 0.5], [3.0, 3.0], 0),
        ([1.0, 0.0], [-200.0, 0.0], 0),  # the other key is hidden
        ([0.5, 0.5], [0.0, 1e-4], 1e-8 / 8),  # ½ Var, far below the rounding of a logarithm
    ],
)
def test_attention_kl_by_hand(a, delta, expected):
    found = metrics.attention_kl(tensor(a), tensor(delta))
    assert found.item() == pytest.approx(expected, rel=2e-3 if 0 < expected < 1e-6 else 1e-6, abs=1e-12)
    batch = metrics.attention_kl(tensor([a, [0.5, 0.5]]), tensor([delta, [0.0, 100.0]]))
    assert batch.tolist() == pytest.approx([found.item(), 50 - math.log(2)], rel=1e-5, abs=1e-12)


def test_logit_correlation_by_hand():
    s = tensor([1.0, 2.0, 3.0])
    assert metrics.logit_correlation(s, tensor([2.0, 1.0, 3.0]), ALL).item() == pytest.approx(0.5)
    assert metrics.logit_correlation(s, tensor([7.0, 9.0, 11.0]), ALL).item() == pytest.approx(1)
    assert metrics.logit_correlation(s, tensor([2.0, 1.0, 3.0]), TWO).item() == pytest.approx(-1)
    assert metrics.logit_correlation(s, tensor([4.0, 4.0, 4.0]), ALL) == 0


def test_relative_entropy_by_hand():
    a = tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    four, one = torch.ones(4, dtype=torch.bool), tensor([True, False, False, False])
    assert metrics.relative_entropy(a, four).tolist() == pytest.approx([0.5, 1, 0])
    assert metrics.relative_entropy(a[2], one) == 0


def test_top1_flips_by_hand():
    s = tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 0.0]])
    s_hat = tensor([[1.0, 2.0, -9.0], [3.0, 2.0, 9.0]])
    assert metrics.top1_flips(s, s_hat, TWO).tolist() == [False, True]


def test_value_error_by_hand():
    """¼·(2²/2) + ¼·(4²/2) = 2.5"""
    v, v_hat = torch.zeros(2, 2), tensor([[2.0, 0.0], [0.0, 4.0]])
    assert metrics.value_error(tensor([[0.5, 0.5]]), v_hat, v).tolist() == [2.5]


def test_attention_rows_pair_heads_with_their_kv_head():
    """Query heads 0, 1 read KV head 0, and 2, 3 read KV head 1."""
    q = torch.ones(1, 4, 1, 1)
    k, k_hat = tensor([[[[1.0], [2.0]], [[10.0], [20.0]]]]), tensor([[[[1.0], [5.0]], [[10.0], [20.0]]]])
    visible = metrics.causal_window(1, 2, None, q.device)
    s, delta, a = metrics.attention_rows(q, k, k_hat, 0.5, visible)
    assert s[0, :, 0].tolist() == [[0.5, 1.0]] * 2 + [[5.0, 10.0]] * 2
    assert delta[0, :, 0].tolist() == [[0.0, 1.5]] * 2 + [[0.0, 0.0]] * 2
    assert a[0, 0, 0, 1].item() == pytest.approx(1 / (1 + math.exp(-0.5)))


def test_accumulator_by_hand():
    """One query of 1 on keys 0, ln 3 that the cache gives as 0, 0: a = ¼, ¾ and â = ½, ½."""
    errors = ScoreErrors(n_layers=2, n_heads=1, n_kv_heads=1)
    rows = [tensor(x).view(1, 1, 2, 1) for x in ([0.0, math.log(3)], [0.0, 4.0], [0.0, 0.0], [0.0, 2.0])]
    errors.update(
        1, torch.ones(1, 1, 1, 1), *rows, scaling=1.0, project=lambda x: torch.cat([x, 2 * x], -1), packed=(1, 2)
    )
    found = {name: values[1] for name, values in errors.per_layer().items()}
    assert found == pytest.approx(
        {
            "key_mse": math.log(3) ** 2 / 2,
            "score_error": math.log(3) ** 2 / 4,
            "fisher_error": 0.5 * 3 / 16 * math.log(3) ** 2,
            "attention_kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
            "logit_correlation": 0,
            "top1_flips": 1,
            "route_flips": 0,
            "value_error": 9 / 16 * 4,
            "output_error": (3 - 1) ** 2 / 3**2,
        },
        rel=1e-6,
    )
    assert errors.packed_fraction == 0.5
    data = errors.to_dict()
    assert data["flips_by_entropy"]["share"] == [0, 0, 0, 1]  # H(¼, ¾) = 0.81 ln 2
    assert data["flips_by_entropy"]["flips"] == [None, None, None, 1]
    assert data["per_layer"]["output_error"] == [None, pytest.approx(4 / 9)]
    assert data["worst_layer"]["attention_kl"] == {"layer": 1, "value": found["attention_kl"]}
    json.dumps(data, allow_nan=False)


def test_route_flips_are_those_of_rows_on_one_key():
    """Both queries' first key changes; only the first one's attention was nearly all on one key."""
    errors = ScoreErrors(1, n_heads=2, n_kv_heads=1)
    q, k = tensor([50.0, 3.0]).view(1, 2, 1, 1), tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 4, 1)
    errors.update(0, q, k, k, k.flip(2), k, scaling=1.0)
    assert errors.per_head()["top1_flips"].tolist() == [[1, 1]]
    assert errors.per_head()["route_flips"].tolist() == [[1, 0]]
    assert errors.flips_by_entropy()["share"] == [0.5, 0.5, 0, 0]  # H(20/23, 1/23, 1/23, 1/23) = 0.38 ln 4


def test_errors_belong_to_the_query_heads_that_read_them():
    """Four query heads on two KV heads, of which the second one is wrong."""
    errors = ScoreErrors(1, n_heads=4, n_kv_heads=2)
    k = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    wrong = k * tensor([1.0, 0.5]).view(1, 2, 1, 1)
    errors.update(0, torch.ones(1, 4, 2, 8), k, k, wrong, wrong, scaling=1.0)
    for name in ("key_mse", "score_error", "fisher_error", "attention_kl", "value_error"):
        assert (errors.per_head()[name][0] > 1e-3).tolist() == [False, False, True, True], name


def test_worst_layer():
    errors = ScoreErrors(3, 1, 1)
    q, k = torch.ones(1, 1, 1, 1), tensor([0.0, 1.0, 3.0]).view(1, 1, 3, 1)
    for layer, x in enumerate((0.0, 2.0, 1.0)):
        errors.update(layer, q, k, k, k + x * tensor([0.0, 1.0, -1.0]).view(1, 1, 3, 1), k, scaling=1.0)
    worst = errors.summary()["worst_layer"]
    assert [worst[name]["layer"] for name in ("key_mse", "fisher_error", "logit_correlation")] == [1, 1, 1]
    assert worst["logit_correlation"]["value"] == min(errors.per_layer()["logit_correlation"]) < 0.2


def states(tokens, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, tokens, 8, generator=g) for heads in (4, 2, 2))
    return q, k, v, k + torch.randn(k.shape, generator=g), v + torch.randn(v.shape, generator=g)


def feed_rows(errors, seed, cuts):
    q, *rows = states(50, seed)
    for start, stop in itertools.pairwise(cuts):
        past = [x[:, :, :stop] for x in rows]
        errors.update(
            0, q[:, :, start:stop], *past, scaling=0.3, window=30, project=lambda x: x[..., :5], packed=(4, 20)
        )
    return errors


def test_chunks_and_merged_rows_give_the_same_sums():
    whole = feed_rows(feed_rows(ScoreErrors(1, 4, 2), 0, [10, 50]), 1, [10, 50])
    chunked = feed_rows(ScoreErrors(1, 4, 2), 0, [10, 17, 50]).merge(feed_rows(ScoreErrors(1, 4, 2), 1, [10, 33, 50]))
    for name, x in whole.sums.items():
        torch.testing.assert_close(chunked.sums[name], x, rtol=1e-5, atol=1e-6, msg=name)
    assert whole.summary()["queries"] == 2 * 2 * 40


@pytest.mark.parametrize("bias", [True, False])
def test_output_projection_is_linear_whatever_the_module(bias):
    class Attention(nn.Module):
        def __init__(self, name, projection):
            super().__init__()
            setattr(self, name, projection)

    weight, x = torch.randn(3, 2), torch.randn(1, 5, 2)
    linear = nn.Linear(2, 3, bias=bias)
    linear.weight.data = weight
    conv = Conv1D(3, 2)
    conv.weight.data, conv.bias.data = weight.T.clone(), torch.randn(3)
    with torch.no_grad():
        for name, module in (("o_proj", linear), ("dense", linear), ("c_proj", conv)):
            torch.testing.assert_close(output_projection(Attention(name, module))(x), x @ weight.T)
    with pytest.raises(ValueError, match="Attention has no output projection named o_proj, dense"):
        output_projection(Attention("other", linear))


def attention_outputs(model, run):
    """What the first layer's output projection gives in ``run()``, ``[T, hidden]``."""
    out = []
    module = attention_modules(model, model.config.num_hidden_layers)[0]
    projection = next(getattr(module, n) for n in ("o_proj", "dense", "c_proj") if hasattr(module, n))
    hook = projection.register_forward_hook(lambda _, __, y: out.append(y[0]))
    with torch.no_grad():
        run()
    hook.remove()
    bias = getattr(projection, "bias", None)
    return torch.cat(out).double() - (0 if bias is None else bias.detach().double())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"key_codec": "affine", "sign": -1, "value_codec": "affine"}),
        ("llama", {"rank": 8}),
        ("llama", {"v_bits": None}),
        ("llama", {"k_bits": None}),
        ("mistral", {"residual_length": 32}),  # a window of 100
        ("gpt2", {}),
        ("gpt_neox", {"key_codec": "affine", "k_zero_point": True}),
    ],
)
def test_first_layer_is_what_a_real_run_does(tiny, token_ids, reference_ops, family, options):
    """Its inputs do not depend on the cache: the output error is that of the model's own cached attention."""
    model = tiny(family)
    compare_with_a_run(model, token_ids(1, 424), headq_config(**PACKING | options), CHUNK)


@pytest.mark.parametrize("chunk", [1, 8, CHUNK])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_calibrated_run_packs_as_it_decodes(tiny, token_ids, family, chunk):
    """Calls of few tokens pack what leaves the window before attention, longer ones after it."""
    model, rows = tiny(family), token_ids(1, 424)
    calibration = calibrate(model, [token_ids(1, 512, seed=1)[0]], progress=False)
    config = headq_config(calibration=calibration, residual_length=32)
    rows = rows[:, :224] if chunk == 1 else rows
    compare_with_a_run(model, rows, config, chunk, tolerance=0.01)  # the compiled kernels round


def compare_with_a_run(model, rows, config, chunk, tolerance=1e-3):
    """The error of the first layer's output and the share of packed tokens, against those of a run in calls."""
    dense = attention_outputs(model, lambda: model(rows, use_cache=False))
    quantize_(model, config)
    cache = HeadQCache(model)

    def run():
        model(rows[:, :PREFILL], cache=cache)
        for start in range(PREFILL, rows.shape[1], chunk):
            model(rows[:, start : start + chunk], cache=cache)

    cached = attention_outputs(model, run)
    errors = score_error(model, rows, prefill=PREFILL, chunk=chunk, progress=False)
    expected = ((cached - dense)[PREFILL:].square().sum() / dense[PREFILL:].square().sum()).item()
    assert errors.per_layer()["output_error"][0] == pytest.approx(expected, rel=tolerance)
    assert expected > 1e-4
    layer = cache.layers[0]
    held = layer.table.columns * layer.batch.page_tokens
    assert (held < layer.batch.lengths.packed()[0]) == layer.is_sliding, "only a sliding window uses pages again"
    packed, read = cache.rows_read
    read -= sum(min(i, layer.sliding_window or i) for i in range(1, PREFILL + 1)) * len(cache.layers)
    assert errors.packed_fraction == pytest.approx(packed / read)


def test_bits_and_sides(tiny, token_ids):
    model, rows = tiny(), token_ids(2, 200)
    found = {}
    for name, options in {
        "8": {"k_bits": 8, "v_bits": 8},
        "2": {},
        "v": {"k_bits": None},
        "k": {"v_bits": None},
    }.items():
        quantized = tiny()
        quantize_(quantized, headq_config(**PACKING | options))
        found[name] = score_error(quantized, rows, prefill=PREFILL, chunk=CHUNK, progress=False).summary()["mean"]
    assert found["8"]["attention_kl"] < found["2"]["attention_kl"] / 100
    assert found["8"]["logit_correlation"] > found["2"]["logit_correlation"]
    assert found["v"]["attention_kl"] == found["v"]["key_mse"] == 0 and found["v"]["output_error"] > 1e-4
    assert found["k"]["value_error"] == 0 and found["k"]["attention_kl"] == pytest.approx(found["2"]["attention_kl"])
    assert not hasattr(model, "_headq")


def test_own_cache_and_a_clean_model(tiny, token_ids):
    """``make_cache`` is used, once per row, and the model answers as before."""
    model, rows, made = tiny(), token_ids(2, 150), []
    quantize_(model, headq_config(**PACKING))
    before = model(rows).logits

    def make_cache():
        made.append(HeadQCache(model))
        return made[-1]

    given = score_error(model, rows, make_cache, PREFILL, CHUNK, progress=False)
    own = score_error(model, rows, None, PREFILL, CHUNK, progress=False)
    assert len(made) == 2
    assert given.to_dict() == own.to_dict()
    assert RECORDER.get() is None
    assert torch.equal(model(rows).logits, before)


def test_refuses(tiny, token_ids):
    model, rows = tiny(), token_ids(1, 100)
    with pytest.raises(ValueError, match="has no HeadQ cache; call quantize_"):
        score_error(model, rows)
    quantize_(model, headq_config())
    with pytest.raises(ValueError, match=r"T above prefill = 100 > 0, got \(1, 100\)"):
        score_error(model, rows, prefill=100)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        score_error(model, rows, prefill=50, chunk=0)
    with pytest.raises(NothingPackedError, match="no packed token was read in 1 rows of 100 tokens"):
        score_error(model, rows, prefill=50, progress=False)
    with pytest.raises(ValueError, match="train mode"):
        score_error(model.train(), rows, prefill=50)
