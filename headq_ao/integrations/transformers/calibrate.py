"""``calibrate``: run a model over text and keep moments of what its attention reads."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from headq_ao.calibration.artifact import Calibration
from headq_ao.calibration.bit_allocation import WHOLE
from headq_ao.calibration.gradients import GradientRecorder
from headq_ao.calibration.observers import RECORDER, Frames, Profiler, Recorder
from headq_ao.calibration.rope import rotation_of
from headq_ao.calibration.text import (
    PROFILED_TOKENS,
    SURPRISE,
    counted_tokens,
    effective_tokens,
    joined_rows,
    profiled_row,
    read_batches,
    surprises,
)
from headq_ao.integrations.config_only.shapes import layer_shapes, shared_places
from headq_ao.integrations.transformers import latent
from headq_ao.integrations.transformers.fallback import recording_cache
from headq_ao.integrations.transformers.models import (
    CACHE_NAME,
    execution_device,
    fingerprint,
    positions,
    rotary_embedding,
    tensor_parallel,
)
from headq_ao.integrations.transformers.own_config import OwnConfigs
from headq_ao.integrations.transformers.serving import Serving, serving_of
from headq_ao.ops.types import SegmentFrame
from headq_ao.statistics.moments import LayerMoments, segment_tokens
from headq_ao.user_warning import warn

CONTEXT_LENGTH = 4096
GRADIENT_TOKENS = 4096  # at most, of which gradients are taken
Readers = Literal["all", "own"]


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    token_batches: Any,
    *,
    attention_mask: Any = None,
    context_length: int | None = None,
    n_rows: int = 512,
    n_sink: int = 4,
    seed: int = 0,
    progress: bool = True,
    source: str | None = None,
    readers: Readers = "all",
    gradients: bool = True,
) -> Calibration:
    """Collect the statistics that HeadQ derives its bases from.

    Per layer and KV head: ``Σ q qᵀ`` over the query heads that read it, ``Σ k``, ``Σ k kᵀ``, ``Σ v``, ``Σ v vᵀ`` after
    QK-norm and RoPE, the same weighted by what attention sees of each row (:mod:`headq_ao.statistics.importance`), and
    a uniform sample of ``n_rows`` keys. Then a backward pass over up to 4096 of the tokens gives the Fisher information
    of keys and values (:mod:`headq_ao.statistics.fisher`): what their errors cost the model's predictions, and so the
    metric that codes are chosen in. Last, one sequence shows what coded keys and values change in each layer's output,
    for ``mean_bits``; rows that are all short are joined for that, and short ones for the backward pass. The model is
    left as it was.

    Rotary embeddings turn keys and queries with their position, though attention sees differences of positions only:
    a basis made at positions below 1024 fits badly at 4096. So keys are taken into the frame of their segment
    (:class:`headq_ao.ops.types.SegmentFrame`), and each query into the frames of the segments that it reads, by how
    much it reads of them: the statistics then hold at any position. Where it cannot be told how a layer's embedding
    turns its keys, the sequences are put at starts that are spread evenly over a context instead.

    Padding is left out of everything: each row runs from its first token on. Runs of more than 8 equal tokens at the
    ends of a row count as padding where no mask tells. A token that came 8 times already in the same context is left
    out of the statistics. What remains is counted as effective tokens (:attr:`Calibration.effective_tokens`), by which
    the statistics are shrunk where they are few. Tokens of rows that are no text to the model, as random ids, are taken
    off that number: they surprise it by over 3 nats a token more than it expects. This function warns where fewer than
    8·head_dim (at most 768) are left: :func:`headq_ao.quantize_` does not use such a calibration, and says so.

    Args:
        model: a supported causal LM, quantized with HeadQ or not.
        token_batches: token ids, each ``[T]`` or ``[B, T]`` (tensor, array or nested list, whose rows may be of several
            lengths), or what a tokenizer returns (a ``BatchEncoding``, or a dict with ``input_ids`` and perhaps
            ``attention_mask``); or one such. About 4·1024 tokens are enough for the moments of a head_dim of 64.
        attention_mask: a mask for each batch, shaped as it is: 1 for tokens, 0 for padding at the ends of a row. None:
            no padding, but for what batches say themselves.
        context_length: tokens of the contexts to serve; ``None``: 4096, or the model's positions where they are fewer.
            It is not looked at where keys are in the frame of their segment, nor without rotary embeddings: sequences
            then start at 0.
        n_rows: keys kept per layer.
        n_sink: first tokens of each sequence to leave out.
        seed: of the sample.
        progress: show a progress bar.
        source: where the text is from, kept in ``meta``.
        readers: where layers read the keys and values of another (Gemma 3n, Gemma 4), whose queries the bases are
            derived from: of ``"all"`` that read them or, as a control, of its ``"own"`` layer alone.
        gradients: take the backward pass: about four times the time of the forward pass and the memory of training on
            1024 tokens without gradients of weights. Without it, and where a model has none (offloaded weights,
            quantized ones without a backward, no logits, which a warning names; latents; a cache that is dequantized),
            errors of keys are judged by the scores, those of values by the attention output.

    Returns:
        A :class:`Calibration` on the CPU.

    Raises:
        ValueError: on an unsupported model, no tokens, sequences no longer than ``n_sink``, ids or masks of another
            form, or a context that is longer than the model's positions.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import calibrate
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> calibrate(model, [torch.randint(64, (300,))], progress=False).layers[0].tokens
        296
    """
    serving = serving_of(model)
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for name, value, least in (("n_rows", n_rows, 1), ("n_sink", n_sink, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if readers not in get_args(Readers):
        raise ValueError(f"readers must be one of {', '.join(map(repr, get_args(Readers)))}, got {readers!r}")
    batches = read_batches(token_batches, attention_mask, n_sink, vocabulary)
    rows = [row for batch in batches for row in batch]
    counted = counted_tokens(rows, n_sink)
    own_attention = serving.fallback is not None
    frames = [] if own_attention else layer_frames(model, serving)
    context, starts = spread_starts(model, list(map(len, rows)), context_length, any(f is not None for f in frames))
    sharing = {} if own_attention else shared_places(model.config)
    pooled = readers == "all"
    recorder = Recorder(len(serving.shapes), n_rows, n_sink, seed, serving.places, frames or None, sharing, pooled)
    configs, training = OwnConfigs(model), [m for m in model.modules() if m.training]
    token = RECORDER.set(recorder)
    try:
        model.eval()
        device = execution_device(model)
        if not own_attention:
            model.set_attn_implementation("headq")
            latent.put_on(serving.modules)
        at, surprise = 0, list[float]()
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=not progress):
            here = slice(at, at := at + len(batch))
            recorder.begin(torch.stack(counted[here]))
            own = starts[here]
            slots = torch.arange(batch.shape[1], device=own.device)
            given: dict[str, Any] = {}
            if bool(own.any()):
                given["position_ids"] = (own[:, None] + slots).to(device)
            if own_attention:
                given[CACHE_NAME] = recording_cache(model, serving.places, serving.tilings, recorder)
            out = model(input_ids=batch.to(device), use_cache=own_attention, **given)
            if isinstance(getattr(out, "logits", None), Tensor):
                surprise += surprises(out.logits, batch, torch.stack(counted[here]))
        text = [nats <= SURPRISE for nats in surprise or [0.0] * len(rows)]
        effective = effective_tokens(itertools.compress(rows, text), itertools.compress(counted, text), n_sink)
        effective -= min(
            effective, sum(int(c[n_sink:].sum()) for c, good in zip(counted, text, strict=True) if not good)
        )
        moments = [dataclasses.replace(layer.moments(), effective=effective) for layer in recorder.layers]
        if gradients and not own_attention and not any(map(latent.is_latent, serving.modules)):
            only = sharing if pooled else {}
            moments = with_gradients(
                model, serving, moments, rows, counted, starts, frames, only, n_sink, seed, progress
            )
        profiled, counts = profiled_row(rows, counted)
        if len(profiled) >= n_sink + WHOLE and not own_attention:
            with tqdm(total=len(moments), desc="sensitivity", unit="layer", disable=not progress) as bar:
                readouts = [latent.readout(m) if latent.is_latent(m) else None for m in serving.modules]
                RECORDER.set(Profiler(moments, n_sink, counts, serving.places, frames, bar.update, sharing, readouts))
                model(input_ids=profiled[None].to(device), use_cache=False)
    finally:
        RECORDER.reset(token)
        if not hasattr(model, "_headq"):
            latent.take_off(serving.modules)
        configs.put_back(model)
        for module in training:
            module.training = True
    meta = {
        "tokens": sum(map(len, rows)),
        "effective_tokens": effective,
        "context_length": context,
        "gradients": all(layer.loss is not None for layer in moments),
        "source": source,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    layers = [gathered(model, layer) for layer in moments]
    made = Calibration(layers, fingerprint(model, serving.shapes), meta)
    if not made.suffices:
        noise = f" ({text.count(False)} of {len(text)} rows are no text to this model)" if not all(text) else ""
        warn(f"HeadQ: {made.shortage()}; quantize_ will not use it{noise}")
    return made


def with_gradients(
    model: PreTrainedModel, serving: Serving, moments: list[LayerMoments], rows: Sequence[Tensor],
    counted: Sequence[Tensor], starts: Tensor, frames: Frames, sharing: dict[int, int], n_sink: int, seed: int,
    progress: bool,
) -> list[LayerMoments]:  # fmt: skip
    """The moments with the Fisher information of keys and values, of at most :data:`GRADIENT_TOKENS` tokens; as they
    are, and a warning, where the model has no gradients."""
    recorder, device = GradientRecorder(moments, n_sink, seed, serving.places, frames, sharing), execution_device(model)
    # in the frame of segments a piece is like any other; without rotary embeddings sequences start at 0
    onward = rotary_embedding(model) is not None and not any(frame is not None for frame in frames)
    pieces = [
        (row[at : at + PROFILED_TOKENS], counts[at : at + PROFILED_TOKENS], start + onward * at)
        for row, counts, start in joined_rows(rows, counted, starts, n_sink, min(PROFILED_TOKENS, positions(model)))
        for at in range(0, len(row), PROFILED_TOKENS)
        if min(len(row) - at, PROFILED_TOKENS) >= n_sink + WHOLE
    ]
    ends = itertools.accumulate(len(piece) for piece, *_ in pieces)
    pieces = [piece for piece, end in zip(pieces, ends, strict=True) if end <= GRADIENT_TOKENS]
    RECORDER.set(recorder)
    try:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise RuntimeError("some of its weights are offloaded")
        for piece, counts, start in tqdm(pieces, desc="gradients", unit="row", disable=not progress):
            at = torch.arange(start, start + len(piece), device=device)[None] if start else None
            recorder.run(model, piece.to(device), counts, **({} if at is None else {"position_ids": at}))
    except Exception as error:  # whatever a model's own backward raises: the rest of the calibration holds
        reason = (str(error) or type(error).__name__).splitlines()[0]  # a bare NotImplementedError says nothing
        warn(
            f"HeadQ: no gradients of this model ({reason}); errors of keys are judged by the "
            "scores and those of values by the attention output, which is some per cent worse at equal bits; "
            "with gradients=False this warning is not given"
        )
        return moments
    return recorder.measured()


def layer_frames(model: PreTrainedModel, serving: Serving) -> list[SegmentFrame | None]:
    """The frame that the keys of each layer are coded in; None where they do not turn, or it is not known how."""
    embedding, most, found = rotary_embedding(model), positions(model), list[SegmentFrame | None]()
    for module, shape in zip(serving.modules, serving.shapes, strict=True):
        rotation = rotation_of(embedding, module, shape) if shape.latent is None else None
        found.append(None if rotation is None else rotation.frame(segment_tokens(most), most, execution_device(module)))
    return found


def spread_starts(
    model: PreTrainedModel, lengths: list[int], context_length: int | None, framed: bool = False
) -> tuple[int, Tensor]:
    """The context to cover, and the first position of each sequence: evenly from 0 to where it ends with the context;
    with a segment where keys are ``framed``, whose statistics are the same in all of them: short sequences stand
    everywhere in one.

    Raises:
        ValueError: when the context is not a whole number of at least 1, or more than the model's positions.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context_length is None:
        context_length = CONTEXT_LENGTH if most is None else min(CONTEXT_LENGTH, most)
    whole = isinstance(context_length, int) and not isinstance(context_length, bool)
    if not whole or context_length < 1 or (most is not None and context_length > most):
        limit = "" if most is None else f" and at most {most}, the model's positions"
        raise ValueError(f"context_length must be a whole number of at least 1{limit}, got {context_length!r}")
    cover = min(context_length, segment_tokens(positions(model))) if framed else context_length
    room = [max(cover - n, 0) if rotary_embedding(model) is not None else 0 for n in lengths]
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
