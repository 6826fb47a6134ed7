"""Falsification controls: is it key error, or error in what queries see, that damages attention?

Many perturbations of a model's own keys, from noise in chosen directions to real quantizers at counted bits, and what
each does to key MSE, score error, Fisher error and attention KL: ``perturbation_panel(model, rows, calibration,
seed=0)``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import Calibration
from headq_ao.calibration.rope import rotation_of
from headq_ao.codecs.rotation import in_model_frame
from headq_ao.evals.harness.key_changes import Perturbation, States, perturbations
from headq_ao.evals.harness.panel import VALUES, Measurements, summarize
from headq_ao.evals.harness.panel_plot import plot_panel
from headq_ao.evals.harness.replay import attention_scaling, each_layer
from headq_ao.evals.metrics.formulas import attention_kl, fisher_error, score_error_variance
from headq_ao.integrations.config_only.shapes import layer_shapes
from headq_ao.integrations.transformers.models import attention_modules, fingerprint, rotary_embedding
from headq_ao.ops.layout import TOKEN_TILE

__all__ = ["measure", "perturbation_panel", "plot_panel"]

QUERIES = 128  # judged per row, evenly spread over its last three quarters
LEAST_TOKENS = 64


@torch.no_grad()
def perturbation_panel(
    model: Any,
    rows: Tensor,
    calibration: Calibration,
    *,
    seed: int,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Perturb the keys of ``model`` on ``rows`` in many ways, and compare predictors of the attention KL.

    Each perturbation (:mod:`headq_ao.evals.harness.key_changes`) changes the keys of one layer behind the first
    four, which stay exact as in the cache; queries of the last three quarters of the row judge it. Queries, keys and
    attention are those of an exact forward pass.

    Args:
        model: a supported causal LM in eval mode, quantized with HeadQ or not; left as it was.
        rows: token ids ``[N, T]`` without padding, ``T ≥ 64``.
        calibration: of this model, on other text.
        seed: of the noise, the random basis and the choice of points to show.
        layers: which; None: all.
        progress: show a progress bar.

    Returns:
        Plain data: see :func:`headq_ao.evals.harness.panel.summarize`, with ``seed``, ``rows`` and others.

    Raises:
        ValueError: on arguments that do not fit, before any work.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import calibrate
        >>> from headq_ao.evals.harness.perturbations import perturbation_panel
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> calibration = calibrate(model, [torch.randint(64, (300,))], progress=False)
        >>> panel = perturbation_panel(model, torch.randint(64, (1, 64)), calibration, seed=0, progress=False)
        >>> panel["null_space"][0]["name"], panel["null_space"][0]["attention_kl"] < 1e-6
        ('one vector added to all keys', True)
    """
    shapes = layer_shapes(model.config)
    chosen = list(range(len(shapes))) if layers is None else sorted(set(layers))
    if model.training:
        raise ValueError("the model is in train mode; call model.eval() first")
    if rows.ndim != 2 or rows.is_floating_point() or len(rows) == 0 or rows.shape[1] < LEAST_TOKENS:
        raise ValueError(
            f"rows must be token ids [N, T] with T of at least {LEAST_TOKENS}, got {tuple(rows.shape)}, {rows.dtype}"
        )
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(shapes):
        raise ValueError(f"layers must be of 0 to {len(shapes) - 1}, got {layers}")
    calibration.check_model(fingerprint(model))
    if len(calibration.layers[0].k_rows) < TOKEN_TILE:
        raise ValueError(f"the calibration must hold at least {TOKEN_TILE} sampled keys; calibrate on more text")
    modules, shape = attention_modules(model, len(shapes)), shapes[0]
    embedding = rotary_embedding(model)
    moments = {
        i: m if (r := rotation_of(embedding, modules[i], shapes[i])) is None else in_model_frame(m, r)
        for i, m in enumerate(calibration.layers)
        if i in chosen
    }
    changes = perturbations(shape.head_dim, shape.n_heads // shape.n_kv_heads, seed)
    table = Measurements(
        changes, chosen, {name: torch.zeros(len(changes), len(chosen), shape.n_heads) for name in VALUES}
    )
    with tqdm(total=len(rows) * len(chosen), desc="perturbations", unit="layer", disable=not progress) as bar:
        for number, row in enumerate(rows):

            def receive(i: int, q: Tensor, k: Tensor, v: Tensor, number: int = number) -> None:
                if i not in chosen:
                    return
                generator = torch.Generator().manual_seed((seed * 1009 + number) * 1009 + i)
                scaling = attention_scaling(modules[i], q.shape[-1])
                states = States.of(q, k, scaling, QUERIES, shapes[i].sliding_window, moments[i], generator)
                for p, change in enumerate(changes):
                    values, bits = measure(states, change)
                    table.bits[p] = bits
                    for name, x in values.items():
                        table.values[name][p, chosen.index(i)] += x / len(rows)
                bar.update()

            each_layer(model, row[None], receive)
    about = {"seed": seed, "rows": len(rows), "row_length": rows.shape[1], "queries": QUERIES}
    return about | summarize(table, seed)


def measure(states: States, change: Perturbation) -> tuple[dict[str, Tensor], float | None]:
    """Errors of one perturbation, each ``[Hq]``, means over the judged queries; and its bits per key element.

    ``key_mse`` is the mean over the row's keys and coordinates of ``(k_hat − k)²``, ``relative_key_mse`` that over the
    variance of the keys; the others are those of :mod:`headq_ao.evals.metrics.formulas`.
    """
    if change.few_queries is not None:
        states = states.last(change.few_queries)
    error, bits = change.error(states)
    delta = (states.q @ error[:, None].transpose(-1, -2)).masked_fill(~states.visible, 0)
    per_key = error.square().mean((1, 2))[:, None].expand(states.q.shape[:2])
    flips = (states.s + delta).argmax(-1) != states.top1
    values = {
        "key_mse": per_key,
        "relative_key_mse": per_key / states.rms.square()[:, None],
        "score_error": score_error_variance(delta, states.visible).mean(-1),
        "fisher_error": fisher_error(states.a, delta).mean(-1),
        "attention_kl": attention_kl(states.a, delta).mean(-1),
        "top1_flips": flips.float().mean(-1),
    }
    return {name: x.flatten().float().cpu() for name, x in values.items()}, bits
