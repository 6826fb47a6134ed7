"""Gradients: the first, exact call has those of the dense model; a call that reads packed tokens refuses by name."""

import pytest
import torch
import transformers

from headq_ao import HeadQCache, calibrate, headq_config, quantize_

OPTIONS = {"epoch_tokens": 32, "residual_length": 32, "block_size": 16}
WANTED = "gradients are wanted"
FAMILIES = ["llama", "gpt2", "gemma3", "mistral", "gpt_neox"]


def gradients(model, ids, **options):
    """Of one logit, for the embeddings and for every parameter."""
    model.zero_grad(set_to_none=True)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, **options).logits[0, -1, 7].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {"inputs_embeds": embeds.grad}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_call_has_the_gradients_of_the_dense_model(tiny, token_ids, family, training):
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model, ids = tiny(family, **options).train(training), token_ids(1, 120)
    exact = gradients(model, ids)
    quantize_(model, headq_config(**OPTIONS))
    for brought in ({}, {"cache": HeadQCache(model)}):
        if training and not brought:
            with pytest.warns(UserWarning, match="train mode and gradients are wanted"):
                found = gradients(model, ids, **brought)
        else:
            found = gradients(model, ids, **brought)
        assert found.keys() == exact.keys()
        for name, gradient in exact.items():
            assert (gradient is None) == (found[name] is None), name
            assert gradient is None or torch.equal(found[name], gradient), name
        assert not brought or brought["cache"].bits_report().packed_rows > 0


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj", "layers.0.mlp", "embed_tokens", "inputs_embeds"])
def test_a_call_that_reads_packed_tokens_refuses(tiny, token_ids, trained):
    model, ids = tiny().requires_grad_(False), token_ids(2, 150)
    quantize_(model, headq_config(**OPTIONS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    cache = HeadQCache(model)
    model(ids[:, :140], cache=cache)
    before = [t.clone() for t in cache.tensors()]
    call = {"input_ids": ids[:, 140:141]}
    if trained == "inputs_embeds":
        call = {"inputs_embeds": model.get_input_embeddings()(ids[:, 140:141]).requires_grad_()}
    with pytest.raises(ValueError, match=WANTED):
        model(**call, cache=cache)
    assert cache.get_seq_length() == 140
    assert all(map(torch.equal, before, cache.tensors()))
    with torch.no_grad():
        assert model(ids[:, 140:], cache=cache).logits.isfinite().all()


def test_an_output_head_may_be_trained_on_packed_tokens(tiny, token_ids):
    """What lies behind the decoder asks no gradients of the cache."""
    model, ids = tiny(), token_ids(1, 141)
    quantize_(model, headq_config(**OPTIONS))
    model.model.requires_grad_(False)
    cache = HeadQCache(model)
    model(ids[:, :140], cache=cache)
    model(ids[:, 140:], cache=cache).logits.square().sum().backward()
    assert model.lm_head.weight.grad.norm() > 0


def test_the_hook_bypassed_refuses_too_and_takes_the_update_back(tiny, token_ids):
    model, ids = tiny(), token_ids(1, 150)
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :140], cache=cache)
    with pytest.raises(ValueError, match=WANTED):
        model.model(ids[:, 140:], cache=cache)
    assert [layer.seen for layer in cache.layers] == [140, 140]
    with torch.no_grad():
        model(ids[:, 140:], cache=cache)
    assert cache.get_seq_length() == 150


def test_no_gradients_wanted_in_train_mode_packs(tiny, token_ids):
    """Rollouts of a model in training, under no_grad, use the packed cache."""
    model, ids = tiny().train(), token_ids(1, 150)
    quantize_(model, headq_config(**OPTIONS))
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, HeadQCache)
    assert out.past_key_values.packed_fraction > 0


def test_dropout_cannot_be_applied_to_packed_tokens(tiny, token_ids):
    model, ids = tiny(attention_dropout=0.5).train(), token_ids(1, 150)
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :140], cache=cache)
        with pytest.raises(ValueError, match="dropout"):
            model(ids[:, 140:], cache=cache)
        assert cache.get_seq_length() == 140
        model.eval()(ids[:, 140:], cache=cache)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_calls_run_and_refuse_a_backward_pass(tiny, token_ids, backend):
    model, ids = tiny(layers=1), token_ids(1, 150)
    calibration = calibrate(model, [token_ids(4, 200, seed=9)], progress=False)
    quantize_(model, headq_config(**OPTIONS, calibration=calibration))
    compiled, cache = torch.compile(model, backend=backend), HeadQCache(model)
    found = compiled(ids[:, :140], cache=cache).logits
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids[:, :140]).logits)
    with pytest.raises(ValueError, match=WANTED):
        found.sum().backward()
    with pytest.raises(ValueError, match=WANTED):  # this call would read packed tokens
        compiled(ids[:, 140:], cache=cache)
    assert cache.get_seq_length() == 140


@pytest.mark.parametrize("trained", ["model.norm", "layers.1.mlp"])
def test_what_acts_behind_the_last_attention_may_be_trained(tiny, token_ids, trained):
    model, ids = tiny().requires_grad_(False), token_ids(1, 150)
    quantize_(model, headq_config(**OPTIONS))
    own = [p.requires_grad_() for name, p in model.named_parameters() if trained in name]
    cache = HeadQCache(model)
    for part in ids.split([140, 10], 1):
        model(part, cache=cache).logits.square().sum().backward()
    assert own and all(p.grad.norm() > 0 for p in own)


def test_a_norm_before_the_last_attention_refuses_and_nothing_is_kept(tiny, token_ids):
    model, ids = tiny().requires_grad_(False), token_ids(1, 150)
    quantize_(model, headq_config(**OPTIONS))
    model.model.layers[1].input_layernorm.weight.requires_grad_()
    cache = HeadQCache(model)
    model(ids[:, :140], cache=cache)
    with pytest.raises(ValueError, match=WANTED):
        model(ids[:, 140:], cache=cache)
    assert [layer.seen for layer in cache.layers] == [140, 140]


def test_a_training_step_of_the_trainer_changes_keys_and_values(tiny, token_ids, tmp_path):
    model, ids = tiny(), token_ids(1, 40)[0]
    quantize_(model, headq_config())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=0.1, optim="sgd",
    )  # fmt: skip
    row = {"input_ids": ids, "labels": ids}
    with pytest.warns(UserWarning, match="train mode"):
        transformers.Trainer(model=model, args=args, train_dataset=[row]).train()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"} <= set(moved)
