"""Decoding as it is used: ``python -m headq_ao.evals.decode_mode --help``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from headq_ao import HeadQCache
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment
from headq_ao.evals.harness.recipe import Recipe, Setting, add_arguments, run_settings
from headq_ao.evals.harness.scoring import exact_logprobs, score
from headq_ao.evals.harness.table import text_table
from headq_ao.integrations.transformers.models import with_cache

RESULTS = Path(__file__).resolve().parents[1] / "recipes" / "results"
EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.decode_mode recipes/decode_mode.yaml
  python -m headq_ao.evals.decode_mode recipes/decode_mode.yaml --only kv_default --results out

The first --prefill tokens of each row of the recipe are a prompt. The exact cache continues it to the row's length,
greedily and sampled at temperature 1 from the recipe's seed. Each cache then reads these same tokens, one a call and in
chunks, and the KL of its next token's distribution to the exact one is taken at each position, and whether the most
likely token is the same. Last it continues the prompts greedily by itself: where it first differs.
"""
KINDS = ("greedy", "sampled")


@torch.no_grad()
def continued(
    model: Any,
    prompts: Tensor,
    tokens: int,
    cache: Any,
    seed: int | None = None,
    label: str = "",
    progress: bool = True,
) -> Tensor:
    """Prompts ``[N, P]`` and ``tokens`` more, ``[N, P + tokens]``: the most likely ones, or drawn at temperature 1.

    Args:
        cache: empty.
        seed: of the draws; None: greedily. No token ends a sequence.

    Example:
        >>> import torch
        >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
        >>> from headq_ao.evals.decode_mode import continued
        >>> config = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> continued(model, torch.arange(8).view(2, 4), 3, DynamicCache(config=config), progress=False).shape
        torch.Size([2, 7])
    """
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    found, new = [prompts.to(model.device)], prompts.to(model.device)
    for _ in tqdm(range(tokens), desc=label, unit="step", disable=not progress):
        logits = model(new, **with_cache(cache), logits_to_keep=1).logits[:, -1].float()
        drawn = generator is not None
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator) if drawn else logits.argmax(-1, True)
        found.append(new)
    return torch.cat(found, 1).cpu()


def repeated(rows: Tensor, n: int = 4) -> float:
    """Share of the n-grams of rows ``[N, T]`` that stood in the same row before.

    Example:
        >>> import torch
        >>> from headq_ao.evals.decode_mode import repeated
        >>> repeated(torch.tensor([[1, 2, 1, 2, 1, 2]]), 2), repeated(torch.arange(9)[None])
        (0.6, 0.0)
    """
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows.tolist()]
    return 1 - sum(len(set(found)) for found in grams) / max(sum(map(len, grams)), 1)


def divergence(own: Tensor, exact: Tensor) -> dict[str, Any]:
    """The step at which each of the continuations ``[N, T]`` first differs from the exact cache's.

    Returns:
        ``steps``, T for those that never do; ``never``, their share; ``median``.

    Example:
        >>> import torch
        >>> from headq_ao.evals.decode_mode import divergence
        >>> divergence(torch.tensor([[1, 2, 3], [1, 5, 3]]), torch.tensor([[1, 2, 3], [1, 2, 3]]))
        {'steps': [3, 1], 'median': 1, 'never': 0.5}
    """
    differs = torch.nn.functional.pad(own != exact, (0, 1), value=True)
    steps = differs.int().argmax(1)
    return {
        "steps": steps.tolist(),
        "median": int(steps.median()),
        "never": (steps == own.shape[1]).float().mean().item(),
    }


class Bench:
    """A model, the exact cache's continuations and their log-probabilities, for all settings of a recipe."""

    def __init__(self, recipe: Recipe, progress: bool) -> None:
        p = recipe.protocol
        self.recipe, self.progress, self.prefill = recipe, progress, p["prefill"]
        self.model, tokenizer = inputs.load(recipe.models[0], None, inputs.DTYPES[p["dtype"]])
        prompts = inputs.token_rows(tokenizer, recipe.text, p["rows"], p["row_length"])[:, : self.prefill]
        self.calibration = inputs.calibrate_on(
            self.model, tokenizer, recipe.calibration_text, p["calibration_tokens"], progress
        )
        self.rows, self.exact = dict[str, Tensor](), dict[str, list[Tensor]]()
        for kind, seed in zip(KINDS, (None, recipe.seed), strict=True):
            cache = DynamicCache(config=self.model.config)
            tokens = p["row_length"] - self.prefill
            self.rows[kind] = continued(self.model, prompts, tokens, cache, seed, f"exact, {kind}", progress)
            self.exact[kind] = exact_logprobs(self.model, self.rows[kind], self.prefill, progress)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """The result of one setting."""
        p, recipe = self.recipe.protocol, self.recipe
        subject = setting.subject(recipe.seed, self.calibration)
        result: dict[str, Any] = {}
        with subject.on(self.model) as make_cache:
            for kind in KINDS:
                rows, by_chunk = self.rows[kind], dict[str, Any]()
                for name, chunk in (("tokens", 1), ("chunks", p["chunk"])):
                    by_chunk[name] = score(
                        self.model, rows, self.exact[kind], prefill=self.prefill, chunk=chunk, batch_size=len(rows),
                        make_cache=make_cache, progress=self.progress, label=f"{setting.name}, {kind}, {name}",
                    ).to_dict()  # fmt: skip
                result[kind] = by_chunk | {
                    "ratio": by_chunk["tokens"]["mean_kl"] / by_chunk["chunks"]["mean_kl"],
                    "agreement": 1 - by_chunk["tokens"]["flips"],
                    "repeated_4grams": repeated(rows[:, self.prefill :]),
                }
            rows, cache = self.rows["greedy"], HeadQCache(self.model) if make_cache is None else make_cache()
            prompts, tokens = rows[:, : self.prefill], rows.shape[1] - self.prefill
            own = continued(self.model, prompts, tokens, cache, None, f"{setting.name}, free", self.progress)
            result["free_running"] = divergence(own[:, self.prefill :], rows[:, self.prefill :])
        head = {**recipe.labels(setting), "options": setting.options}
        return {**head, **recipe.key(setting, recipe.models[0]), **result, "environment": environment()}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The main numbers of results as text."""
    header = ["cache", "tokens of", "KL", "median", "99.9 %", "by chunks", "ratio", "agreement", "diverges (median)"]
    rows = []
    for result in results:
        for kind in KINDS:
            found = result[kind]
            tokens, free = found["tokens"], result["free_running"]
            quantiles = [f"{tokens['kl_quantiles'][q]:.5f}" for q in ("0.5", "0.999")]
            numbers = [f"{tokens['mean_kl']:.5f}", *quantiles, f"{found['chunks']['mean_kl']:.5f}"]
            shown = [*numbers, f"{found['ratio']:.2f}", f"{100 * found['agreement']:.2f} %"]
            rows.append([result["title"], kind, *shown, str(free["median"]) if kind == KINDS[0] else ""])
    return text_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.decode_mode",
        description="KL, agreement and divergence where tokens are decoded one by one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "recipes/decode_mode.yaml", RESULTS)
    run_settings(parser, argv, Bench, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
