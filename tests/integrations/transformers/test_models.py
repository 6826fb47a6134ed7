"""What of a model the cache goes by: shapes of layers, heads of a process, places and fingerprints."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from headq_ao.codecs.rotation import POSITIONS
from headq_ao.integrations.transformers.models import (
    attention_modules,
    attention_problem,
    crosses,
    execution_device,
    fingerprint,
    forward_names,
    input_embedding,
    kv_heads_here,
    meta_model,
    plain_tensors,
    positions,
    rotary_embedding,
    self_attentions,
    tensor_parallel,
)
from headq_ao.layer_shape import LayerShape


def llama(**options):
    return transformers.LlamaConfig(**{"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512} | options)


@pytest.mark.parametrize(("size", "parts"), [(1, [(0, 6)]), (2, [(0, 3), (3, 6)]), (3, [(0, 2), (2, 4), (4, 6)])])
def test_heads_of_each_process(size, parts):
    """An equal share of each; all of them where no plan shards keys."""
    shapes = [LayerShape(12, 6, 32, None)]
    model = SimpleNamespace(tp_plan={"layers.*.self_attn.k_proj": "colwise"}, config=llama())
    assert [kv_heads_here(model, shapes, rank, size) for rank in range(size)] == [slice(*p) for p in parts]
    for plan in (None, {}, {"layers.*.self_attn.k_proj": "rowwise"}, {"layers.*.mlp.up_proj": "colwise"}):
        whole = SimpleNamespace(tp_plan=plan, config=llama())
        assert kv_heads_here(whole, shapes, size - 1, size) == slice(0, 6)


@pytest.mark.parametrize(("heads", "told"), [(6, "use 2 or 3 or 6"), (1, "run it on one, or data-parallel")])
def test_heads_that_cannot_be_divided(heads, told):
    model = SimpleNamespace(tp_plan={"a.qkv_proj": "colwise"}, config=llama())
    with pytest.raises(ValueError, match=f"llama has {heads} KV heads .* among 4 tensor-parallel processes; {told}"):
        kv_heads_here(model, [LayerShape(12, heads, 32, None)], 0, 4)


def test_a_model_that_is_not_sharded_is_rank_0_of_1(tiny):
    assert tensor_parallel(tiny()) == (0, 1)
    mesh = SimpleNamespace(get_local_rank=lambda: 1, size=lambda: 2)
    sharded = SimpleNamespace(_mesh_manager=SimpleNamespace(get_mesh=lambda name: mesh), _tp_size=2)
    assert tensor_parallel(sharded) == (1, 2)
    assert tensor_parallel(SimpleNamespace(_mesh_manager=sharded._mesh_manager, _tp_size=None)) == (0, 1)


def test_positions_of_a_model(tiny):
    assert positions(tiny()) == 4096
    for config in (None, SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=0))):
        assert positions(SimpleNamespace(config=config)) == POSITIONS


@pytest.mark.parametrize(
    ("name", "kind", "attribute", "found"),
    [
        ("layers.0.self_attn", "LlamaAttention", False, False),
        ("layers.0.encoder_attn", "BartAttention", False, True),
        ("layers.0.EncDecAttention", "T5Attention", False, True),
        ("layers.0.cross_attn", "Attention", False, True),
        ("layers.0.crossattention_gate", "Attention", False, False),
        ("layers.0.attn", "MllamaTextCrossAttention", False, True),
        ("layers.0.attn", "GPT2Attention", True, True),
    ],
)
def test_attention_to_another_part_of_the_model(name, kind, attribute, found):
    module = type(kind, (nn.Module,), {"is_cross_attention": attribute})()
    assert crosses(name, module) is found


def test_attention_modules_by_layer(tiny):
    model = tiny(layers=3)
    assert attention_modules(model, 3) == [layer.self_attn for layer in model.model.layers]
    assert attention_modules(model, [2, 0]) == [model.model.layers[i].self_attn for i in (2, 0)]
    assert list(self_attentions(model)) == [f"model.layers.{i}.self_attn" for i in range(3)]
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3\] of its cache .* are of layers \[0, 1, 2\]"):
        attention_modules(model, 4)
    with pytest.raises(ValueError, match="needs a transformers PreTrainedModel, got Linear; pass the whole causal LM"):
        attention_modules(nn.Linear(2, 2), 1)
    assert attention_problem(model) is None
    model.model.layers[1].self_attn.is_causal = False
    assert attention_problem(model) == "its attention is not causal (model.layers.1.self_attn)"


def test_names_that_a_model_or_one_inside_it_takes(tiny):
    names = forward_names(tiny())
    assert {"input_ids", "attention_mask", "logits_to_keep", "labels"} <= names and "softcap" not in names
    assert forward_names(nn.Linear(2, 2)) == frozenset()
    assert rotary_embedding(tiny("gpt2")) is None and rotary_embedding(tiny()) is not None


def test_a_model_without_one_table_of_embeddings(tiny):
    model = tiny()
    assert input_embedding(model) is model.model.embed_tokens
    model.model.embed_tokens = nn.Identity()
    with pytest.raises(ValueError, match="its input embedding is a Identity, not one table"):
        input_embedding(model)


def test_fingerprints(tiny):
    """The same in other dtypes and of another process; other with other weights, heads or rope; no data, no weights."""
    model = tiny()
    print_ = fingerprint(model)
    assert print_ == fingerprint(tiny()) and len(print_["weights"]) == 16
    assert (print_["model_type"], print_["layers"], print_["heads"], print_["kv_heads"]) == ("llama", 2, 4, 2)
    half = fingerprint(copy.deepcopy(model).bfloat16())
    assert half["weights"] == pytest.approx(print_["weights"], rel=5e-3) and half != print_
    assert fingerprint(tiny(seed=1))["weights"] != pytest.approx(print_["weights"], rel=5e-3)
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert fingerprint(tiny(rope_parameters=rope))["rope"] != print_["rope"]
    without = fingerprint(meta_model(model.config))
    assert "weights" not in without and without == {k: v for k, v in print_.items() if k != "weights"}


def test_plain_tensors_of_a_subclass():
    plain = torch.ones(2)
    assert list(plain_tensors(plain)) == [plain]

    class Pair(torch.Tensor):
        def __tensor_flatten__(self):
            return ["a", "b", "mesh"], None

    pair = torch.zeros(1).as_subclass(Pair)
    inner = torch.zeros(1).as_subclass(Pair)
    inner.a, inner.b, inner.mesh = torch.ones(1), torch.ones(2), "no tensor"
    pair.a, pair.b, pair.mesh = torch.ones(3), inner, None
    assert [x.numel() for x in plain_tensors(pair)] == [3, 1, 2]


def test_a_module_computes_where_its_hook_brings_it():
    """Weights that accelerate keeps elsewhere are on the meta device; a part's hook, or one of several, says where."""
    module = nn.Sequential(nn.Linear(2, 2, device="meta"))
    assert execution_device(nn.Linear(2, 2)).type == "cpu" and execution_device(module).type == "meta"
    module[0]._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(), SimpleNamespace(execution_device="cuda:1")])
    assert execution_device(module) == torch.device("cuda:1")
    module[0]._hf_hook = SimpleNamespace(execution_device="cpu")
    assert execution_device(module) == torch.device("cpu")


def test_a_decoder_within_a_model_of_another_type_is_found():
    class Tower(transformers.PreTrainedModel):
        config_class = transformers.SiglipConfig

        def __init__(self, config, decoder):
            super().__init__(config)
            self.language_model = decoder

    model = transformers.LlamaForCausalLM(llama())
    model.tower = Tower(transformers.SiglipConfig(), copy.deepcopy(model.model))
    model.other = Tower(transformers.SiglipConfig(), nn.ModuleList(copy.deepcopy(model.model.layers)))
    beside = [f"tower.language_model.layers.{i}.self_attn" for i in range(2)]
    assert list(self_attentions(model)) == [f"model.layers.{i}.self_attn" for i in range(2)] + beside
