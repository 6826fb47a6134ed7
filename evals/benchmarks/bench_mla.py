"""Latent attention (MLA): ``python -m headq_ao.evals.benchmarks.bench_mla --json recipes/results/bench/mla.json``.

Speed: one layer of DeepSeek-V2-Lite's shape, a decoding step through HeadQ's cache and through transformers' own, which
expands all latents at each step; in one process, in turn. Quality: a tiny model, trained here, with rows that are coded
under the joint metric of keys and values (:func:`headq_ao.codecs.whitened.readout_metric`), and under that of keys
alone.
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache, PreTrainedModel

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.calibration.artifact import Calibration
from headq_ao.evals.benchmarks.bench_result import CheckFailedError, add_result_options, check_whole
from headq_ao.evals.benchmarks.bench_timing import bursts
from headq_ao.evals.harness.environment import command_line, environment, write_json
from headq_ao.evals.harness.table import markdown_table
from headq_ao.integrations.transformers.models import with_cache

LITE: dict[str, Any] = dict(
    vocab_size=128, hidden_size=2048, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16,
    num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
    v_head_dim=128, max_position_embeddings=32768, first_k_dense_replace=1,
)  # fmt: skip
TINY: dict[str, Any] = dict(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
    max_position_embeddings=1024, first_k_dense_replace=3, tie_word_embeddings=True,
)  # fmt: skip
TEXTS = Path(__file__).parents[1] / "texts"
BITS, LIMIT = 3, 0.35  # of a row; relative error of the layer's logits from where on timing means nothing
STEPS, BATCH, ROW, RATE = 200, 4, 512, 2e-3  # of the training
PREFILL, CHUNK = 256, 64  # tokens, of the scoring


def layer(seed: int = 0) -> PreTrainedModel:
    """One layer of DeepSeek-V2-Lite's shape, of random weights in bfloat16; its MLP is small, and so is its head."""
    torch.manual_seed(seed)
    return DeepseekV2ForCausalLM(DeepseekV2Config(**LITE)).eval().to(torch.bfloat16)


def calibrated(model: PreTrainedModel, rows: Sequence[Tensor]) -> Calibration:
    """Of so few tokens as they are."""
    made = calibrate(model, list(rows), progress=False)
    return dataclasses.replace(made, layers=[dataclasses.replace(x, effective=None) for x in made.layers])


def fill(packed: HeadQCache, plain: DynamicCache, dense: PreTrainedModel, ids: Tensor) -> None:
    """Put the rows of tokens ``[1, T]`` into both caches, without attention over them."""
    body, tokens = dense.model, ids.shape[1]
    attention = body.layers[0].self_attn
    row = attention.kv_a_proj_with_mqa(body.layers[0].input_layernorm(body.embed_tokens(ids)))
    kv_nope, k_rot = row[:, None].split([attention.kv_lora_rank, attention.qk_rope_head_dim], -1)
    kv_nope = attention.kv_a_layernorm(kv_nope)
    plain.update(kv_nope, k_rot, 0)
    packed.batch.begin(1, tokens)
    packed.layers[0].update(kv_nope, k_rot)
    packed.layers[0].commit(None)


@torch.no_grad()
def step_times(model: PreTrainedModel, dense: PreTrainedModel, tokens: int, repeats: int) -> dict[str, Any]:
    """A decoding step over so many tokens through both caches, by one thread, and what the packed one stores."""
    ids = torch.randint(0, 128, (1, tokens + 1), generator=torch.Generator().manual_seed(tokens))
    packed, plain = HeadQCache(model), DynamicCache(config=dense.config)
    runs = {"transformers": (dense, plain), "headq": (model, packed)}
    last = {}
    fill(packed, plain, dense, ids[:, :-1])
    for name, (who, cache) in runs.items():
        last[name] = who(input_ids=ids[:, -1:], **with_cache(cache), use_cache=True).logits.float()
    error = float((last["headq"] - last["transformers"]).norm() / last["transformers"].norm())
    if not error < LIMIT:
        raise CheckFailedError(f"the packed layer's logits differ by {error:.3f} of their norm")
    calls = {
        name: [lambda who=who, cache=cache: who(input_ids=ids[:, -1:], **with_cache(cache), use_cache=True)]
        for name, (who, cache) in runs.items()
    }
    found = bursts(calls, 1, repeats)
    report, row = packed.bits_report(), LITE["kv_lora_rank"] + LITE["qk_rope_head_dim"]
    assert report.key_body_bits is not None
    return {
        "tokens": tokens,
        "error": error,
        "ms": {name: statistics.median(times) for name, times in found.items()},
        "all_ms": found,
        "ratio": statistics.median(a / b for a, b in zip(found["transformers"], found["headq"], strict=True)),
        "bytes_of_a_token": report.key_body_bits * row / 8,
        "dense_bytes_of_a_token": 2 * row,
        "cache_bytes": packed.get_memory_footprint(),
        "dense_cache_bytes": 2 * row * int(report.tokens),
    }


def speed(contexts: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """:func:`step_times` for each context."""
    model = layer()
    dense = copy.deepcopy(model)
    rows = [torch.randint(0, 128, (1024,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    quantize_(model, headq_config(k_bits=BITS, v_bits=BITS, calibration=calibrated(model, rows)))
    for tokens in contexts:
        yield step_times(model, dense, tokens, repeats)


def text(*names: str) -> Tensor:
    """Bytes of texts that come with the package."""
    return torch.tensor(list(b"".join((TEXTS / f"{name}.txt").read_bytes() for name in names)))


def trained(ids: Tensor, steps: int) -> PreTrainedModel:
    """A tiny model of bytes."""
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**TINY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 30) * (1 - i / steps))
    offsets = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - ROW - 1, (BATCH,), generator=offsets).tolist()
        rows = torch.stack([ids[s : s + ROW] for s in starts])
        logits = model(rows, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def scored(model: PreTrainedModel, rows: Tensor, packed: bool) -> Tensor:
    """Log-probabilities ``[n, T − PREFILL, V]`` behind the prefill, through a cache."""
    found = []
    for row in rows[:, None]:
        cache: Any = HeadQCache(model) if packed else DynamicCache(config=model.config)
        sizes = [PREFILL, *[CHUNK] * ((row.shape[1] - PREFILL) // CHUNK)]
        parts = [model(input_ids=x, **with_cache(cache), use_cache=True).logits for x in row.split(sizes, 1)]
        found.append(torch.cat(parts, 1)[0, PREFILL:])
    return torch.stack(found).log_softmax(-1)


def quality(steps: int) -> dict[str, Any]:
    """KL to the exact cache, in nats, by bits of a row and by metric."""
    ids, rows = text("calibration", "french", "dialogue"), text("heldout")[: 3 * 1024].view(3, 1024)
    model = trained(ids, steps)
    calibration = calibrate(model, list(ids[: 4 * 1024].split(1024)), progress=False)
    exact = scored(model, rows, packed=False)
    nats = -exact[:, :-1].gather(-1, rows[:, PREFILL + 1 :, None]).mean()
    found: dict[str, Any] = {"nats_of_a_byte": float(nats), "steps": steps, "kl": {}}
    for bits in (2, 3, 4):
        given: dict[str, Any] = dict(k_bits=bits, v_bits=bits, calibration=calibration, residual_length=32)
        found["kl"][str(bits)] = kls = {}
        for name, weight in (("joint", 1), ("keys_alone", 0)):
            quantize_(model, headq_config(**given, value_weight=weight))
            kls[name] = float((exact.exp() * (exact - scored(model, rows, packed=True))).sum(-1).mean())
            restore_(model)
    return found


def result_table(result: dict[str, Any]) -> str:
    """The measured rows as Markdown."""
    check_whole(result)
    header = ["tokens", "transformers, ms", "HeadQ, ms", "ratio", "bytes of a token", "of bfloat16"]
    rows = [
        [
            str(x["tokens"]), f"{x['ms']['transformers']:.1f}", f"{x['ms']['headq']:.2f}", f"{x['ratio']:.0f} ×",
            f"{x['bytes_of_a_token']:.0f}", f"1/{x['dense_bytes_of_a_token'] / x['bytes_of_a_token']:.1f}",
        ]
        for x in result["speed"]
    ]  # fmt: skip
    kls = [
        [bits, f"{x['joint']:.6f}", f"{x['keys_alone']:.6f}", f"{100 * (x['joint'] / x['keys_alone'] - 1):+.0f} %"]
        for bits, x in result["quality"]["kl"].items()
    ]
    told = (
        f"\n\nProcessor time of one thread of a decoding step, one layer of DeepSeek-V2-Lite's shape in bfloat16, rows "
        f"of {BITS} bits, in turn in one process.\n\n"
    )
    quality = "\n\nKL in nats of a tiny trained model, coded under `C_q + λ Σ W_uvᵀ W_uv` and under `C_q` alone."
    return (
        markdown_table(header, rows)
        + told
        + markdown_table(["bits", "joint", "keys alone", "difference"], kls)
        + quality
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=5, help="bursts of each cache")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the tiny model's training")
    add_result_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": command_line(), "environment": environment(), "complete": False, "speed": [], "quality": None,
    }  # fmt: skip
    for cell in speed(options.contexts, options.repeats):
        result["speed"].append(cell)
        print(cell["tokens"], cell["ms"], flush=True)
    result["quality"] = quality(options.steps)
    result["complete"] = True
    if options.json is not None:
        write_json(options.json, result)
    print(result_table(result))


if __name__ == "__main__":
    main()
