"""``calibrate``: run a model over text and keep moments of what its attention reads."""

import contextvars
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headq_ao.allocate import WHOLE, output_errors
from headq_ao.calibration import Calibration, LayerMoments, MomentAccumulator
from headq_ao.models import (
    execution_device,
    fingerprint,
    layer_shapes,
    rotary_embedding,
    tensor_parallel,
)
from headq_ao.own_config import OwnConfigs
from headq_ao.probe import supported_layers
from headq_ao.seen import seen_weights

CONTEXT_LENGTH = 4096
PROFILED_TOKENS = 1024
SEEN_EVERY = 4  # every fourth query serves for the weights that attention gives
RECORDER: contextvars.ContextVar["Recorder | Profiler | None"] = contextvars.ContextVar("headq_recorder", default=None)


class Recorder:
    """Collects what attention reads during one calibration; found through a context variable, so threads are apart."""

    def __init__(self, n_layers: int, n_rows: int, n_sink: int, seed: int) -> None:
        self.layers = [MomentAccumulator(n_rows) for _ in range(n_layers)]
        self.n_sink = n_sink
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.priority = torch.empty(0, dtype=torch.float32, device="cpu")

    def begin(self, batch: Tensor) -> None:
        """Draw the sampling priorities of a batch ``[B, T]``; all layers and heads keep the same tokens."""
        tokens = batch.shape[0] * max(batch.shape[1] - self.n_sink, 0)
        self.priority = torch.rand(tokens, generator=self.generator, dtype=torch.float32, device="cpu")

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> None:
        """Fold one layer's ``[B, H, T, D]`` states, sinks left out."""
        weights = seen_weights(q.float(), k.float(), scaling, n_sink=self.n_sink, window=window, every=SEEN_EVERY)
        q, k, v = (x[:, :, self.n_sink :].transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        rows = [SEEN_EVERY * w[:, :, self.n_sink :].transpose(1, 2).flatten(0, 1) for w in weights]
        for name, x in (("queries", q), ("keys", k), ("values", v)):
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"layer {layer}: calibration met non-finite {name}; run the model in float32 or bfloat16"
                )
        self.layers[layer].add(q, k, v, rows, self.priority)


class Profiler:
    """Measures what coded keys and values change in the output of every layer, on one sequence."""

    def __init__(self, moments: list[LayerMoments], n_sink: int) -> None:
        self.moments, self.n_sink = moments, n_sink

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> None:
        """Fold one layer's ``[1, H, T, D]`` states."""
        m = self.moments[layer]
        m.errors, m.energy = output_errors(
            m, q, k, v, scaling, n_sink=self.n_sink, window=window, every=SEEN_EVERY
        )  # fmt: skip


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    token_batches: Iterable[Any],
    *,
    context_length: int | None = None,
    n_rows: int = 512,
    n_sink: int = 4,
    seed: int = 0,
    progress: bool = True,
    source: str | None = None,
) -> Calibration:
    """Collect the statistics that HeadQ derives its bases from.

    Per layer and KV head: ``Σ q qᵀ`` over the query heads that read it, ``Σ k``, ``Σ k kᵀ``, ``Σ v``, ``Σ v vᵀ`` after
    QK-norm and RoPE, the same weighted by what attention sees of each row (:func:`headq_ao.seen.seen_weights`), and
    a uniform sample of ``n_rows`` keys. Then one sequence shows what coded keys and values change in each layer's
    output, for ``mean_bits``. The model is left as it was.

    Rotary embeddings turn keys and queries with their position, though attention sees differences of positions only:
    a basis made at positions below 1024 fits badly at 4096. So the sequences are put at starts that are spread evenly
    over a context.

    Args:
        model: a supported causal LM, quantized with HeadQ or not.
        token_batches: token ids, each ``[T]`` or ``[B, T]`` (tensor or nested list), without padding; about 4·1024
            tokens are enough for the moments of a head_dim of 64.
        context_length: tokens of the contexts to serve; ``None``: 4096, or the model's positions where they are fewer.
            Sequences as long, and all without rotary embeddings, start at 0.
        n_rows: keys kept per layer.
        n_sink: first tokens of each sequence to leave out.
        seed: of the sample.
        progress: show a progress bar.
        source: where the text is from, kept in ``meta``.

    Returns:
        A :class:`Calibration` on the CPU.

    Raises:
        ValueError: on an unsupported model, no tokens, sequences no longer than ``n_sink``, or a context that is longer
            than the model's positions.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import calibrate
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> calibrate(model, [torch.arange(60)], progress=False).layers[0].tokens
        56
    """
    shapes, _ = supported_layers(model)
    batches = [torch.as_tensor(b, device="cpu") for b in token_batches]
    batches = [b[None] if b.ndim == 1 else b for b in batches]
    if not batches or any(b.ndim != 2 or b.is_floating_point() or b.shape[1] <= n_sink for b in batches):
        raise ValueError(
            f"token_batches must hold integer token ids [T] or [B, T] with T > n_sink = {n_sink}, "
            f"got {[tuple(b.shape) for b in batches][:4]}"
        )
    context, starts = spread_starts(model, [b.shape[1] for b in batches for _ in b], context_length)
    recorder = Recorder(len(shapes), n_rows, n_sink, seed)
    configs, training = OwnConfigs(model), [m for m in model.modules() if m.training]
    token = RECORDER.set(recorder)
    try:
        model.eval()
        device = execution_device(model)
        model.set_attn_implementation("headq")
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=not progress):
            recorder.begin(batch)
            own, starts = starts[: len(batch)], starts[len(batch) :]
            at = torch.arange(batch.shape[1], device=own.device)
            positions = (own[:, None] + at).to(device) if bool(own.any()) else None
            model(input_ids=batch.to(device), position_ids=positions, use_cache=False)
        moments = [layer.moments() for layer in recorder.layers]
        longest = max(batches, key=lambda batch: batch.shape[1])[:1, :PROFILED_TOKENS]
        if longest.shape[1] >= n_sink + WHOLE:
            RECORDER.set(Profiler(moments, n_sink))
            model(input_ids=longest.to(device), use_cache=False)
    finally:
        RECORDER.reset(token)
        configs.put_back(model)
        for module in training:
            module.training = True
    meta = {
        "tokens": sum(b.numel() for b in batches),
        "context_length": context,
        "source": source,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    layers = [gathered(model, layer) for layer in moments]
    return Calibration(layers, fingerprint(model), meta)


def spread_starts(model: PreTrainedModel, lengths: list[int], context_length: int | None) -> tuple[int, Tensor]:
    """The context to cover, and the first position of each sequence: evenly from 0 to where it ends with the context.

    Raises:
        ValueError: when the context is not a whole number of at least 1, or more than the model's positions.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context_length is None:
        context_length = CONTEXT_LENGTH if most is None else min(CONTEXT_LENGTH, most)
    if not isinstance(context_length, int) or context_length < 1 or (most is not None and context_length > most):
        limit = "" if most is None else f" and at most {most}, the model's positions"
        raise ValueError(f"context_length must be a whole number of at least 1{limit}, got {context_length!r}")
    rotary = rotary_embedding(model) is not None
    room = [max(context_length - n, 0) if rotary else 0 for n in lengths]
    starts = [r * i // max(len(lengths) - 1, 1) for i, r in enumerate(room)]
    return context_length, torch.tensor(starts, dtype=torch.int64, device="cpu")


def gathered(model: PreTrainedModel, moments: LayerMoments) -> LayerMoments:
    """The moments of all KV heads, on a tensor-parallel model from all its ranks."""
    _, size = tensor_parallel(model)
    if size == 1 or moments.k_sum.shape[0] == layer_shapes(model.config)[0].n_kv_heads:
        return moments
    group, device = model._mesh_manager.get_mesh("tp").get_group(), execution_device(model)

    def gather(tensor: Tensor, dim: int) -> Tensor:
        parts = [torch.empty_like(tensor, device=device) for _ in range(size)]
        torch.distributed.all_gather(parts, tensor.contiguous().to(device), group=group)
        return torch.cat(parts, dim).cpu()

    whole: dict[str, Any] = {name: gather(x, int(name == "k_rows")) for name, x in moments.tensors().items()}
    return dataclasses.replace(moments, **whole)
