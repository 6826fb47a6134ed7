"""Multi-head latent attention: rows stored once, read absorbed."""

import copy

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.codecs.linalg import centred_moment
from headq_ao.codecs.whitened import Readout, joint_metric, readout_metric, whitened_codec
from headq_ao.evals.models.sweep_checks import OPTIONS, check, noisy_cache, relative, stream, wrong
from headq_ao.evals.models.tiny import classes, tiny_model
from headq_ao.integrations.transformers import latent

pytestmark = [
    pytest.mark.filterwarnings("ignore:The attention mask", "ignore:.*runs on dense", "ignore:.*effective tokens"),
    pytest.mark.usefixtures("no_gradients"),
]
SIZES = [100, *[1] * 20, 17, 40]


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


TOKENS = sum(SIZES)


def ids_of(batch=2, tokens=TOKENS):
    return torch.randint(5, 100, (batch, tokens), generator=torch.Generator().manual_seed(0))


def model_of(name="deepseek_v3"):
    return tiny_model(*classes("causal")[name])


def wide(**options):
    """With rows as wide as DeepSeek's."""
    torch.manual_seed(0)
    given = dict(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=32,
        v_head_dim=16, max_position_embeddings=1024, first_k_dense_replace=1, initializer_range=0.1,
    )  # fmt: skip
    return DeepseekV2ForCausalLM(DeepseekV2Config(**given | options)).eval()


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "longcat_flash", "kimi_linear"])
def test_every_way_that_a_cache_is_used(name):
    found = check(model_of(name))
    assert found["kind"] == "native"
    assert wrong(found) == []


def test_a_row_takes_a_fifth_of_its_latent():
    model = wide()
    quantize_(model, headq_config(k_bits=3, v_bits=3, warmup_tokens=64, residual_length=16))
    cache = HeadQCache(model)
    stream(model, ids_of(1, 200), cache, [200])
    report = cache.bits_report()
    assert report.packed_rows > 150
    assert report.key_body_bits == 3 + 8 / 576
    assert report.value_body_bits is None
    assert report.key_body_bits * 576 / 8 <= 2 * 576 / 5
    assert report.bytes["exact_rows"] == cache.layers[0].window.k[:, :, :200].nbytes
    assert sum(report.bytes.values()) == cache.get_memory_footprint()


def test_rows_of_576_against_noise():
    model, ids = wide(), ids_of()
    dense = copy.deepcopy(model)
    quantize_(model, headq_config(**OPTIONS))
    exact = stream(dense, ids, DynamicCache(config=dense.config), SIZES)
    control = relative(stream(dense, ids, noisy_cache(dense, 0), SIZES), exact)
    cache = HeadQCache(model)
    error = relative(stream(model, ids, cache, SIZES), exact)
    assert 0 < error < 2 * control
    assert cache.layers[0].rows_of_model()[0].shape == (2, 1, sum(SIZES), 512)


def test_one_window_and_one_set_of_pages():
    model = model_of()
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)
    stream(model, ids_of(), cache, SIZES)
    layer = cache.layers[0]
    assert layer.window.v is layer.window.k
    cache.reorder_cache(torch.tensor([1, 0]))
    other = HeadQCache(model)
    stream(model, ids_of().flip(0), other, SIZES)
    one, two = (model(input_ids=torch.tensor([[7], [7]]), cache=c).logits for c in (cache, other))
    assert torch.equal(one, two)


def test_put_on_and_taken_off():
    model, ids = model_of(), ids_of(1, 300)
    before = model(ids[:, :40], use_cache=False).logits
    calibrate(model, [ids], progress=False)
    assert not any("expand_kv" in vars(module) for module in model.modules())
    quantize_(model, headq_config(**OPTIONS))
    assert any("expand_kv" in vars(module) for module in model.modules())
    assert torch.equal(model(ids[:, :40], use_cache=False).logits, before)
    restore_(model)
    assert not any("expand_kv" in vars(module) for module in model.modules())
    assert torch.equal(model(ids[:, :40], use_cache=False).logits, before)


def test_a_copy_reads_its_own_weights():
    model = model_of()
    quantize_(model, headq_config(**OPTIONS))
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if latent.is_latent(module):
            module.kv_b_proj.weight.zero_()
            assert module.expand_kv.module is module
    ids = ids_of()
    assert not torch.equal(stream(model, ids, HeadQCache(model), SIZES), stream(twin, ids, HeadQCache(twin), SIZES))


@pytest.mark.parametrize(
    "options", [dict(k_bits=None), dict(rank=16), dict(key_codec="affine", k_zero_point=True), dict(adapt="prompt")]
)
def test_what_has_no_one_row_is_dequantized(options):
    model = model_of()
    with pytest.warns(UserWarning, match="memory is saved, time is not"):
        quantize_(model, headq_config(**OPTIONS | options))
    stream(model, ids_of(), HeadQCache(model), SIZES)


def test_an_indexer_is_not_served_natively():
    model = model_of("deepseek_v32")
    with pytest.warns(UserWarning, match="memory is saved, time is not"):
        quantize_(model, headq_config(**OPTIONS))


def test_attention_weights():
    model, ids = model_of(), ids_of()
    dense = copy.deepcopy(model)
    dense.set_attn_implementation("eager")
    quantize_(model, headq_config(**OPTIONS))
    cache, plain = HeadQCache(model), DynamicCache(config=dense.config)
    for who, held in ((model, cache), (dense, plain)):
        stream(who, ids, held, [150])
    found, exact = (
        who(input_ids=ids[:, 150:151], cache=held, output_attentions=True).attentions[0]
        for who, held in ((model, cache), (dense, plain))
    )
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 0.01


def test_weights_that_are_not_plain_are_read_by_what_they_make_of_axes():
    module = next(m for m in model_of().modules() if latent.is_latent(m))
    plain = latent.projections(module)

    class Other(torch.nn.Linear):
        pass

    module.kv_b_proj.__class__ = Other
    for one, other in zip(plain, latent.projections(module), strict=True):
        torch.testing.assert_close(one, other)


def test_bits_of_rows_are_allocated_between_layers():
    model, ids = model_of(), ids_of(4, 400)
    calibration = calibrate(model, [ids], progress=False)
    assert all(bool((layer.errors[:, 0] > 0).all()) for layer in calibration.layers)
    for layer in calibration.layers:
        layer.effective = None
    calibration.layers[1].errors *= 100
    quantize_(model, headq_config(calibration=calibration, mean_bits=2.5))
    (first,), (second,) = (codec.bits.k for codec in model._headq.codecs)
    assert first < second
    assert first + second <= 5
    assert all(codec.values is None for codec in model._headq.codecs)


def test_readout_metric_is_the_output_error():
    """``E‖Σ_j a_j (δs_j W (x_j − o) + W e_j)‖²`` over random queries and errors is ``eᵀ (C_q + λ WᵀW) e`` in a unit."""
    g = torch.Generator().manual_seed(0)
    d, scaling = 12, 0.3
    w, root = torch.randn(5, d, generator=g).double(), torch.randn(d, d, generator=g).double()
    of = Readout(w[None], scaling)
    covariance, q = (
        root @ root.mT,
        torch.randn(200_000, d, generator=g).double() @ torch.randn(d, d, generator=g).double(),
    )
    e, x = torch.randn(d, generator=g).double(), torch.randn(200_000, d, generator=g).double() @ root.mT
    shifted = scaling * (q @ e)[:, None] * (x @ w.mT)
    expected = shifted.square().sum(-1).mean() + (w @ e).square().sum()
    c_q = q.mT @ q / len(q)
    metric = c_q + readout_metric(of.outer, scaling, covariance[None, None])[0, 0]
    unit = scaling**2 * (of.outer[0, 0] * covariance).sum()
    torch.testing.assert_close(unit * (e @ metric @ e), expected, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("calibrated", [False, True])
def test_how_much_an_error_counts_as_that_of_a_value(calibrated):
    """``value_weight`` is a factor of what values add to the metric: none at 0, and 1 by default."""
    model, ids, found = model_of(), ids_of(2, 400), {}
    calibration = calibrate(model, [ids], progress=False) if calibrated else None
    for layer in calibration.layers if calibration else ():
        layer.effective = None
    for weight in (None, 0, 1, 4):
        quantize_(model, headq_config(calibration=calibration, k_bits=2, v_bits=2, value_weight=weight))
        cache = HeadQCache(model)
        with torch.no_grad():
            model(ids, cache=cache)
        layer = cache.packed[0]
        keys = layer.source.calibrated if calibrated else layer.codec.keys
        found[weight] = keys.hessian if calibrated else keys.q_factor @ keys.q_factor.mT
        restore_(model)
    assert torch.equal(found[None], found[1])
    once, often = found[1] - found[0], found[4] - found[0]
    assert once.norm() > 0.02 * found[0].norm()
    if calibrated:
        torch.testing.assert_close(often, 4 * once, rtol=1e-3, atol=1e-4 * float(often.abs().max()))
    else:
        assert (often - once).norm() > 0.02 * found[0].norm()


def test_the_joint_metric_pays():
    """Output error of rows that are coded for both readings, against rows coded as keys alone."""
    model, ids = wide(kv_lora_rank=48, qk_rope_head_dim=16), ids_of(4, 400)
    module = next(m for m in model.modules() if latent.is_latent(m))
    values = module.kv_b_proj.weight.view(4, 48, 48)[:, 32:]
    values.mul_(torch.linspace(0, 3, 48) ** 2)  # values use a few directions of the latent
    calibration = calibrate(model, [ids], progress=False)
    moments = calibration.layers[0]
    mean, outer = moments.shrunk("k")
    found, readout = [], latent.readout(module)
    rows = moments.k_rows.transpose(0, 1)[None]
    for added in (joint_metric(moments, readout), None):
        config = headq_config(k_bits=2, v_bits=2)
        codec = whitened_codec(
            config, moments.shrunk_c_q[None], mean[None], centred_moment(mean, outer)[None], False, added
        )
        error = codec.dequantize(*codec.quantize(rows, config.unbiased_scale)) - rows
        metric = moments.weighted_c_q[None] + joint_metric(moments, readout)
        found.append(float((error @ metric * error).sum()))
    assert found[0] < 0.95 * found[1]
