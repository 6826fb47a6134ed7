"""What the engine tests serve: tiny seeded checkpoints with a tokenizer of bytes, their calibrations, an adapter."""

import json

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headq_ao import calibrate

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2
VOCAB = 264
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=4096,
    initializer_range=0.12,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
    tie_word_embeddings=False,
)


def tokenizer():
    """One token a byte, three special ones before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=TEMPLATE
    )


def llama(seed=0, **options):
    """A model whose logits depend on what attention reads: weights larger than transformers' default."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | options)).eval()


def save(folder, model):
    """Weights, config, tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_config(folder, config, architecture):
    """A checkpoint without weights, for engines that are to refuse it."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_calibration(path, model, tokens=2048, seed=0):
    """On random bytes; enough that every page is coded with settled statistics."""
    ids = torch.randint(3, 259, (tokens // 256, 256), generator=torch.Generator().manual_seed(seed))
    calibrate(model, list(ids), progress=False).save(path)
    return str(path)


def save_adapter(folder, modules=("q_proj", "k_proj"), rank=8, seed=0, scale=0.5):
    """A LoRA adapter that changes ``modules`` of every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    rows = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    tensors = {}
    for layer in range(LAYERS):
        for name in modules:
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = scale * torch.randn(rank, COMMON["hidden_size"], generator=generator)
            tensors[f"{at}.lora_B.weight"] = scale * torch.randn(rows[name], rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(modules), "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)
