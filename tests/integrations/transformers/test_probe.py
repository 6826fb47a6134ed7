"""The two tokens that quantize_ sends through a copy of the model: what they find, and that they leave no trace."""

import types

import pytest
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.integrations.transformers import probe

FINE = {"rank": 0, "epoch_tokens": 32, "residual_length": 32, "block_size": 16}


def diff_llama(**options):
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return transformers.DiffLlamaForCausalLM(config)


def passing_on(self, *args, **kwargs):
    return modeling_llama.LlamaAttention.forward(self, *args, **kwargs, **self.passed)


def with_attention(model, **passed):
    """The model with attention modules that pass further arguments to the attention function."""
    for layer in model.model.layers:
        layer.self_attn.passed = passed
        layer.self_attn.forward = types.MethodType(passing_on, layer.self_attn)
    return model


@pytest.mark.parametrize(
    ("passed", "why"),
    [
        ({"steepness": 30.0}, "steepness=30.0"),
        ({"position_bias": torch.zeros(1, 4, 1, 1)}, "position_bias=a tensor"),
        ({"alibi_slope": 2}, "alibi_slope=2"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_arguments_that_change_scores_are_left_to_the_model(tiny, passed, why):
    model = with_attention(tiny(), **passed)
    with pytest.warns(UserWarning, match=why):
        quantize_(model, headq_config())
    assert model._headq.fallback is not None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "passed", [{"logits_to_keep": 0}, {"logits_to_keep": torch.arange(3)}, {"num_items_in_batch": 4}, {"note": "text"}]
)
def test_arguments_that_change_nothing_are_served(tiny, token_ids, passed):
    model, plain = with_attention(tiny(), **passed), tiny()
    ids = token_ids(1, 120)
    logits = []
    for m in (model, plain):
        quantize_(m, headq_config(**FINE))
        cache = HeadQCache(m)
        with torch.no_grad():
            logits.append([m(part, cache=cache).logits for part in ids.split([90, 1, 29], 1)])
    for a, b in zip(*logits, strict=True):
        assert torch.equal(a, b)


class OptionModel(transformers.LlamaForCausalLM):
    """Its forward takes an option that it hands on with the rest."""

    def forward(self, input_ids=None, depth_hint: int = 3, **kwargs):
        return super().forward(input_ids, depth_hint=depth_hint, **kwargs)


def test_an_option_of_the_call_that_is_handed_on(tiny, token_ids):
    model = tiny(model_class=None)
    model.__class__ = OptionModel
    quantize_(model, headq_config(**FINE))
    model(token_ids(1, 20))
    with pytest.raises(ValueError, match="steepness=3"):
        model(token_ids(1, 20), steepness=3)
    restore_(model)
    quantize_(model, headq_config(k_bits=8, v_bits=8, epoch_tokens=32))
    with torch.no_grad():  # each new token sees all of its call, in the first call and in later ones
        cache, exact = HeadQCache(model), DynamicCache()
        found = [model(part, is_causal=False, cache=cache).logits for part in token_ids(1, 200).split(180, 1)]
        restore_(model)
        expected = [model(part, is_causal=False, cache=exact).logits for part in token_ids(1, 200).split(180, 1)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def patched(name, change):
    """A class of attention whose query, key or value states are changed between cache and attention function."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        out = change(self, q, k, v, attention_mask)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), None

    return type(name, (modeling_llama.LlamaAttention,), {"forward": forward})


def interface(self, q, k, v, mask, **kwargs):
    function = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, modeling_llama.eager_attention_forward
    )
    return function(self, q, k, v, mask, scaling=self.scaling, **kwargs)[0]


def by_hand(self, q, k, v, mask):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


ODD = {
    "never reads": (by_hand, "AttentionInterface"),
    "keys repeated": (lambda self, q, k, v, m: interface(self, q, k.repeat(1, 2, 1, 1), v, m), "AttentionInterface"),
    "values as keys": (lambda self, q, k, v, m: interface(self, q, v, k, m), "other keys and values"),
    "reads twice": (lambda self, q, k, v, m: interface(self, q, k, v, m) + interface(self, q, k, v, m), "2 times"),
    "mask with a bias": (
        lambda self, q, k, v, m: interface(self, q, k, v, torch.zeros(1, 4, q.shape[2], k.shape[2]).tril() + 0.5),
        "not causal|adds to the scores",
    ),
    "own keys": (lambda self, q, k, v, m: interface(self, q, q[:, :2], q[:, :2], m), "other keys and values"),
    "sees all": (
        lambda self, q, k, v, m: interface(self, q, k, v, torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)),
        "not causal",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("by_shapes", [False, True])
def test_odd_attention_reads_no_packed_tokens(tiny, monkeypatch, name, by_shapes):
    change, why = ODD[name]
    if by_shapes:
        monkeypatch.setattr(probe, "cheap", lambda model: False)
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.__class__ = patched("OddAttention", change)
    if by_shapes and name == "sees all":  # shapes do not tell
        return
    with pytest.warns(UserWarning, match=why):
        quantize_(model, headq_config())
    assert model._headq.fallback is not None


def test_attention_of_another_form_is_left_to_the_model(tiny, monkeypatch):
    """A model that runs eager, whose own function adds a sink that no argument tells of."""

    def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        scores = query @ k.transpose(-1, -2) * scaling + attention_mask
        weights = torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]
        return (weights @ v).transpose(1, 2), weights

    model = tiny()
    quantize_(model, headq_config())
    restore_(model)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="more than a softmax"):
        quantize_(model, headq_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eager_models_are_served(tiny, dtype):
    for family in ("llama", "gpt2", "gemma3", "gpt_neox"):
        model = tiny(family).to(dtype)
        model.set_attn_implementation("eager")
        quantize_(model, headq_config())
        restore_(model)
        assert model.config._attn_implementation == "eager"


class Counting(nn.Module):
    """Counts its calls in an attribute, a buffer and a list, draws random numbers, and compiles nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.history = inner, 0, []
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.history.append(x.shape)
        self.seen += 1
        torch.rand(1)
        return self.inner(x)


@pytest.mark.parametrize("by_shapes", [False, True])
@pytest.mark.parametrize("fallback", [False, True])
def test_the_probe_leaves_no_trace(tiny, monkeypatch, by_shapes, fallback):
    if by_shapes:
        monkeypatch.setattr(probe, "cheap", lambda model: False)
    model = with_attention(tiny(), **({"steepness": 1.0} if fallback else {})).train()
    counting = model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    called = []
    hooks = [
        model.register_forward_pre_hook(lambda *a: called.append(a)),
        counting.register_forward_hook(called.append),
    ]
    state = torch.get_rng_state()
    versions = [p._version for p in model.parameters()]
    if fallback:
        with pytest.warns(UserWarning, match="steepness"):
            quantize_(model, headq_config())
    else:
        quantize_(model, headq_config())
    assert torch.equal(torch.get_rng_state(), state)
    assert (counting.calls, counting.history, counting.seen.item(), called) == (0, [], 0.0, [])
    assert all(module.training for module in model.modules() if not module.__class__.__module__.startswith("headq_ao"))
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None for p in model.parameters())
    assert not hasattr(model, "_output_capturing_hooks_installed")
    for hook in hooks:
        hook.remove()


def test_a_compiled_model_is_probed_without_compiling(tiny):
    model = tiny()
    model.compile()
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quantize_(model, headq_config())
    assert not torch._dynamo.utils.counters["frames"]


def test_models_without_data_are_probed_by_shapes():
    with torch.device("meta"):
        model = diff_llama()
    with pytest.warns(UserWarning, match="AttentionInterface"):
        quantize_(model, headq_config())


def test_offloaded_models_are_probed_by_shapes(tiny, token_ids):
    model = cpu_offload(diff_llama().eval(), execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="AttentionInterface"):
        quantize_(model, headq_config())
    assert all(p.device.type == "meta" for p in model.parameters())
    ids = token_ids(1, 60)
    model = cpu_offload(tiny(), execution_device=torch.device("cpu"))
    quantize_(model, headq_config(**FINE))
    assert all(p.device.type == "meta" for p in model.parameters())
    other = dispatch_model(tiny(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    quantize_(other, headq_config(**FINE))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_what_cannot_be_called_is_not_refused(tiny):
    """A forward that needs more than tokens, and a model that cannot be copied."""
    model = tiny()
    model.__class__ = type("Needy", (transformers.LlamaForCausalLM,), {"forward": needy})
    quantize_(model, headq_config())
    model = tiny()
    model.handle = open(__file__)  # noqa: SIM115
    quantize_(model, headq_config())
    model.handle.close()


def needy(self, input_ids=None, *, pixels, **kwargs):
    return transformers.LlamaForCausalLM.forward(self, input_ids, **kwargs)


def laguna():
    torch.manual_seed(0)
    config = transformers.LagunaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_attention_heads_per_layer=[4, 8], num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=32, sliding_window=64,
        layer_types=["full_attention", "sliding_attention"], initializer_range=0.1,
    )  # fmt: skip
    return transformers.LagunaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore")
def test_query_heads_that_differ_by_layer(token_ids, tmp_path):
    ids = token_ids(1, 120)
    models = [laguna(), laguna()]
    del models[1].config.num_attention_heads_per_layer  # then the probe finds them
    models[1].config.num_attention_heads_per_layer = None
    for model in models:
        quantize_(model, headq_config(**FINE))
        assert [s.n_heads for s in model._headq.shapes] == [4, 8]
    model, cache = models[0], HeadQCache(models[0])
    with torch.no_grad():
        model(ids[:, :20], cache=cache)  # fewer than own statistics need: queries are kept
        assert [layer.window.q.shape[1] for layer in cache.layers] == [4, 8]
        cache.save(tmp_path / "prompt.safetensors")
        loaded = HeadQCache.load(tmp_path / "prompt.safetensors", model)
        for part in ids[:, 20:].split([1, 60, 39], 1):
            assert torch.equal(model(part, cache=cache).logits, model(part, cache=loaded).logits)


@pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")
def test_calibrate_probes_first(token_ids):
    model = diff_llama()
    assert calibrate(model, [token_ids(1, 60) % 64], progress=False).layers[0].tokens == 56
    assert model.training
    assert model.config._attn_implementation == "sdpa"
