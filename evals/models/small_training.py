"""How the small models of :mod:`headq_ao.evals.models.small_models` are built and trained: tokenizer, network, loop."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

Architecture = Literal["gpt-neox", "gpt2", "olmoe", "deepseek-v2", "gemma4"]
HEAD_DIM = 64
END = "<|endoftext|>"


@dataclass(frozen=True)
class Experts:
    """Of a mixture of experts, each half as wide as the hidden size.

    Args:
        number: in each layer.
        active: that read a token.
        balance: weight of the loss by which a router uses all of them alike.
        lr: peak learning rate of AdamW for them, whose weights are one tensor.
    """

    number: int = 32
    active: int = 2
    balance: float = 0.01
    lr: float = 2e-3


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, apart from the text.

    Args:
        architecture: ``"gpt-neox"``: rotary positions on a quarter of each head, attention and MLP in parallel;
            ``"gpt2"``: learned positions, attention before the MLP; ``"olmoe"``: rotary positions, and experts;
            ``"deepseek-v2"``: latent attention (MLA) of rank 64 and rotary keys of 32, no experts; ``"gemma4"``:
            sliding and full attention in turn, and all layers but the first two read keys and values of one of these.
        vocab: entries of the byte-level BPE, at most.
        heads: heads of 64; the hidden size is 64 times as large.
        layers: blocks.
        context: tokens per training row, and the longest row that the model can read.
        batch: rows per step.
        steps: optimizer steps.
        lr_matrices: peak learning rate of Muon, for the matrices of the blocks.
        lr: that of AdamW, for embeddings, biases and norms.
        warmup: share of the steps in which both rates rise; half a cosine takes them down to 5 % afterwards.
        weight_decay: on matrices and embeddings.
        dropout: after embeddings, attention and MLP; attention weights have none.
        init_std: standard deviation of the initial weights.
        clip: largest norm of the gradient.
        seed: of the initial weights, the rows and the dropout.
        experts: of ``"olmoe"``, and of no other; None: :class:`Experts` as it is.
    """

    architecture: Architecture
    vocab: int = 4096
    heads: int = 4
    layers: int = 4
    context: int = 1024
    batch: int = 1
    steps: int = 700
    lr_matrices: float = 0.02
    lr: float = 5e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    dropout: float = 0.0
    init_std: float = 0.05
    clip: float = 1.0
    seed: int = 0
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.architecture != "olmoe" and self.experts is not None:
            raise ValueError(f"experts are of 'olmoe' alone, got them for {self.architecture!r}")
        if self.architecture == "olmoe" and self.experts is None:
            object.__setattr__(self, "experts", Experts())


def train_tokenizer(text: str, vocab: int) -> Any:
    """A byte-level BPE of ``text``, as transformers' fast tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END)


def build(recipe: Recipe, vocab: int) -> Any:
    """The model with seeded random weights, input and output embedding tied."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, "initializer_range": recipe.init_std}
    hidden, drop = HEAD_DIM * recipe.heads, recipe.dropout
    if recipe.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab, n_embd=hidden, n_layer=recipe.layers, n_head=recipe.heads,
                n_positions=recipe.context, embd_pdrop=drop, resid_pdrop=drop, attn_pdrop=0.0, **ends,
            )
        )  # fmt: skip
    if recipe.architecture == "deepseek-v2":
        return DeepseekV2ForCausalLM(
            DeepseekV2Config(
                vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads, max_position_embeddings=recipe.context, q_lora_rank=None,
                kv_lora_rank=HEAD_DIM, qk_nope_head_dim=HEAD_DIM // 2, qk_rope_head_dim=HEAD_DIM // 2,
                v_head_dim=HEAD_DIM, first_k_dense_replace=recipe.layers, **ends,
            )
        )  # fmt: skip
    if recipe.architecture == "gemma4":
        kinds = ["sliding_attention", "full_attention"] * (recipe.layers // 2)
        return Gemma4ForCausalLM(
            Gemma4TextConfig(
                vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads, num_key_value_heads=1, head_dim=HEAD_DIM, global_head_dim=HEAD_DIM,
                layer_types=kinds, sliding_window=recipe.context // 4, num_kv_shared_layers=recipe.layers - 2,
                hidden_size_per_layer_input=HEAD_DIM // 4, vocab_size_per_layer_input=vocab,
                max_position_embeddings=recipe.context,
                **ends | {"pad_token_id": None},
            )
        )  # fmt: skip
    if (experts := recipe.experts) is not None:
        return OlmoeForCausalLM(
            OlmoeConfig(
                vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden // 2, num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
                max_position_embeddings=recipe.context, num_experts=experts.number,
                num_experts_per_tok=experts.active, router_aux_loss_coef=experts.balance,
                **ends | {"pad_token_id": None},
            )
        )  # fmt: skip
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads, max_position_embeddings=recipe.context, hidden_dropout=drop,
            attention_dropout=0.0, **ends,
        )
    )  # fmt: skip


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively; where it does, training uses autocast."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Gradients on and torch's random state set, both put back afterwards."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def rate(step: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: linear warmup, then ``0.05 + 0.95·(1 + cos πt)/2``."""
    rising = (step + 1) / max(1, int(recipe.warmup * recipe.steps))
    return min(1.0, rising) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / recipe.steps)))


def optimizers_for(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and experts (decayed), biases and norms (not)."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    vectors, experts = ([p for p in model.parameters() if p.ndim in of] for of in ((0, 1), (3,)))
    taken = {id(p) for p in (*embeddings, *vectors, *experts)}
    matrices = [p for p in model.parameters() if id(p) not in taken]  # an output embedding is the tied input's
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.experts is not None:
        groups.append({"params": experts, "weight_decay": recipe.weight_decay, "lr": recipe.experts.lr})
    return [
        torch.optim.Muon(matrices, lr=recipe.lr_matrices, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True),
    ]


def next_token_loss(model: Any, rows: Tensor) -> Tensor:
    """Mean cross-entropy of each next token of ``rows [B, T]``, in nats."""
    logits = model(rows, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def training_loss(model: Any, rows: Tensor) -> Tensor:
    """:func:`next_token_loss`, and of a mixture of experts the loss by which its routers use them alike."""
    if (weight := getattr(model.config, "router_aux_loss_coef", None)) is None:
        return next_token_loss(model, rows)
    out = model(rows, use_cache=False, output_router_logits=True)
    loss = F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())
    balanced: Tensor = loss + weight * out.aux_loss
    return balanced


def fit(model: Any, ids: Tensor, recipe: Recipe, progress: bool = True) -> list[float]:
    """Train in place on rows cut from ``ids [N]`` at random offsets; the loss of each step, in nats.

    Raises:
        ValueError: when ``ids`` is not longer than one row.
    """
    if len(ids) <= recipe.context:
        raise ValueError(f"the text has {len(ids)} tokens, but a training row has {recipe.context}; give a longer text")
    optimizers = optimizers_for(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate(step, recipe)) for o in optimizers]
    offsets = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    model.train()
    with tqdm(total=recipe.steps, desc=f"train {recipe.architecture}", unit="step", disable=not progress) as bar:
        for _ in range(recipe.steps):
            starts = torch.randint(0, len(ids) - recipe.context, (recipe.batch,), generator=offsets)
            rows = torch.stack([ids[s : s + recipe.context] for s in starts.tolist()])
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                loss = training_loss(model, rows)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    return losses
