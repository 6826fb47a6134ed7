"""Teacher-forced scoring through a cache, against the same model with an exact one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import HeadQCache


class NothingPackedError(RuntimeError):
    """No packed row was read: the score would be that of the exact cache."""


@dataclass
class Score:
    """What one cache setting scored.

    Args:
        perplexity: ``exp(mean NLL)`` over the scored targets.
        exact_perplexity: the same with an exact cache.
        ppl_ratio: ``exp(mean ΔNLL)``.
        ppl_ratio_sem: its standard error over rows (delta method); None with one row.
        mean_kl: mean over positions of ``KL(exact ‖ cached)`` of the next-token distribution, in nats.
        mean_kl_sem: its standard error over rows; None with one row.
        kl_by_row: one mean per row.
        flips: share of positions where the most likely next token differs.
        packed_fraction: packed over all rows that the scored queries read.
        report: the cache's bits at the end of the last row.
        tokens: scored positions.
    """

    perplexity: float
    exact_perplexity: float
    ppl_ratio: float
    ppl_ratio_sem: float | None
    mean_kl: float
    mean_kl_sem: float | None
    kl_by_row: list[float]
    flips: float
    packed_fraction: float
    report: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def exact_logprobs(model: Any, rows: Tensor, prefill: int, progress: bool = True) -> list[Tensor]:
    """Next-token log-probabilities of the dense model: per row ``[T − prefill + 1, vocab]``, from ``prefill − 1``."""
    out = []
    for row in tqdm(rows, desc="exact", unit="row", disable=not progress):
        logits = model(row[None].to(model.device), use_cache=False, logits_to_keep=len(row) - prefill + 1).logits[0]
        out.append(torch.log_softmax(logits.float(), -1).cpu())
    return out


@torch.no_grad()
def score(
    model: Any,
    rows: Tensor,
    exact: Sequence[Tensor],
    *,
    prefill: int = 256,
    chunk: int = 64,
    make_cache: Callable[[], Any] | None = None,
    progress: bool = True,
    label: str = "cached",
) -> Score:
    """Score ``rows [N, T]`` through a cache: prefill ``prefill`` tokens, then chunks of ``chunk``.

    Perplexity is over targets ``prefill … T−1``, KL over positions ``prefill … T−1``; what a chunk attends to has been
    read from the cache. With a HeadQ cache the run fails when no packed row was read.

    Args:
        model: with HeadQ (:func:`headq_ao.quantize_`), or as it is together with ``make_cache``.
        rows: token ids, CPU.
        exact: :func:`exact_logprobs` of the unquantized model on the same rows.
        make_cache: builds each row's cache; None: a :class:`HeadQCache`.
        label: of the progress bar.

    Raises:
        NothingPackedError: when nothing was read from packed rows: the score would be that of the exact cache.
    """
    n, length = rows.shape
    if not 0 < prefill < length:
        raise ValueError(f"prefill must lie between 1 and the row length {length} − 1, got {prefill}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    nll, exact_nll, kl, flips = [], [], [], []
    packed, read, report = 0, 0, {}
    bar = tqdm(total=n * (length - prefill), desc=label, unit="tok", disable=not progress)
    for row, reference in zip(rows, exact, strict=True):
        cache = HeadQCache(model) if make_cache is None else make_cache()
        ids = row[None].to(model.device)
        logits = [model(ids[:, :prefill], cache=cache, logits_to_keep=1).logits[0]]
        before = cache.rows_read if isinstance(cache, HeadQCache) else (0, 0)
        for start in range(prefill, length, chunk):
            logits.append(model(ids[:, start : start + chunk], cache=cache).logits[0])
            bar.update(logits[-1].shape[0])
        if isinstance(cache, HeadQCache):
            packed, read = packed + cache.rows_read[0] - before[0], read + cache.rows_read[1] - before[1]
            report = cache.bits_report().to_dict()
        logprobs = torch.log_softmax(torch.cat(logits).float(), -1).cpu()
        targets = row[prefill:, None]
        nll.append(-logprobs[:-1].gather(1, targets).mean().item())
        exact_nll.append(-reference[:-1].gather(1, targets).mean().item())
        kl.append((reference[1:].exp() * (reference[1:] - logprobs[1:])).sum(-1).mean().item())
        flips.append((reference[1:].argmax(-1) != logprobs[1:].argmax(-1)).float().mean().item())
    bar.close()
    if make_cache is None and packed == 0:
        raise NothingPackedError(
            f"no packed row was read in {n} rows of {length} tokens: this would score the exact cache; "
            "use longer rows or a smaller residual_length or epoch_tokens"
        )
    delta = torch.tensor(nll) - torch.tensor(exact_nll)
    ratio = delta.mean().exp().item()
    sem = (lambda x: x.std().item() / math.sqrt(n)) if n > 1 else (lambda x: None)
    delta_sem = sem(delta)
    return Score(
        perplexity=math.exp(sum(nll) / n),
        exact_perplexity=math.exp(sum(exact_nll) / n),
        ppl_ratio=ratio,
        ppl_ratio_sem=None if delta_sem is None else ratio * delta_sem,
        mean_kl=sum(kl) / n,
        mean_kl_sem=sem(torch.tensor(kl)),
        kl_by_row=kl,
        flips=sum(flips) / n,
        packed_fraction=packed / read if read else 0.0,
        report=report,
        tokens=n * (length - prefill),
    )
