"""KVLinC: the linear term of attention, its state, and its training."""

import pytest
import torch

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.baselines import kvlinc


@pytest.fixture
def maps(tiny, token_ids, tmp_path):
    """``maps(argument)``: a file for the tiny model of one layer."""

    def make(argument="key", steps=10):
        path = tmp_path / f"{argument}.safetensors"
        rows = list(token_ids(2, 400, seed=4))
        kvlinc.train(tiny(layers=1), rows, out=path, argument=argument, steps=steps, progress=False)
        return str(path)

    return make


def put_on(model, path, argument):
    options = {"maps": path, "argument": argument}
    quantize_(model, headq_config(codec="kvlinc", codec_options=options, residual_length=128))
    return model


def test_features_are_two_distributions():
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 2, 8, 128)
    phi = kvlinc.features(x, weight)
    assert phi.shape == (2, 5, 256)
    torch.testing.assert_close(phi[..., :128], (x @ weight[:, 0]).softmax(-1))
    torch.testing.assert_close(phi[..., 128:], (x @ weight[:, 1]).softmax(-1))


@pytest.mark.parametrize("argument", kvlinc.ARGUMENTS)
def test_attention_has_the_linear_term(tiny, maps, argument):
    """One layer, one step, against the published formula over all packed tokens, state made from scratch."""
    model = put_on(tiny(layers=1), maps(argument), argument)
    cache = HeadQCache(model)
    q, k, v = (torch.randn(2, 2, 520, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    v, layer = 30 * v, cache.layers[0]  # so that the term shows
    layer.update(k[:, :, :400], v[:, :, :400])
    layer.commit(q[:, :, :400].repeat_interleave(2, 1))
    layer.update(k[:, :, 400:], v[:, :, 400:])
    layer.commit(q[:, :, 400:].repeat_interleave(2, 1))
    layer.batch.settle()
    n, codec = layer.batch.lengths.packed()[0], layer.codec
    assert n == 384
    k_hat, v_hat = layer.dequantize()
    body = slice(4, 4 + n)
    given = k[:, :, body] - k_hat[:, :, body] if argument == "residual" else k[:, :, body]
    phi_k = kvlinc.features(given, codec.fixed["key_map"])
    s, p = phi_k.mT @ v[:, :, body], phi_k.sum(2)
    torch.testing.assert_close(codec.own["value.sum"].float(), s, atol=0.5, rtol=0.01)
    torch.testing.assert_close(codec.own["key.sum"].float(), p, atol=0.05, rtol=0.01)
    step = [torch.randn(2, 2, 1, 32, generator=torch.Generator().manual_seed(9 + i)) for i in range(3)]
    layer.update(step[1], step[2])
    query = step[0].repeat_interleave(2, 1)
    out = layer.attend(query, 32**-0.5, step[1], step[2])
    keys, values = (torch.cat(x, 2).repeat_interleave(2, 1) for x in ((k_hat, step[1]), (v_hat, step[2])))
    phi_q = kvlinc.features(query * 32**-0.5, codec.fixed["query_map"])
    a = (query * 32**-0.5 @ keys.mT).exp()
    s, p = (x.repeat_interleave(2, 1) for x in (s, p))
    expected = (a @ values + phi_q @ s) / (a.sum(-1, keepdim=True) + phi_q @ p[..., None])
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
    plain = a @ values / a.sum(-1, keepdim=True)
    assert (plain - expected).abs().max() > 0.01  # else the term would not show


def test_the_state_is_charged(tiny, token_ids, maps):
    model = put_on(tiny(layers=1), maps(), "key")
    cache = HeadQCache(model)
    model(token_ids(1, 600), cache=cache)
    report = cache.bits_report()
    assert report.bytes["bases"] == 2 * 256 * (32 + 1) * 2  # heads, features, coordinates and mass, bytes
    packed = 384
    assert report.key_stored_bits == pytest.approx(2 + 32 / 128 + 8 * 2 * 256 * 2 / (packed * 2 * 32))
    assert report.value_stored_bits == pytest.approx(3 + 8 * 2 * 256 * 32 * 2 / (packed * 2 * 32))
    with pytest.raises(RuntimeError, match="sums up what it packs"):
        cache.crop(-400)


def test_files_and_generation(tiny, token_ids, maps, tmp_path):
    model, ids = put_on(tiny(layers=1), maps("residual"), "residual"), token_ids(2, 560)
    cache = HeadQCache(model)
    model(ids[:, :500], cache=cache)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = HeadQCache.load(tmp_path / "prompt.safetensors", model)
    a, b = (model(ids[:, 500:], cache=c).logits for c in (cache, loaded))
    torch.testing.assert_close(a, b, atol=0, rtol=0)
    out = model.generate(ids, max_new_tokens=140, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 700)


def test_training_lowers_the_error(tiny, token_ids, tmp_path):
    rows = list(token_ids(2, 400, seed=4))
    file = kvlinc.train(tiny(layers=1), rows, out=tmp_path / "m.safetensors", steps=60, progress=False)
    alone, first, last = file.tensors["0.losses"].tolist()
    assert last < first and last < alone
    again = kvlinc.train(tiny(layers=1), rows, out=tmp_path / "n.safetensors", steps=60, progress=False)
    assert torch.equal(again.tensors["0.query"], file.tensors["0.query"])  # the seed says it all


def test_the_base_of_training_is_the_codec(tiny, token_ids):
    """What training takes for the base's output is what the cache's base gives."""
    q, k, v = (torch.randn(4 if i == 0 else 2, 400, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    block = kvlinc.blocks(q, k, v, 32**-0.5, 4, "key", 0)
    model = tiny(layers=1)
    quantize_(model, headq_config(codec="kvlinc_base", residual_length=128))
    layer = HeadQCache(model).layers[0]
    layer.update(k[None], v[None])
    layer.commit(q[None])
    layer.batch.settle()
    k_hat, v_hat = layer.dequantize()
    assert layer.batch.lengths.packed() == [256]
    # the queries of the last block stand behind all 256 packed tokens
    s = block.q[:, :, -1].flatten(0, 1) @ k_hat[0].repeat_interleave(2, 0).mT
    assert s.shape[-1] == 400
    top = block.top[:, :, -1].flatten(0, 1)
    weighted = block.weighted[:, :, -1].flatten(0, 1) / block.mass[:, :, -1].flatten(0, 1)[..., None]
    errors, values = [], v_hat[0].repeat_interleave(2, 0)
    for i in range(weighted.shape[1]):  # which position a query stood at: the one whose window gives its output
        outs = [s[:, i, : t + 1].softmax(-1)[:, None] @ values[:, : t + 1] for t in range(387, 400)]
        errors.append(min(float((o[:, 0] - weighted[:, i]).abs().max()) for o in outs))
    assert max(errors) < 1e-4 and top.isfinite().all()


def test_another_argument_is_another_file(tiny, maps):
    with pytest.raises(ValueError, match="it is a kvlinc key maps"):
        put_on(tiny(layers=1), maps("key"), "residual")


def test_command(tiny_folder, text_file, tmp_path, capsys):
    path = tmp_path / "maps.safetensors"
    arguments = ["train", str(tiny_folder), "-o", str(path), "--text", str(text_file(tokens=1200)), "--tokens", "1024"]
    assert kvlinc.main([*arguments, "--steps", "2", "--no-progress"]) == 0
    head, tensors = kvlinc.MAPS["key"].load(path)
    assert head["settings"]["steps"] == 2 and tensors["0.query"].shape == (4, 2, 32, 128)
    assert "written: maps.safetensors" in capsys.readouterr().err
