"""Model-visible errors of a packed cache, per layer and head: ``score_error(model, rows)``."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import HeadQCache
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.evals.harness.inputs import call_spans
from headq_ao.evals.harness.replay import attention_scaling, check_rows, each_layer, output_projection, tokens_as_read
from headq_ao.evals.metrics.formulas import (
    attention_kl,
    attention_rows,
    causal_window,
    fisher_error,
    key_mse,
    logit_correlation,
    relative_entropy,
    score_error_variance,
    top1_flips,
    value_error,
)
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.models import attention_modules

# Rows are binned by entropy / log(visible keys). Fixed edges can be summed over chunks, and mean the same in every
# layer and at every length; below 0.25 a row reads about one key (4 of 256, 6 of 1024): a flip there reroutes it.
ENTROPY_EDGES = (0.25, 0.5, 0.75)
PER_HEAD = (
    "key_mse",
    "score_error",
    "fisher_error",
    "attention_kl",
    "logit_correlation",
    "top1_flips",
    "route_flips",
    "value_error",
)


class ScoreErrors:
    """Sums of errors over queries, per layer and head, fed in chunks of queries.

    Means over the scored queries of a (layer, query head), the key error of the KV head that it reads:

    - ``key_mse``: mean over the visible keys ``j`` of ``‖k_hat_j − k_j‖² / D``, exact ones included
    - ``score_error``: ``Var_j(δ_j)``, each visible key counted alike; ``δ_j = scaling·q·(k_hat_j − k_j)``
    - ``fisher_error``: ``½ Var_a(δ)`` in nats
    - ``attention_kl``: ``KL(a ‖ â)`` in nats
    - ``logit_correlation``: Pearson's between the exact and the approximate logits of the visible keys
    - ``top1_flips``: share of queries whose most attended key changes; ``route_flips``: share of queries where it
      changes and whose exact attention has an entropy below ``0.25·log(visible keys)``
    - ``value_error``: ``Σ_j a_j² ‖v_hat_j − v_j‖² / D``

    and per layer ``output_error``: ``Σ ‖W_O(ô − o)‖² / Σ ‖W_O o‖²``, sums over queries, ``o`` that of all heads,
    ``ô`` from ``k_hat`` and ``v_hat``.

    Args:
        n_layers, n_heads, n_kv_heads: of the model.

    Example:
        >>> import torch
        >>> from headq_ao.evals.metrics.score_error import ScoreErrors
        >>> q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 16)
        >>> errors = ScoreErrors(n_layers=1, n_heads=4, n_kv_heads=2)
        >>> errors.update(0, q, k, v, k_hat=k + 1, v_hat=v, scaling=0.25)
        >>> errors.per_layer()["key_mse"], errors.summary()["mean"]["attention_kl"] < 1e-6
        ([1.0], True)
    """

    def __init__(self, n_layers: int, n_heads: int, n_kv_heads: int) -> None:
        self.groups = n_heads // n_kv_heads
        bins = len(ENTROPY_EDGES) + 1
        heads = {name: (n_layers, n_heads) for name in PER_HEAD}
        shapes = heads | {"queries": (n_layers,), "output_num": (n_layers,), "output_den": (n_layers,)}
        shapes |= {"rows_packed": (n_layers,), "rows_read": (n_layers,)}
        shapes |= {"bin_queries": (n_layers, bins), "bin_flips": (n_layers, bins)}
        self.sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    @torch.no_grad()
    def update(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_hat: Tensor,
        v_hat: Tensor,
        *,
        scaling: float,
        window: int | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
        packed: tuple[int, int] = (0, 0),
    ) -> None:
        """Add the last ``S`` queries of ``T`` tokens: query ``i`` stands at position ``T − S + i``.

        Args:
            layer: index.
            q: ``[B, Hq, S, D]``.
            k, v, k_hat, v_hat: full-precision tokens, and as a cache gives them, ``[B, Hkv, T, D]``.
            scaling: of the scores.
            window: tokens that a query sees back, itself included; None: all.
            project: the linear output projection ``[B, S, Hq·D] → [B, S, hidden]``; None: no ``output_error``.
            packed: range of positions whose tokens are read from pages, for ``packed_fraction``.
        """
        q, k, v, k_hat, v_hat = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v, k_hat, v_hat))
        visible = causal_window(q.shape[2], k.shape[2], window, q.device)
        s, delta, a = attention_rows(q, k, k_hat, scaling, visible)
        s_hat = s + delta
        flips, entropy = top1_flips(s, s_hat, visible), relative_entropy(a, visible)
        mse = visible.to(k.dtype) @ key_mse(k_hat, k).unsqueeze(-1) / visible.sum(-1, keepdim=True)
        of_values = value_error(a.unflatten(1, (-1, self.groups)), v_hat[:, :, None], v[:, :, None])
        queries = {
            "key_mse": mse.squeeze(-1).repeat_interleave(self.groups, 1),
            "score_error": score_error_variance(delta, visible),
            "fisher_error": fisher_error(a, delta),
            "attention_kl": attention_kl(a, delta),
            "logit_correlation": logit_correlation(s, s_hat, visible),
            "top1_flips": flips,
            "route_flips": flips & (entropy < ENTROPY_EDGES[0]),
            "value_error": of_values.flatten(1, 2),
        }
        for name, x in queries.items():
            self._count(name, layer, x.double().sum((0, 2)))
        self._count_rows(layer, q.shape[0], visible, packed)
        self._count_flips(layer, flips.flatten(), entropy.flatten())
        if project is not None:
            o = self._outputs(a, v)
            error = self._outputs(s_hat.masked_fill(~visible, -math.inf).softmax(-1), v_hat) - o
            self._count("output_num", layer, project(error).double().square().sum())
            self._count("output_den", layer, project(o).double().square().sum())

    def _count_rows(self, layer: int, batch: int, visible: Tensor, packed: tuple[int, int]) -> None:
        self._count("queries", layer, torch.tensor(batch * visible.shape[0]))
        self._count("rows_read", layer, batch * visible.sum())
        self._count("rows_packed", layer, batch * visible[:, slice(*packed)].sum())

    def _count_flips(self, layer: int, flips: Tensor, entropy: Tensor) -> None:
        bins = len(ENTROPY_EDGES) + 1
        which = torch.bucketize(entropy, entropy.new_tensor(ENTROPY_EDGES), right=True)
        self._count("bin_queries", layer, torch.bincount(which, minlength=bins))
        self._count("bin_flips", layer, torch.bincount(which[flips], minlength=bins))

    def _outputs(self, a: Tensor, v: Tensor) -> Tensor:
        """``Σ_j a_j v_j`` of all heads side by side, ``[B, S, Hq·D]``."""
        o: Tensor = a.unflatten(1, (-1, self.groups)) @ v[:, :, None]
        return o.flatten(1, 2).transpose(1, 2).flatten(2)

    def _count(self, name: str, layer: int, value: Tensor) -> None:
        self.sums[name][layer] += value.to("cpu", torch.float64)

    def merge(self, other: "ScoreErrors") -> "ScoreErrors":
        """Add what another one has seen, for instance of other rows; returns self."""
        for name, x in other.sums.items():
            self.sums[name] += x
        return self

    def per_head(self) -> dict[str, Tensor]:
        """Means over queries, ``[layers, heads]`` for each name; nan for a layer without queries."""
        return {name: self.sums[name] / self.sums["queries"][:, None] for name in PER_HEAD}

    def per_layer(self) -> dict[str, list[float]]:
        """Means over queries and heads, and ``output_error`` (nan where no projection was given)."""
        layers = {name: x.mean(-1).tolist() for name, x in self.per_head().items()}
        return layers | {"output_error": (self.sums["output_num"] / self.sums["output_den"]).tolist()}

    @property
    def packed_fraction(self) -> float:
        """Packed over all rows that the queries read."""
        return (self.sums["rows_packed"].sum() / self.sums["rows_read"].sum()).item()

    def flips_by_entropy(self) -> dict[str, list[float | None]]:
        """Top-1 flips by entropy bin, all layers: bin edges in units of log(visible keys), share of rows, flip rate."""
        rows, flips = self.sums["bin_queries"].sum(0), self.sums["bin_flips"].sum(0)
        share, rate = plain((rows / rows.sum()).tolist()), plain((flips / rows).tolist())
        return {"edges": [0.0, *ENTROPY_EDGES, 1.0], "share": share, "flips": rate}

    def summary(self) -> dict[str, Any]:
        """Means over layers and heads, the worst layer of each error, flips by entropy, packed share: plain data."""
        layers = self.per_layer()
        worst = {}
        for name, values in layers.items():
            pick = min if name == "logit_correlation" else max
            at = pick((i for i, x in enumerate(values) if x == x), key=values.__getitem__, default=None)
            worst[name] = {"layer": at, "value": None if at is None else values[at]}
        return {
            "queries": int(self.sums["queries"].max()),
            "packed_fraction": self.packed_fraction,
            "mean": dict(zip(layers, plain([sum(x) / len(x) for x in layers.values()]), strict=True)),
            "worst_layer": worst,
            "flips_by_entropy": self.flips_by_entropy(),
        }

    def to_dict(self) -> dict[str, Any]:
        """:meth:`summary` with lists per layer and per layer and head: plain data for JSON, no nan."""
        heads = {name: [plain(row) for row in x.tolist()] for name, x in self.per_head().items()}
        layers = {name: plain(x) for name, x in self.per_layer().items()}
        return self.summary() | {"per_layer": layers, "per_head": heads}


@torch.no_grad()
def score_error(
    model: Any,
    rows: Tensor,
    make_cache: Callable[[], Any] | None = None,
    prefill: int = 256,
    chunk: int = 64,
    progress: bool = True,
) -> ScoreErrors:
    """How far a cache's rows are from the exact ones, in what the model sees of them (see :class:`ScoreErrors`).

    The queries, keys and values of one exact forward pass go through a fresh cache, layer by layer: ``prefill`` tokens,
    then chunks; before each chunk is packed, its queries compare the rows they read with the exact ones. Each layer is
    judged on exact inputs, so errors do not add up over layers as in :func:`headq_ao.evals.harness.scoring.score`.

    Args:
        model: with HeadQ (:func:`headq_ao.quantize_`), in eval mode.
        rows: token ids ``[N, T]`` without padding, CPU.
        make_cache: builds each row's cache, a :class:`HeadQCache`; None: that of the model.
        prefill: tokens of the first call; positions from here on are scored.
        chunk: tokens of each later call.
        progress: show a progress bar.

    Raises:
        ValueError: on arguments that do not fit, before any work.
        NothingPackedError: when no scored query read a packed token.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import headq_config, quantize_
        >>> from headq_ao.evals.metrics.score_error import score_error
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> quantize_(model, headq_config(warmup_tokens=32))
        >>> errors = score_error(model, torch.randint(64, (1, 300)), progress=False)
        >>> sorted(errors.to_dict())
        ['flips_by_entropy', 'mean', 'packed_fraction', 'per_head', 'per_layer', 'queries', 'worst_layer']
    """
    check_rows(model, rows, prefill, chunk)
    shapes = layer_shapes(model.config)
    modules = attention_modules(model, len(shapes))
    projections = [output_projection(module) for module in modules]
    errors = ScoreErrors(len(shapes), shapes[0].n_heads, shapes[0].n_kv_heads)
    with tqdm(total=len(rows) * len(shapes), desc="score error", unit="layer", disable=not progress) as bar:
        for row in rows:
            cache = HeadQCache(model) if make_cache is None else make_cache()

            def receive(i: int, q: Tensor, k: Tensor, v: Tensor, cache: Any = cache) -> None:
                calls = call_spans(prefill, k.shape[2], chunk)
                feed(errors, i, cache.layers[i], modules[i], projections[i], (q, k, v), calls)
                cache.reset()  # the next layer starts again, and layers share their lengths
                bar.update()

            each_layer(model, row[None], receive)
    if errors.packed_fraction == 0:
        raise NothingPackedError(
            f"no packed token was read in {len(rows)} rows of {rows.shape[1]} tokens: nothing was compared; "
            "use longer rows or a smaller residual_length or warmup_tokens"
        )
    return errors


def feed(
    errors: ScoreErrors,
    i: int,
    layer: Any,
    module: Any,
    project: Callable[[Tensor], Tensor],
    states: tuple[Tensor, Tensor, Tensor],
    calls: Iterable[tuple[int, int]],
) -> None:
    """Put one layer's exact ``q, k, v`` through its cache call by call; all calls but the first are compared."""
    q, k, v = states
    scaling = attention_scaling(module, q.shape[-1])
    for start, stop in calls:
        new = slice(start, stop)
        layer.update(k[:, :, new], v[:, :, new])
        if start:
            exact = k[:, :, :stop], v[:, :, :stop]
            read, packed = tokens_as_read(layer, *exact)
            errors.update(
                i, q[:, :, new], *exact, *read, scaling=scaling, window=layer.sliding_window, project=project,
                packed=packed,
            )  # fmt: skip
        layer.commit(q[:, :, new], scaling)


def plain(values: list[float]) -> list[float | None]:
    """nan, which JSON does not know, as None."""
    return [x if x == x else None for x in values]
