"""The error of packed attention on a model's own queries, keys and values."""

import collections
from typing import Any

import torch
from torch import Tensor

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.benchmarks.bench_memory import calibration_of
from headq_ao.evals.benchmarks.bench_rows import LIMIT, check, exact_attention, relative_error
from headq_ao.evals.harness.inputs import load
from headq_ao.evals.harness.replay import attention_scaling, each_layer
from headq_ao.evals.harness.texts import find_text, token_rows
from headq_ao.integrations.transformers.calls import headq_attention
from headq_ao.integrations.transformers.models import attention_modules

REAL_TOKENS = 1024
NEW = 8  # queries compared in each layer: the last ones


@torch.no_grad()
def layer_errors(model: Any, ids: Tensor) -> list[float]:
    """Relative output error of each layer's attention, on the states of one exact forward pass.

    ``‖ô − o‖ / ‖o‖`` over the last :data:`NEW` queries: ``ô`` is what the model gets from its packed cache, ``o`` exact
    attention over the rows as that cache dequantizes them.

    Args:
        model: with HeadQ, in eval mode.
        ids: tokens of one sequence ``[1, T]``.
    """
    cache, errors = HeadQCache(model), {}
    modules: list[Any] = attention_modules(model, len(cache.layers))

    def receive(i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        layer, module, tokens = cache.layers[i], modules[i], k.shape[2]
        scaling = attention_scaling(module, q.shape[-1])
        old, new = slice(0, tokens - NEW), slice(tokens - NEW, tokens)
        layer.update(k[:, :, old], v[:, :, old])
        layer.commit(q[:, :, old], scaling)
        keys, values = layer.update(k[:, :, new], v[:, :, new])
        k_hat, v_hat = (x[0] for x in layer.dequantize())
        out, _ = headq_attention(module, q[:, :, new], keys, values, None, scaling=scaling)
        outs, exact = [], []
        for s in range(NEW):
            seen = tokens - NEW + s + 1
            query = q[0, :, tokens - NEW + s].unflatten(0, (k.shape[1], -1))
            exact.append(exact_attention(query, k_hat[:, :seen], v_hat[:, :seen], scaling).flatten(0, 1))
            outs.append(out[0, s])
        errors[i] = relative_error(torch.stack(outs), torch.stack(exact))
        cache.reset()  # the next layer starts again, and layers share their lengths

    each_layer(model, ids, receive)
    return [errors[i] for i in sorted(errors)]


def real_error(name: str, tokens: int) -> dict[str, Any]:
    """:func:`layer_errors` of a calibrated model under the default config, as plain data for JSON.

    Raises:
        CheckFailedError: when a layer is above the limit.
        ValueError, OSError, ModuleNotFoundError: when the model or the text is missing.
    """
    model, tokenizer = load(name, None, torch.float32)
    ids = token_rows(tokenizer, find_text("bundled", "report"), 1, tokens)
    quantize_(model, headq_config(calibration=calibration_of(model, tokenizer)))
    errors = layer_errors(model, ids)
    layers = [codec.bits for codec in model._headq.codecs]
    bits = collections.Counter(f"k{k}v{v}" for layer in layers for k, v in zip(layer.k, layer.v, strict=True))
    worst = max(range(len(errors)), key=errors.__getitem__)
    check("packed attention", torch.tensor([1 + errors[worst]]), torch.ones(1), LIMIT, f"layer {worst} of {name}")
    return {
        "model": name, "tokens": tokens, "queries": NEW, "layers": errors, "mean": sum(errors) / len(errors),
        "max": errors[worst], "head_bits": dict(bits), "bits": ", ".join(f"{n} {b}" for b, n in bits.most_common()),
    }  # fmt: skip
