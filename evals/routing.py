"""How often a cache sends a token to other experts: ``python -m headq_ao.evals.routing --help``."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from headq_ao import HeadQCache
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.environment import environment
from headq_ao.evals.harness.recipe import Recipe, Setting, add_arguments, run_settings
from headq_ao.evals.harness.table import text_table
from headq_ao.integrations.transformers.models import with_cache

RESULTS = Path(__file__).resolve().parents[1] / "recipes" / "results"
EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python -m headq_ao.evals.routing recipes/routing.yaml
  python -m headq_ao.evals.routing recipes/routing.yaml --only kv_default --results out

A router sends a token to the few experts that score highest. Where two experts score alike, a small error in the cache
sends it to another one, and what it computes changes by more than the error. Each cache reads the rows of the recipe in
the same calls as the exact one, and the experts of each token and layer are compared. Beside it stands a dense cache
in bfloat16, which rounds keys and values too, under a model that is otherwise the same.
"""


class Bfloat16Cache(DynamicCache):  # type: ignore[misc]
    """transformers' cache, of keys and values rounded to bfloat16."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As there."""
        k, v = (x.bfloat16().to(x.dtype) for x in (key_states, value_states))
        held: tuple[Tensor, Tensor] = super().update(k, v, *args, **kwargs)
        return held


@contextmanager
def watched(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """What the routers of a model choose, ``[tokens, k]`` for each of its calls, by layer.

    Raises:
        ValueError: where a model has none.
    """
    routers = [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router that chooses experts: give a mixture of experts")
    chosen: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _, __, out, into=into: into.append(out[-1].cpu()))
        for router, into in zip(routers, chosen, strict=True)
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def read(
    model: Any, rows: Tensor, prefill: int, chunk: int, make_cache: Callable[[], Any], label: str, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows ``[N, T]``, one after the other: ``prefill`` tokens, then calls of ``chunk``.

    Returns:
        Of the tokens after the prefill: log-probabilities of the next one, ``[N, T − prefill, vocab]``, and the experts
        of each layer, ``[layers, N, T − prefill, k]``.
    """
    logprobs, experts = list[Tensor](), list[Tensor]()
    for row in tqdm(rows.to(model.device), desc=label, unit="row", disable=not progress):
        cache, found = make_cache(), list[Tensor]()
        model(row[None, :prefill], **with_cache(cache), logits_to_keep=1)
        with watched(model) as chosen:
            for start in range(prefill, len(row), chunk):
                logits = model(row[None, start : start + chunk], **with_cache(cache)).logits[0]
                found.append(logits.float().log_softmax(-1).cpu())
        logprobs.append(torch.cat(found))
        experts.append(torch.stack([torch.cat(of_layer) for of_layer in chosen]))
    return torch.stack(logprobs), torch.stack(experts, 1)


def among(experts: Tensor, exact: Tensor) -> Tensor:
    """Which of experts ``[.., k]`` are among the exact ones, ``[.., k]`` bool."""
    return (experts[..., :, None] == exact[..., None, :]).any(-1)


def changed(experts: Tensor, exact: Tensor) -> dict[str, Any]:
    """How experts ``[layers, N, T, k]`` differ from those under the exact cache.

    Returns:
        ``sets``: the share of tokens and layers whose set of experts is another one, ``sets_sem`` its standard error
        over rows, ``sets_by_layer``; ``experts``: of experts that are not among the exact ones; ``first``: of tokens
        and layers whose highest expert is another one; ``tokens``: of tokens with another set in some layer.

    Example:
        >>> import torch
        >>> from headq_ao.evals.routing import changed
        >>> found = changed(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[[[2, 1], [3, 5]]]]))
        >>> found["sets"], found["experts"], found["first"]
        (0.5, 0.25, 0.5)
    """
    kept = among(experts, exact)
    other = ~kept.all(-1)
    by_row = other.float().mean((0, 2))
    return {
        "sets": other.float().mean().item(),
        "sets_sem": (by_row.std() / len(by_row) ** 0.5).item() if len(by_row) > 1 else None,
        "sets_by_layer": other.float().mean((1, 2)).tolist(),
        "experts": (~kept).float().mean().item(),
        "first": (experts[..., 0] != exact[..., 0]).float().mean().item(),
        "tokens": other.any(0).float().mean().item(),
    }


def compared(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What :func:`read` gave against the same of the exact cache: KL in nats, of all tokens, of those with another set
    of experts in some layer and of the others (None: there are none), and :func:`changed`."""
    (logprobs, experts), (target, of_exact) = found, exact
    kl = (target.exp() * (target - logprobs)).sum(-1)
    other = ~among(experts, of_exact).all(-1).all(0)
    return {
        "mean_kl": kl.mean().item(),
        "kl_where_changed": kl[other].mean().item() if other.any() else None,
        "kl_where_same": kl[~other].mean().item() if not other.all() else None,
        "changed": changed(experts, of_exact),
    }


class Bench:
    """A mixture of experts, and what it does under the exact cache, for all settings of a recipe."""

    def __init__(self, recipe: Recipe, progress: bool) -> None:
        p = recipe.protocol
        self.recipe, self.progress = recipe, progress
        self.model, tokenizer = inputs.load(recipe.models[0], None, inputs.DTYPES[p["dtype"]])
        self.rows = inputs.token_rows(tokenizer, recipe.text, p["rows"], p["row_length"])
        self.calibration = inputs.calibrate_on(
            self.model, tokenizer, recipe.calibration_text, p["calibration_tokens"], progress
        )
        self.exact = self.read(lambda: DynamicCache(config=self.model.config), "exact")
        bfloat16 = self.read(lambda: Bfloat16Cache(config=self.model.config), "bfloat16")
        self.bfloat16 = compared(bfloat16, self.exact)

    def read(self, make_cache: Callable[[], Any], label: str) -> tuple[Tensor, Tensor]:
        """:func:`read` of the recipe's rows."""
        p = self.recipe.protocol
        return read(self.model, self.rows, p["prefill"], p["chunk"], make_cache, label, self.progress)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """The result of one setting."""
        recipe, config = self.recipe, self.model.config
        with setting.subject(recipe.seed, self.calibration).on(self.model) as make_cache:
            caches = list[Any]()

            def make() -> Any:
                caches.append(HeadQCache(self.model) if make_cache is None else make_cache())
                return caches[-1]

            result = compared(self.read(make, setting.name), self.exact)
        packed = [cache.packed_fraction for cache in caches if hasattr(cache, "packed_fraction")]
        head = {**recipe.labels(setting), "options": setting.options}
        return {
            **head,
            **recipe.key(setting, recipe.models[0]),
            **result,
            "packed_fraction": sum(packed) / len(packed) if packed else None,
            "experts": {"number": config.num_experts, "active": config.num_experts_per_tok},
            "bfloat16": self.bfloat16,
            "environment": environment(),
        }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The main numbers of results as text."""
    header = [
        "cache",
        "KL",
        "other set",
        "other experts",
        "other first expert",
        "tokens",
        "KL where changed",
        "elsewhere",
    ]
    every = [*results, {"title": "dense bfloat16", **results[0]["bfloat16"]}] if results else []
    return text_table(header, [cells(result) for result in every])


def cells(result: dict[str, Any]) -> list[str]:
    """A row of a table: title, KL, and how experts differ."""
    found = result["changed"]
    shares = [f"{100 * found[name]:.3f} %" for name in ("sets", "experts", "first", "tokens")]
    kls = [result[name] for name in ("kl_where_changed", "kl_where_same")]
    return [
        result["title"],
        f"{result['mean_kl']:.2g}",
        *shares,
        *("–" if x is None else f"{x:.2g}" for x in kls),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.routing",
        description="How often a quantized cache sends a token of a mixture of experts to other experts.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, "recipes/routing.yaml", RESULTS)
    run_settings(parser, argv, Bench, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
