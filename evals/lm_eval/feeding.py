"""Feeding requests through one cache: contexts once, then what is scored, chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from headq_ao.evals.harness.inputs import call_spans
from headq_ao.evals.lm_eval.arguments import Settings
from headq_ao.evals.lm_eval.reads import TaskReads, rows_read
from headq_ao.integrations.transformers.cache import HeadQCache
from headq_ao.integrations.transformers.model_state import HeadQState
from headq_ao.integrations.transformers.models import with_cache

PAD = 0  # any id will do: padding is masked, and holds no place in the cache


@dataclass(frozen=True)
class Request:
    """A continuation to score after a context; both hold at least one token id."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """Sum of the log-probabilities of a continuation in nats, and whether each token was the most likely one."""

    logprob: float
    greedy: bool


class Stream:
    """Rows of a batch on their way through a model and one cache, some slots of each call may be padding."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache = new_cache(model)
        self.real: Tensor | None = None  # [R, slots so far] bool

    def feed(self, ids: Tensor, real: Tensor, **options: Any) -> Tensor:
        """Logits ``[R, S, vocab]`` of one call on ``ids [R, S]``; ``real [R, S]`` is False on padding."""
        self.real = real if self.real is None else torch.cat([self.real, real], 1)
        position = (self.real.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        mask = self.real.long()
        out = self.model(ids, attention_mask=mask, position_ids=position, **with_cache(self.cache), **options)
        logits: Tensor = out.logits
        return logits

    def feed_context(self, ids: Tensor, real: Tensor, settings: Settings) -> None:
        """The first ``settings.prefill`` slots of ``ids [R, S]`` at once, the rest in chunks; no logits are kept."""
        first = ids.shape[1] if settings.prefill is None else min(settings.prefill, ids.shape[1])
        for begin, end in call_spans(first, ids.shape[1], settings.chunk_size):
            self.feed(ids[:, begin:end], real[:, begin:end], logits_to_keep=1)

    def expand(self, rows: Sequence[int]) -> None:
        """Go on with those rows; a row may be named more than once."""
        if self.real is not None and list(rows) != list(range(len(self.real))):
            index = torch.tensor(rows, device=self.real.device)
            self.cache.batch_select_indices(index)
            self.real = self.real[index]


def new_cache(model: Any) -> Any:
    """A packed cache for a model with HeadQ, transformers' exact one for any other."""
    packed = isinstance(getattr(model, "_headq", None), HeadQState)
    return HeadQCache(model) if packed else DynamicCache(config=model.config)


def chunked_context(context_tokens: int, settings: Settings) -> int:
    """Tokens of a context that go in by chunks. Only requests that agree in it share a batch, unpadded there: what a
    call holds of a request, and so what it reads, then never depends on its neighbours."""
    return 0 if settings.prefill is None else max(context_tokens - 1 - settings.prefill, 0)


def padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[R, S]`` and which of them are real; S is the longest row."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.tensor(row, dtype=torch.long)
        real[i, at] = True
    return ids.to(device), real.to(device)


@torch.no_grad()
def score(
    model: Any,
    requests: Sequence[Request],
    settings: Settings,
    reads: TaskReads,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> list[Answer]:
    """Score requests that agree in :func:`chunked_context` as one batch, each by queries that read the cache.

    The contexts, each once, go in without their last token and padded on the left; the rows are then repeated for the
    requests, which go in padded on the right and ``settings.chunk_size`` tokens at a time:
    ``log p(cont_t | context, cont_<t)`` is read off the call that holds ``cont_{t−1}``.

    Args:
        model: with HeadQ (:func:`headq_ao.quantize_`), or as it is.
        reads: counts what the scored queries have read.
        dtype: of the softmax; float32 or the model's, whichever is finer, when None.
        progress: called with the number of tokens scored by each call.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from headq_ao import headq_config, quantize_
        >>> from headq_ao.evals.lm_eval.arguments import Settings
        >>> from headq_ao.evals.lm_eval.feeding import Request, score
        >>> from headq_ao.evals.lm_eval.reads import TaskReads
        >>> model = LlamaForCausalLM(
        ...     LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
        ... ).eval()
        >>> config = headq_config(warmup_tokens=32)
        >>> quantize_(model, config)
        >>> reads, context = TaskReads(), tuple(i % 64 for i in range(200))
        >>> answers = score(model, [Request(context, (3,)), Request(context, (4, 5))], Settings(config), reads)
        >>> len(answers), reads.packed_fraction > 0.4
        (2, True)
    """
    contexts = list(dict.fromkeys(request.context for request in requests))
    stream = Stream(model)
    if any(len(context) > 1 for context in contexts):
        stream.feed_context(*padded([context[:-1] for context in contexts], "left", model.device), settings)
        number = {context: i for i, context in enumerate(contexts)}
        stream.expand([number[request.context] for request in requests])
    before = rows_read(stream.cache)
    targets, real = padded([request.continuation for request in requests], "right", model.device)
    ids = torch.cat([targets.new_tensor([[request.context[-1]] for request in requests]), targets[:, :-1]], 1)
    logprobs, greedy = [], []
    for begin, end in call_spans(0, targets.shape[1], settings.chunk_size):
        at = slice(begin, end)
        logits = stream.feed(ids[:, at], real[:, at])
        logits = logits.to(dtype or torch.promote_types(logits.dtype, torch.float32))
        chosen = logits.gather(2, targets[:, at, None])[..., 0]
        logprobs.append(chosen - logits.logsumexp(2))
        greedy.append(logits.argmax(2) == targets[:, at])
        progress(int(real[:, at].sum()))
    reads.add(stream.cache, before)
    sums = torch.where(real, torch.cat(logprobs, 1), 0).sum(1).tolist()
    return [Answer(*pair) for pair in zip(sums, (torch.cat(greedy, 1) | ~real).all(1).tolist(), strict=True)]
