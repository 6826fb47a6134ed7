"""What ``calibrate`` is given: rows of token ids without their padding, and which of their tokens say something new."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PROFILED_TOKENS = 1024
JOINED_BELOW = 256  # tokens of the longest row, with which rows are profiled as one
CONTEXT = 4  # a token and the three before it: what it is taken to be
REPEATS = 8  # a token in the same context counts at most that often; more of it adds nothing
SURPRISE = 3.0  # nats per token beyond what a model expects of itself; text has 0 to 1, shuffled words 2, random ids 6
VARIETY = 64  # at most that many effective tokens for each effectively different id


def read_batches(token_batches: Any, attention_mask: Any, n_sink: int, vocabulary: int | None) -> list[Tensor]:
    """The rows of every batch on the CPU without their padding, as ``[B, T]`` where they are equally long, else one by
    one. Long runs of one token at the ends count as padding, mask or not (:func:`without_end_runs`). Rows that are
    padded, or of several lengths, and hold nothing behind the first ``n_sink`` tokens are left out.

    Args:
        token_batches: see :func:`headq_ao.calibrate`.
        attention_mask: a mask for each batch, shaped as it is; None: no padding, but for what batches say themselves.
        n_sink: rows are longer.
        vocabulary: ids are below it, where known.

    Raises:
        ValueError: on anything else; the message names its type or shape.
    """
    batches = Batches(n_sink, vocabulary)
    if isinstance(token_batches, Mapping):
        token_batches, attention_mask = [token_batches], None if attention_mask is None else [attention_mask]
    if isinstance(token_batches, (str, bytes)) or not isinstance(token_batches, Iterable):
        raise batches.error(_told(token_batches))
    given = list(token_batches)
    one_row = isinstance(token_batches, Tensor) and token_batches.ndim == 1
    if given and (one_row or all(map(_is_number, given))):  # one row of ids
        given, attention_mask = [token_batches], None if attention_mask is None else [attention_mask]
    if attention_mask is None:
        masks = [None] * len(given)
    elif isinstance(attention_mask, (str, bytes, Mapping)) or not isinstance(attention_mask, Iterable):
        raise ValueError(f"attention_mask must hold a mask for each batch, got {_told(attention_mask)}")
    else:
        masks = list(attention_mask)
    if len(masks) != len(given):
        raise ValueError(f"attention_mask must hold a mask for each of {len(given)} batches, got {len(masks)}")
    found = [part for i, pair in enumerate(zip(given, masks, strict=True)) for part in batches.read(i, *pair)]
    if not found:
        raise batches.error("none" if not given else "rows of fewer")
    return found


class Batches:
    """How batches are read, and what is said of one that cannot be."""

    def __init__(self, n_sink: int, vocabulary: int | None) -> None:
        self.n_sink, self.vocabulary = n_sink, vocabulary

    def error(self, got: str) -> ValueError:
        """What must hold, what came, what to do."""
        return ValueError(
            f"token_batches must hold integer token ids [T] or [B, T] (tensors, arrays, nested lists, or what a "
            f"tokenizer returns: input_ids and attention_mask) with T > n_sink = {self.n_sink}, got {got}"
        )

    def read(self, number: int, batch: Any, mask: Any) -> list[Tensor]:
        """The rows of one batch, and its number in messages."""
        what = f"batch {number}"
        if isinstance(batch, Mapping):
            if "input_ids" not in batch:
                raise self.error(f"{what}: {_told(batch)} with {', '.join(map(repr, batch)) or 'nothing'}")
            if mask is not None and batch.get("attention_mask") is not None:
                raise ValueError(f"{what} brings an attention_mask of its own; give one of the two")
            batch, mask = batch["input_ids"], batch.get("attention_mask") if mask is None else mask
        rows = self._rows(batch, what)
        for row in rows:
            self._check_ids(row, what)
        if mask is not None:
            masks = self._rows(mask, f"the attention_mask of {what}")
            lengths = [list(map(len, x)) for x in (rows, masks)]
            if lengths[0] != lengths[1]:
                raise ValueError(
                    f"the attention_mask of {what} must be shaped as its ids, rows of {lengths[0][:4]}, "
                    f"got rows of {lengths[1][:4]}"
                )
            rows = [row[_real(m, what)] for row, m in zip(rows, masks, strict=True)]
        given = list(map(len, rows))
        rows = [without_end_runs(row.long()) for row in rows]
        if len(set(given)) > 1 or mask is not None or list(map(len, rows)) != given:
            rows = [row for row in rows if len(row) > self.n_sink]
        elif not rows or len(rows[0]) <= self.n_sink:
            raise self.error(f"{what}: {len(rows)} rows of {len(rows[0]) if rows else 0}")
        alike = len(set(map(len, rows))) == 1
        return [torch.stack(rows)] if alike else [row[None] for row in rows]

    def _rows(self, batch: Any, what: str) -> list[Tensor]:
        """The rows ``[T]`` of a tensor, an array or a nested list."""
        nested = isinstance(batch, (list, tuple)) and len(batch) > 0 and not any(map(_is_number, batch))
        parts = list(batch) if nested else [batch]
        rows: list[Tensor] = []
        for part in parts:
            try:
                found = part.detach().cpu() if isinstance(part, Tensor) else torch.as_tensor(part, device="cpu")
            except (TypeError, ValueError, RuntimeError) as error:
                raise self.error(f"{what}: {_told(part)}") from error
            if not 1 <= found.ndim <= 1 + (not nested):
                raise self.error(f"{what}: {_told(batch)} of shape {(len(parts),) * nested + tuple(found.shape)}")
            rows += list(found.view(-1, found.shape[-1])) if found.shape[-1] else [found]
        return rows

    def _check_ids(self, row: Tensor, what: str) -> None:
        """Raise ValueError where a row holds no ids of this vocabulary."""
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            if row.numel():
                raise self.error(f"{what}: {row.dtype}")
        elif row.numel():
            row = row.long()  # some dtypes of whole numbers have no minimum
            low, high = int(row.min()), int(row.max())
            if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
                limit = "" if self.vocabulary is None else f", of a vocabulary of {self.vocabulary}"
                raise self.error(f"{what}: ids from {low} to {high}{limit}")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0)


def _real(mask: Tensor, what: str) -> slice:
    """Where a row's tokens stand among its padding."""
    told = f"the attention_mask of {what} must be 1 for tokens and 0 for padding, at the ends of a row"
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{told}, got {mask.min().item()} to {mask.max().item()}")
    at = mask.nonzero().flatten()
    if len(at) and int(at[-1] - at[0]) + 1 != len(at):
        raise ValueError(f"{told}; it has holes")
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0)


def _told(x: Any) -> str:
    """What something is, for messages."""
    return f"a {type(x).__name__}"


def without_end_runs(row: Tensor) -> Tensor:
    """A row without a run of more than :data:`REPEATS` equal tokens at either end: padding that no mask tells.

    A row that is nothing but such a run stays: it is no padding, though it has little to say.

    Example:
        >>> import torch
        >>> from headq_ao.calibration.text import without_end_runs
        >>> without_end_runs(torch.tensor([*[0] * 20, 5, 6, 6, 7])).tolist()
        [5, 6, 6, 7]
    """
    changes = (row[1:] != row[:-1]).nonzero().flatten() + 1
    if not len(changes):
        return row
    first, last = int(changes[0]), int(changes[-1])
    return row[first if first > REPEATS else 0 : last if len(row) - last > REPEATS else len(row)]


def counted_tokens(rows: Iterable[Tensor], n_sink: int) -> list[Tensor]:
    """Which tokens of each row count, ``[T]`` bool: the first ``n_sink``, which statistics leave out in any case, and
    those whose context came fewer than :data:`REPEATS` times before.

    Padding that no mask tells, rows of one token and copies of a row hold many tokens and little to learn from.

    Example:
        >>> import torch
        >>> from headq_ao.calibration.text import counted_tokens
        >>> [int(c.sum()) for c in counted_tokens([torch.arange(20), torch.zeros(20, dtype=torch.long)], 4)]
        [20, 12]
    """
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for row in rows:
        counts = torch.ones(len(row), dtype=torch.bool, device="cpu")
        for i, context in enumerate(contexts(row)):
            if i >= n_sink:
                counts[i] = seen[context] < REPEATS
                seen[context] += 1
        found.append(counts)
    return found


def contexts(row: Tensor) -> Iterator[tuple[int, ...]]:
    """Each token of a row with up to three before it."""
    ids = row.tolist()
    return (tuple(ids[max(0, i + 1 - CONTEXT) : i + 1]) for i in range(len(ids)))


def effective_tokens(rows: Iterable[Tensor], counted: Iterable[Tensor], n_sink: int) -> int:
    """How many different tokens, each in its context, statistics rest on: those that count behind the first ``n_sink``.

    At most :data:`VARIETY` for each effectively different id: ``exp`` of the entropy of the ids that count.

    Example:
        >>> import torch
        >>> from headq_ao.calibration.text import counted_tokens, effective_tokens
        >>> rows = [torch.arange(100), torch.zeros(400, dtype=torch.long)]
        >>> effective_tokens(rows, counted_tokens(rows, 4), 4)
        97
    """
    different: set[tuple[int, ...]] = set()
    ids: Counter[int] = Counter()
    for row, counts in zip(rows, counted, strict=True):
        for context in itertools.compress(itertools.islice(contexts(row), n_sink, None), counts[n_sink:].tolist()):
            different.add(context)
            ids[context[-1]] += 1
    total = sum(ids.values())
    entropy = -sum(n / total * math.log(n / total) for n in ids.values())
    return min(len(different), int(VARIETY * math.exp(entropy)))


def surprises(logits: Tensor, ids: Tensor, counted: Tensor) -> list[float]:
    """How much more each row surprises a model than it expects to be: the mean over tokens that count of ``−log p`` of
    the token less the entropy of ``p``, in nats. Near 0 for text, and for a model that knows nothing; large for ids
    that are no text to a model that knows text.

    Args:
        logits: ``[B, T, V]``.
        ids: ``[B, T]``.
        counted: ``[B, T]``.

    Example:
        >>> import torch
        >>> from headq_ao.calibration.text import surprises
        >>> again = 9 * torch.eye(4)[None, [0, 0, 0, 0]]  # rather sure that token 0 comes
        >>> all_count = torch.ones(1, 4, dtype=torch.bool)
        >>> [round(surprises(again, torch.tensor([ids]), all_count)[0], 1) for ids in ([0, 0, 0, 0], [0, 1, 2, 3])]
        [-0.0, 9.0]
    """
    found = []
    for row, own, counts in zip(logits, ids.to(logits.device), counted.to(logits.device), strict=True):
        total, n = 0.0, int(counts[1:].sum())
        for at in range(0, len(own) - 1, 128):
            part, target = row[at : at + 128][: len(own) - 1 - at].float().log_softmax(-1), own[at + 1 : at + 129]
            entropy = -(part.exp() * part).nan_to_num(0.0).sum(-1)  # a token that cannot come has none
            beyond = -part.gather(1, target[:, None])[:, 0] - entropy
            total += float(beyond[counts[at + 1 : at + 129]].sum())
        found.append(total / max(n, 1))
    return found


def joined_rows(
    rows: Sequence[Tensor], counted: Sequence[Tensor], starts: Tensor, n_sink: int, most: int
) -> list[tuple[Tensor, Tensor, int]]:
    """Rows, which of their tokens count, and where they start; short ones, one after the other, as one of at most
    ``most`` tokens, in which the first ``n_sink`` of each do not count."""
    found: list[tuple[Tensor, Tensor, int]] = []
    joining = False
    for row, counts, start in zip(rows, counted, starts.tolist(), strict=True):
        short = len(row) < JOINED_BELOW
        if joining and short and len(found[-1][0]) + len(row) <= most:
            before, its_counts, _ = found.pop()
            counts = torch.cat([its_counts, counts.new_zeros(n_sink), counts[n_sink:]])
            found.append((torch.cat([before, row]), counts, 0))
        else:
            found.append((row, counts, start))
        joining = short
    return found


def profiled_row(rows: Sequence[Tensor], counted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The tokens ``[T]`` on which layers are profiled, and which of them count: the first row that has about as many
    that count as any, or all rows as one where they are short."""
    counts = [int(c[:PROFILED_TOKENS].sum()) for c in counted]
    best = next(i for i, n in enumerate(counts) if n >= 0.9 * max(counts))
    if counts[best] >= JOINED_BELOW:
        return rows[best][:PROFILED_TOKENS], counted[best][:PROFILED_TOKENS]
    return torch.cat(list(rows))[:PROFILED_TOKENS], torch.cat(list(counted))[:PROFILED_TOKENS]
