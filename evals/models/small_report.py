"""How good a small model is: held-out perplexity against n-grams, use of context, sharpness of attention."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao.evals.harness.texts import token_rows

NEAR, FAR = 32, 512


def bigram_nll(train: Tensor, rows: Tensor, vocab: int) -> tuple[float, float]:
    """Mean NLL in nats of the tokens ``rows[:, 1:]`` under a unigram and a bigram model of ``train [N]``.

    Unigram: ``p(w) = (c(w) + 1) / (N + V)``. Bigram with Witten-Bell smoothing (IEEE Trans. Inf. Theory 37(4), 1991):
    ``p(w|v) = (c(vw) + t(v)·p(w)) / (c(v) + t(v))``, ``t(v)`` the number of distinct followers of v.

    Example:
        >>> import torch
        >>> from headq_ao.evals.models.small_report import bigram_nll
        >>> unigram, bigram = bigram_nll(torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([[0, 1, 0, 1]]), 2)
        >>> round(unigram, 4), round(bigram, 4)
        (0.6931, 0.1498)
    """
    counts = torch.bincount(train, minlength=vocab).double()
    unigram = (counts + 1) / (counts + 1).sum()
    pairs, times = (train[:-1] * vocab + train[1:]).unique(return_counts=True)
    followers = torch.bincount(pairs // vocab, minlength=vocab).double()
    starts = torch.bincount(train[:-1], minlength=vocab).double()
    before, after = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    wanted = before * vocab + after
    at = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[at] == wanted, times[at], 0).double()
    low, total = followers[before], starts[before] + followers[before]
    p = torch.where(total > 0, (seen + low * unigram[after]) / total.clamp(min=1), unigram[after])
    return -unigram[after].log().mean().item(), -p.log().mean().item()


@torch.no_grad()
def attention_entropy(model: Any, row: Tensor) -> tuple[float, float]:
    """Mean over layers, heads and queries of the entropy of attention over ``row [T]``, and that of uniform attention.

    ``H = −Σ_j a_j log a_j`` in nats; uniform causal attention has ``log(i + 1)`` at query i.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        weights = model(row[None], use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    entropy = torch.stack([torch.special.entr(a.float()).sum(-1).mean() for a in weights]).mean()
    return entropy.item(), torch.arange(1, len(row) + 1).log().mean().item()


@torch.no_grad()
def token_nll(model: Any, rows: Tensor, progress: bool) -> Tensor:
    """NLL ``[N, T−1]`` of each next token of ``rows [N, T]``, in nats."""
    out = []
    for row in tqdm(rows, desc="held-out text", unit="row", disable=not progress):
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        out.append(F.cross_entropy(logits, row[1:], reduction="none"))
    return torch.stack(out)


def report(
    model: Any, tokenizer: Any, path: Path, train: Tensor, rows: int, progress: bool = True
) -> dict[str, Any] | None:
    """Score a held-out text in up to ``rows`` whole rows of the model's context; None when it has not one row.

    Args:
        model: in eval mode.
        path: the held-out text.
        train: token ids of the training text, for the n-grams.

    Returns:
        ``perplexity`` per token and per word of the text, ``bits_per_byte``, ``unigram_perplexity`` and
        ``bigram_perplexity`` per token, ``nll_near``: mean NLL in nats of tokens with fewer than 32 before them,
        ``nll_far``: with at least 512, ``attention_entropy`` and ``uniform_entropy`` in nats.
    """
    length = model.config.max_position_embeddings
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    count = min(rows, len(ids) // length)
    if count == 0:
        return None
    scored = token_rows(tokenizer, path, count, length)
    nll = token_nll(model, scored, progress)
    texts = [tokenizer.decode(row[1:]) for row in scored]
    words, size = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
    unigram, bigram = bigram_nll(train, scored, model.config.vocab_size)
    entropy, uniform = attention_entropy(model, scored[0])
    return {
        "text_file": path.name,
        "rows": count,
        "row_length": length,
        "perplexity": math.exp(nll.mean().item()),
        "word_perplexity": math.exp(nll.sum().item() / words),
        "bits_per_byte": nll.sum().item() / math.log(2) / size,
        "unigram_perplexity": math.exp(unigram),
        "bigram_perplexity": math.exp(bigram),
        "nll_near": nll[:, : NEAR - 1].mean().item(),
        "nll_far": nll[:, FAR - 1 :].mean().item() if length > FAR else None,
        "attention_entropy": entropy,
        "uniform_entropy": uniform,
    }
