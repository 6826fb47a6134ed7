"""A stored prompt is refused by every model that would have computed other keys, and by no other."""

import copy
import json

import accelerate
import pytest
import safetensors
import torch
import torchao
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.cache.token_ids import EMBEDDED, PAD, UNKNOWN
from headq_ao.calibration.observers import RECORDER
from headq_ao.integrations.transformers.identity import WORDS, block_sums, checksum, stamp, word_weights
from tests.conftest import build_tiny

FAST = {"epoch_tokens": 64, "residual_length": 32, "block_size": 16}
IDS = (torch.arange(200) * 7 % 101 + 3)[None]
ONCE = int(IDS[0, 90])  # each id once or twice
IDS[0, 91:] = torch.where(IDS[0, 91:] == ONCE, 5, IDS[0, 91:])


def prepared(family="llama", **options):
    model = build_tiny(family, **options)
    quantize_(model, headq_config(**FAST))
    return model


@torch.no_grad()
def filled(model, ids=IDS, **arguments):
    cache = HeadQCache(model)
    model(ids, cache=cache, **arguments)
    return cache


def head_of(path):
    with safetensors.safe_open(path, "pt") as f:
        return json.loads(f.metadata()["headq_prompt_cache"])


@pytest.fixture
def model():
    return prepared()


@pytest.fixture
def stored(model, tmp_path):
    """A file of the prompt, saved with ``model``."""
    filled(model).save(tmp_path / "prompt")
    return tmp_path / "prompt"


def accepts(path, model):
    assert HeadQCache.load(path, model).get_seq_length() == IDS.shape[1]


def refuses(path, model, message="it was made with other"):
    with pytest.raises(ValueError, match=message):
        HeadQCache.load(path, model)


# Parameters, buffers, numbers


def row_of(name, row):
    def edit(model):
        with torch.no_grad():
            model.get_parameter(name)[row] += 0.1

    return edit


def one_element(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.view(-1)[1237] += 1e-6


def behind_the_version(model):
    model.model.layers[0].self_attn.v_proj.weight.data[3, 5] += 1e-3


def swapped_rows(model):
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[[3, 40]] = weight[[40, 3]].clone()


def signs(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.view(-1)[1::2].neg_()


def more_parameters(model):
    model.model.layers[0].self_attn.k_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2)))


def persistent_buffer(model):
    model.model.layers[0].register_buffer("steering", torch.zeros(3))


def inv_freq(model):
    model.model.rotary_emb.inv_freq[-1] *= 1.001


def scaling(model):
    model.model.layers[0].self_attn.scaling *= 1.01


def epsilon(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-5


def activation(model):
    model.config.hidden_act = "gelu"


def hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, out: out + 0.05)


CHANGES = {
    "a row that the prompt uses once": (row_of("model.embed_tokens.weight", ONCE), r"weights .*embed_tokens.weight$"),
    "one element": (one_element, "weights .*: model.layers.1.self_attn.k_proj.weight$"),
    "through .data": (behind_the_version, "weights .*: model.layers.0.self_attn.v_proj.weight$"),
    "swapped rows": (swapped_rows, "weights .*: model.layers.0.mlp.up_proj.weight$"),
    "signs": (signs, "weights .*k_proj.weight$"),
    "more parameters": (more_parameters, r"k_proj.lora_A \(only here\)"),
    "a persistent buffer": (persistent_buffer, r"layers.0.steering \(only here\)"),
    "a rotary frequency": (inv_freq, "numbers beside the weights: model.rotary_emb.inv_freq"),
    "the scaling of scores": (scaling, "numbers beside the weights: model.layers.0.self_attn.scaling"),
    "the epsilon of a norm": (epsilon, "numbers beside the weights: model.layers.1.input_layernorm"),
    "the activation": (activation, "another model config: hidden_act is 'gelu' here and 'silu' there"),
    "a hook": (hook, "first tokens come out otherwise here.*a hook, a switch or the code of the model differs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_keys_is_refused(model, stored, name):
    accepts(stored, model)
    change, message = CHANGES[name]
    change(model)
    refuses(stored, model, message)


def test_what_does_not_change_keys_is_accepted(model, stored):
    row_of("model.embed_tokens.weight", 127)(model)  # a row that the prompt does not use
    row_of("lm_head.weight", slice(None))(model)
    model.config.pad_token_id, model.config.use_cache, model.generation_config.temperature = 7, False, 0.5
    model.requires_grad_(False)
    accepts(stored, model)
    model.resize_token_embeddings(140)
    accepts(stored, model)
    accepts(stored, copy.deepcopy(model))


def test_a_tied_embedding_is_told_by_its_rows(tmp_path):
    model = prepared(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    filled(model).save(tmp_path / "p")
    row_of("model.embed_tokens.weight", 127)(model)
    accepts(tmp_path / "p", model)
    row_of("model.embed_tokens.weight", ONCE)(model)
    refuses(tmp_path / "p", model, "embed_tokens.weight$")


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_other_families(tmp_path, family):
    """Scaled embeddings and two rotary embeddings; learned positions and mask buffers."""
    model = prepared(family)
    filled(model).save(tmp_path / "p")
    accepts(tmp_path / "p", model)
    embedding = model.get_input_embeddings()
    if family == "gemma3":
        embedding.embed_scale *= 1.001
    else:
        model.transformer.wpe.weight.data[150] += 0.1
    refuses(tmp_path / "p", model, "embed_scale" if family == "gemma3" else "wpe.weight")


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_quantized_weights(tmp_path, config):
    one, same, other = (build_tiny() for _ in range(3))
    for made in (one, same):
        torchao.quantization.quantize_(made, config())
    for made in (one, same, other):
        quantize_(made, headq_config(**FAST))
    filled(one).save(tmp_path / "p")
    accepts(tmp_path / "p", same)
    refuses(tmp_path / "p", other, "other weights")


def test_what_an_offloaded_model_keeps_elsewhere_is_read(model, stored, tmp_path):
    placed = accelerate.cpu_offload(build_tiny())
    quantize_(placed, headq_config(**FAST))
    assert placed.model.embed_tokens.weight.device.type == "meta"
    accepts(stored, placed)
    filled(placed).save(tmp_path / "offloaded")
    assert head_of(tmp_path / "offloaded")["identity"]["offloaded"] == []
    accepts(tmp_path / "offloaded", model)
    row_of("model.embed_tokens.weight", ONCE)(model)
    refuses(tmp_path / "offloaded", model, "embed_tokens")
    changed = build_tiny()
    one_element(changed)
    changed = accelerate.cpu_offload(changed)
    quantize_(changed, headq_config(**FAST))
    refuses(stored, changed, "k_proj")


def test_weights_that_change_between_filling_and_saving(model, tmp_path):
    cache = filled(model)
    before = stamp(model)
    one_element(model)
    assert stamp(model) != before
    with pytest.raises(ValueError, match="have changed since this cache was filled; fill a new HeadQCache"):
        cache.save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    cache.reset()
    with torch.no_grad():
        model(IDS, cache=cache)
    cache.save(tmp_path / "p")
    accepts(tmp_path / "p", model)


def test_weights_that_change_while_filling_and_change_back(model, tmp_path):
    """A chunk that was computed with another projection, exchanged and put back: the file would name the first."""
    cache, attention = HeadQCache(model), model.model.layers[0].self_attn
    own = attention.k_proj.weight
    with torch.no_grad():
        model(IDS[:, :100], cache=cache)
        attention.k_proj.weight = torch.nn.Parameter(own * 1.5)
        model(IDS[:, 100:150], cache=cache)
        attention.k_proj.weight = own
        model(IDS[:, 150:], cache=cache)
    with pytest.raises(ValueError, match="have changed since this cache was filled"):
        cache.save(tmp_path / "p")


def test_tokens_of_another_model_object(model, tmp_path):
    """A copy may continue a cache, but a file would name the weights of the first; another model may not."""
    cache, twin, other = filled(model), copy.deepcopy(model), prepared(seed=1)
    with torch.no_grad(), pytest.raises(ValueError, match="another model, of the same shape but with other weights"):
        other(IDS[:, :1], cache=cache)
    assert cache.get_seq_length() == 200
    with torch.no_grad():
        twin(IDS[:, :1], cache=cache)
    with pytest.raises(ValueError, match="another model than the one that this cache was made for has computed tokens"):
        cache.save(tmp_path / "p")
    cache.reset()
    with torch.no_grad():
        model(IDS, cache=cache)
    cache.save(tmp_path / "p")


# Adapters of PEFT

old_names = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def lora(monkeypatch):
    """``lora(model)``: the model with an adapter that acts, wrapped."""
    peft = pytest.importorskip("peft")
    integration = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.1")

    def config(**options):
        return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False} | options)

    def wrap(model, **options):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config(**options)).eval()

    wrap.config = config
    return wrap


@old_names
def test_adapters_attached_switched_scaled_and_merged(model, stored, lora, tmp_path):
    wrapped = lora(model)
    refuses(stored, model, "other adapters: none there, default × 2 here")
    refuses(stored, wrapped, "other adapters")
    with wrapped.disable_adapter():
        accepts(stored, wrapped)  # the weights only got another name
    path = tmp_path / "with"
    filled(wrapped).save(path)
    accepts(path, wrapped)
    accepts(path, model)
    with wrapped.disable_adapter():
        refuses(path, wrapped, "other adapters: default × 2 there, none here")
    wrapped.add_adapter("other", lora.config())
    accepts(path, wrapped)  # loaded, but not at work
    wrapped.set_adapter("other")
    refuses(path, wrapped, "default × 2 there, other × 2 here")
    wrapped.set_adapter("default")
    layer = model.model.layers[1].self_attn.k_proj
    layer.scaling["default"] *= 1.5
    refuses(path, wrapped, "default × 3 here")
    layer.scaling["default"] /= 1.5
    accepts(path, wrapped)
    weight = layer.lora_A["default"].weight
    kept = weight.detach().clone()
    weight.data[1, 2] += 1e-3
    refuses(path, wrapped, r"other weights .*: model.layers.1.self_attn.k_proj.lora_A.default.weight$")
    weight.data.copy_(kept)
    accepts(path, wrapped)
    wrapped.merge_adapter()
    refuses(path, wrapped, "merged")
    refuses(stored, wrapped, "merged")
    with wrapped.disable_adapter():
        refuses(stored, wrapped, "other adapters")  # their weights are to be taken out by the next call
    wrapped.unmerge_adapter()
    merged = wrapped.merge_and_unload()
    refuses(path, merged, "other adapters")
    refuses(stored, merged, "other weights")


@old_names
def test_adapters_of_the_models_own_interface(model, stored, lora, tmp_path):
    model.add_adapter(lora.config())
    refuses(stored, model, "other adapters")
    filled(model.eval()).save(tmp_path / "with")
    accepts(tmp_path / "with", model)
    model.disable_adapters()
    accepts(stored, model)
    refuses(tmp_path / "with", model, "other adapters")
    model.enable_adapters()
    accepts(tmp_path / "with", model)


@old_names
def test_adapters_switched_between_filling_and_saving(model, lora, tmp_path):
    wrapped = lora(model)
    cache = filled(wrapped)
    with wrapped.disable_adapter(), pytest.raises(ValueError, match="weights or adapters have changed"):
        cache.save(tmp_path / "p")
    cache.save(tmp_path / "p")


@old_names
@pytest.mark.parametrize("kind", ["LoRA", "saved", "tokens"])
def test_adapters_of_the_embedding(model, stored, lora, tmp_path, kind):
    options = {
        "LoRA": {"target_modules": ["embed_tokens"]},
        "saved": {"modules_to_save": ["embed_tokens"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [ONCE]}},
    }[kind]
    wrapped = lora(model, **options)
    refuses(stored, wrapped, "other adapters")
    filled(wrapped).save(tmp_path / "with")
    accepts(tmp_path / "with", wrapped)
    with wrapped.disable_adapter():
        refuses(tmp_path / "with", wrapped, "other adapters")
    names = {"LoRA": "lora_embedding_B", "saved": "modules_to_save", "tokens": "trainable_tokens_delta"}
    weight = next(p for n, p in wrapped.named_parameters() if names[kind] in n and "embed" in n)
    if kind == "saved":
        weight.data[127] += 0.1
        accepts(tmp_path / "with", wrapped)
    weight.data[ONCE if kind == "saved" else 0] += 0.1
    refuses(tmp_path / "with", wrapped, f"other weights .*{names[kind]}")


# Token ids


def held(cache):
    return cache.ids.of_slots(cache.get_seq_length()).tolist()


def test_ids_follow_the_cache(model, tmp_path):
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, :30] = 0
    ids = torch.cat([IDS, IDS.flip(1)])
    cache = HeadQCache(model)
    with torch.no_grad():
        for begin, end in ((0, 150), (150, 151), (151, 200)):
            model(ids[:, begin:end], cache=cache, attention_mask=mask[:, :end])
    right = ids.masked_fill(mask == 0, PAD)
    assert held(cache) == right.tolist()
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    assert held(cache) == right[[1, 0, 1]].tolist()
    cache.crop(-20)
    with torch.no_grad():
        model(ids[[0, 0, 0], :5], cache=cache)
    right = torch.cat([right[[1, 0, 1], :180], ids[[0, 0, 0], :5]], 1)
    assert held(cache) == right.tolist()
    cache.save(tmp_path / "p")
    loaded = HeadQCache.load(tmp_path / "p", model)
    loaded.save(tmp_path / "again")
    assert held(HeadQCache.load(tmp_path / "again", model)) == held(copy.deepcopy(loaded)) == right.tolist()
    for one in (cache, loaded):
        report = one.bits_report()
        assert report.bytes["token_ids"] == 3 * 185 * 4
        assert sum(report.bytes.values()) == one.get_memory_footprint()
    cache.reset()
    assert cache.get_memory_footprint() == 0


def test_ids_of_generate_and_compiled_calls(model):
    cache = HeadQCache(model)
    out = model.generate(IDS, max_new_tokens=10, do_sample=False, cache=cache)
    assert held(cache) == out[:, :-1].tolist()

    @torch.compile(backend="eager")
    def step(ids, cache, positions):
        return model(input_ids=ids, cache=cache, position_ids=positions).logits

    with torch.no_grad():
        step(torch.tensor([[9]]), cache, torch.tensor([[cache.get_seq_length()]]))
    # a graph keeps no ids: a file of this cache compares the whole embedding
    assert held(cache)[0][-2:] == [int(out[0, -2]), UNKNOWN]


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_ids_are_written_in_any_mode(model, first):
    second = torch.inference_mode if first is torch.no_grad else torch.no_grad
    cache = HeadQCache(model)
    for k, mode in enumerate((first, second, first)):
        with mode():
            cache.ids.note(IDS[:, :10] + k, 1, 10, cache.ids.count, None)
            cache.ids.select(torch.tensor([0, 0])) if k == 2 else None
    assert cache.ids.of_slots(30)[0].tolist() == [*IDS[0, :10], *(IDS[0, :10] + 1), *(IDS[0, :10] + 2)]


def test_calls_by_embeddings(model, tmp_path):
    """Nothing of the embedding is compared where no ids came; the file says so."""
    cache = HeadQCache(model)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(IDS), cache=cache)
        assert held(cache) == [[EMBEDDED] * 200]
        cache.save(tmp_path / "embeds")
        model(IDS[:, 90:91], cache=cache)
        cache.save(tmp_path / "both")
    assert "200 slots came as embeddings, nothing is checked" in head_of(tmp_path / "embeds")["embedding"]
    row_of("model.embed_tokens.weight", 6)(model)
    assert HeadQCache.load(tmp_path / "both", model).get_seq_length() == 201
    row_of("model.embed_tokens.weight", ONCE)(model)
    accepts(tmp_path / "embeds", model)
    refuses(tmp_path / "both", model, "embed_tokens")
    one_element(model)
    refuses(tmp_path / "embeds", model, "k_proj")


def test_unknown_ids_stand_on_the_whole_embedding(model, tmp_path):
    """As after calls that did not go through the model."""
    cache = filled(model)
    cache.ids.held[:, 20] = UNKNOWN
    cache.save(tmp_path / "p")
    assert head_of(tmp_path / "p")["embedding"].startswith("all rows")
    accepts(tmp_path / "p", model)
    row_of("model.embed_tokens.weight", 127)(model)
    refuses(tmp_path / "p", model, "embed_tokens")


def test_a_smaller_vocabulary(model, stored):
    model.resize_token_embeddings(50)
    refuses(stored, model, "holds the token id 103, but model.embed_tokens.weight has 50 rows")


# Sinks


def test_the_second_look_disturbs_nothing(model, stored):
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    recorder, token = object(), RECORDER.set(None)
    RECORDER.set(recorder)
    hooks = len(model._forward_pre_hooks)
    accepts(stored, model)
    assert RECORDER.get() is recorder
    RECORDER.reset(token)
    assert [m.training for m in model.modules()] == modes and len(model._forward_pre_hooks) == hooks
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == before


class Switched(torch.nn.Module):
    """A change by hand that no parameter tells, at work where ``on``."""

    on = False

    def forward(self, x):
        return x * 1.01 if self.on else x


def test_a_switch_that_is_a_plain_attribute(tmp_path):
    model = build_tiny()
    model.model.layers[1].self_attn.k_proj = torch.nn.Sequential(model.model.layers[1].self_attn.k_proj, Switched())
    quantize_(model, headq_config(**FAST))
    filled(model).save(tmp_path / "p")
    accepts(tmp_path / "p", model)
    model.model.layers[1].self_attn.k_proj[1].on = True
    refuses(tmp_path / "p", model, "first tokens come out otherwise here, 0.005 off and")


def test_autocast_around_saving_and_loading(model, stored, tmp_path):
    """The second look is taken without it, whichever way the prompt was computed."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accepts(stored, model)
        filled_plain = HeadQCache.load(stored, model)
        filled_plain.save(tmp_path / "p")
    accepts(tmp_path / "p", model)


def test_positions_that_the_file_cannot_tell(model, tmp_path):
    """The first tokens do not come out again at other positions: said once, and the rest is compared."""
    cache = filled(model, position_ids=torch.arange(50, 250)[None])
    with pytest.warns(UserWarning, match="first tokens of this cache do not come out again.*other positions"):
        cache.save(tmp_path / "p")
    accepts(tmp_path / "p", model)
    row_of("model.embed_tokens.weight", ONCE)(model)
    refuses(tmp_path / "p", model, "embed_tokens")


# The checksum


def test_the_checksum_is_the_formula():
    words = torch.randn(WORDS + 5, generator=torch.Generator().manual_seed(0)).double().view(torch.int64)
    weights, mask = word_weights(WORDS).tolist(), 2**64 - 1
    for found, block in zip(block_sums(words).tolist(), words.split(WORDS), strict=True):
        right = sum(((x >> 32) ^ x) * w for x, w in zip(block.tolist(), weights, strict=False))
        assert found & mask == right & mask
    assert [w & mask for w in weights[:2]] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F5 | 1]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 8 * WORDS - 1, 8 * WORDS, 8 * WORDS + 1])
def test_every_byte_counts(n):
    x = torch.randint(0, 256, (n + 3,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    whole = checksum(x[3:])
    assert whole == checksum(x[3:].clone())
    for at in {0, n // 2, n - 1} if n else ():
        other = x[3:].clone()
        other[at] ^= 128
        assert checksum(other) != whole
    assert len({whole, checksum(x), checksum(x[3:][None])}) == 3


def test_order_and_signs_count():
    x = torch.randn(3 * WORDS, dtype=torch.float64)
    found = {checksum(x), checksum(x.flip(0)), checksum(x.roll(1)), checksum(x.roll(WORDS)), checksum(-x)}
    y = x.clone()
    y[[4, 9]] *= -1
    assert len(found | {checksum(y), checksum(x.view(3, -1)), checksum(x.view(torch.int64))}) == 8
    assert checksum(x.view(3, -1).t()) == checksum(x.view(3, -1).t().contiguous())
