"""Teacher-forced scoring through a cache, against the same model with an exact one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import HeadQCache
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.integrations.transformers.models import with_cache

QUANTILES = (0.5, 0.999)
POSITION_BIN = 64  # positions that one entry of kl_by_position covers at least


@dataclass
class Score:
    """What one cache setting scored.

    Args:
        perplexity: ``exp(mean NLL)`` over the scored targets.
        exact_perplexity: the same with an exact cache.
        ppl_ratio: ``exp(mean ΔNLL)``.
        perplexity_sem, exact_perplexity_sem, ppl_ratio_sem: their standard errors over rows (delta method); None with
            one row.
        mean_kl: mean over positions of ``KL(exact ‖ cached)`` of the next-token distribution, in nats.
        mean_kl_sem: its standard error over rows; None with one row.
        kl_by_row: one mean per row.
        kl_by_position: mean over rows per chunk, of 64 positions at least: ``{"start", "stop", "kl"}``, in positions
            of the row.
        kl_quantiles: of the KL of single positions, by quantile: ``"0.5"`` and ``"0.999"``.
        flips: share of positions where the most likely next token differs.
        packed_fraction: packed over all rows that the scored queries read.
        report: the cache's bits at the end of the last row.
        tokens: scored positions.
    """

    perplexity: float
    perplexity_sem: float | None
    exact_perplexity: float
    exact_perplexity_sem: float | None
    ppl_ratio: float
    ppl_ratio_sem: float | None
    mean_kl: float
    mean_kl_sem: float | None
    kl_by_row: list[float]
    kl_by_position: list[dict[str, float]]
    flips: float
    packed_fraction: float
    report: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    kl_quantiles: dict[str, float] = field(default_factory=dict)

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
    batch_size: int = 1,
    make_cache: Callable[[], Any] | None = None,
    progress: bool = True,
    label: str = "cached",
) -> Score:
    """Score ``rows [N, T]`` through a cache: prefill ``prefill`` tokens, then chunks of ``chunk``.

    Perplexity is over targets ``prefill … T−1``, KL over positions ``prefill … T−1``; what a chunk attends to has been
    read from the cache. The run fails when no packed token was read.

    Args:
        model: with HeadQ (:func:`headq_ao.quantize_`), or as it is together with ``make_cache``.
        rows: token ids, CPU.
        exact: :func:`exact_logprobs` of the unquantized model on the same rows.
        batch_size: rows that go through the model together, each with its own rows in the cache.
        make_cache: builds the cache of each batch; None: a :class:`HeadQCache`. A cache that has no ``rows_read`` is
            taken for an exact one.
        label: of the progress bar.

    Raises:
        NothingPackedError: when nothing was read from packed tokens: the score would be that of the exact cache.
    """
    n, length = rows.shape
    if not 0 < prefill < length:
        raise ValueError(f"prefill must lie between 1 and the row length {length} − 1, got {prefill}")
    for name, value in (("chunk", chunk), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sums = _Sums(n, prefill, length)
    bar = tqdm(total=n * (length - prefill), desc=label, unit="tok", disable=not progress)
    packable = False
    for first in range(0, n, batch_size):
        cache = HeadQCache(model) if make_cache is None else make_cache()
        packable = packable or hasattr(cache, "rows_read")
        batch = slice(first, min(first + batch_size, n))
        ids = rows[batch].to(model.device)
        logits = model(ids[:, :prefill], **with_cache(cache), logits_to_keep=1).logits
        sums.add(batch, prefill - 1, logits, rows, exact)
        before = getattr(cache, "rows_read", (0, 0))
        for start in range(prefill, length, chunk):
            logits = model(ids[:, start : start + chunk], **with_cache(cache)).logits
            sums.add(batch, start, logits, rows, exact)
            bar.update(logits.shape[0] * logits.shape[1])
        sums.count(before, cache)
    bar.close()
    if packable and sums.packed == 0:
        raise NothingPackedError(
            f"no packed token was read in {n} rows of {length} tokens: this would score the exact cache; "
            "use longer rows or a smaller residual_length or warmup_tokens"
        )
    return sums.score(chunk)


class _Sums:
    """Per row and position: negative log-likelihoods, KL and flips; and the counts of the caches."""

    def __init__(self, n: int, prefill: int, length: int) -> None:
        self.prefill = prefill
        self.nll, self.exact_nll, self.kl, self.flips = (torch.zeros(n, length - prefill) for _ in range(4))
        self.packed = self.read = 0
        self.report: dict[str, Any] = {}

    def add(self, batch: slice, start: int, logits: Tensor, rows: Tensor, exact: Sequence[Tensor]) -> None:
        """Logits ``[b, s, vocab]`` of positions ``start …`` of the rows ``batch``."""
        length = rows.shape[1]
        for b, row_logits in zip(range(batch.start, batch.stop), logits, strict=True):
            logprobs = torch.log_softmax(row_logits.float(), -1).cpu()
            stop, at = start + len(logprobs), start - self.prefill
            reference = exact[b][at + 1 : at + 1 + len(logprobs)]
            targets = rows[b, start + 1 : stop + 1, None]
            scored = slice(at + 1, at + 1 + len(targets))
            self.nll[b, scored] = -logprobs[: len(targets)].gather(1, targets)[:, 0]
            self.exact_nll[b, scored] = -reference[: len(targets)].gather(1, targets)[:, 0]
            if start < self.prefill:
                continue
            here = slice(at, min(stop, length) - self.prefill)
            self.kl[b, here] = (reference.exp() * (reference - logprobs)).sum(-1)
            self.flips[b, here] = (reference.argmax(-1) != logprobs.argmax(-1)).float()

    def count(self, before: tuple[int, int], cache: Any) -> None:
        """What a cache has read since ``before``, and what it holds."""
        if hasattr(cache, "rows_read"):
            packed, read = cache.rows_read
            self.packed, self.read = self.packed + packed - before[0], self.read + read - before[1]
            self.report = cache.bits_report().to_dict()

    def score(self, chunk: int) -> Score:
        """The means and their standard errors."""
        nll, exact_nll, kl = self.nll.mean(1), self.exact_nll.mean(1), self.kl.mean(1)
        delta = nll - exact_nll
        perplexity, exact_perplexity, ratio = (x.mean().exp().item() for x in (nll, exact_nll, delta))
        step = max(chunk, POSITION_BIN)
        positions = [
            {
                "start": self.prefill + i * step,
                "stop": self.prefill + i * step + part.shape[1],
                "kl": part.mean().item(),
            }
            for i, part in enumerate(self.kl.split(step, 1))
        ]
        return Score(
            perplexity=perplexity,
            perplexity_sem=_sem(nll, perplexity),
            exact_perplexity=exact_perplexity,
            exact_perplexity_sem=_sem(exact_nll, exact_perplexity),
            ppl_ratio=ratio,
            ppl_ratio_sem=_sem(delta, ratio),
            mean_kl=kl.mean().item(),
            mean_kl_sem=_sem(kl),
            kl_by_row=kl.tolist(),
            kl_by_position=positions,
            flips=self.flips.mean().item(),
            packed_fraction=self.packed / self.read if self.read else 0.0,
            report=self.report,
            tokens=self.kl.numel(),
            kl_quantiles={str(q): float(np.quantile(self.kl.numpy(), q)) for q in QUANTILES},
        )


def _sem(x: Tensor, factor: float = 1.0) -> float | None:
    """``factor`` times the standard error of the mean; None with one row."""
    return factor * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else None
