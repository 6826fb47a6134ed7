"""What scored queries have read, task by task."""

from dataclasses import dataclass
from typing import Any

from headq_ao.cache.memory_report import NothingPackedError

WARN_BELOW = 0.5  # packed share of the tokens read: less is mostly a score of the exact window


@dataclass
class TaskReads:
    """Counts of one task.

    Args:
        requests: requests answered by the model.
        filled: requests whose prompt was filled up with neutral text.
        packed, read: rows that queries read which predict a scored or generated token, packed ones and all, summed over
            layers.
        bits: the cache's :class:`headq_ao.cache.memory_report.BitsReport` at its longest, as plain data.
    """

    requests: int = 0
    filled: int = 0
    packed: int = 0
    read: int = 0
    bits: dict[str, Any] | None = None

    @property
    def packed_fraction(self) -> float:
        """Packed over all rows read, 0 before any."""
        return self.packed / self.read if self.read else 0.0

    def add(self, cache: Any, before: tuple[int, int]) -> None:
        """Count what a cache has read since ``before``; an exact cache counts nothing."""
        packed, read = rows_read(cache)
        self.packed, self.read = self.packed + packed - before[0], self.read + read - before[1]
        if hasattr(cache, "bits_report"):
            report = cache.bits_report().to_dict()
            if self.bits is None or report["packed_rows"] > self.bits["packed_rows"]:
                self.bits = report

    def merge(self, other: "TaskReads") -> None:
        """Count what another process, or an earlier call, has read."""
        for name in ("requests", "filled", "packed", "read"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.bits is not None and (self.bits is None or other.bits["packed_rows"] > self.bits["packed_rows"]):
            self.bits = other.bits

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        counts = {"packed_fraction": self.packed_fraction, "packed_rows_read": self.packed, "rows_read": self.read}
        return {"requests": self.requests, "requests_filled": self.filled, **counts, "bits": self.bits}


def rows_read(cache: Any) -> tuple[int, int]:
    """``cache.rows_read``, zeros where the cache does not count (an exact one)."""
    return getattr(cache, "rows_read", (0, 0))


def check_packed(tasks: dict[str, TaskReads]) -> list[str]:
    """One warning per task of which less than half of the tokens read were packed.

    Raises:
        NothingPackedError: when no task has read a packed token.

    Example:
        >>> from headq_ao.evals.lm_eval.reads import TaskReads, check_packed
        >>> check_packed({"long": TaskReads(requests=1, packed=8, read=10)})
        []
        >>> print(check_packed({"long": TaskReads(1, 0, 8, 10), "short": TaskReads(1, 0, 1, 10)})[0].split(",")[0])
        short: 10 % of the rows that scored queries read were packed
    """
    remedy = "use longer items, min_context=N, or a smaller window (residual_length=16,block_size=16,warmup_tokens=64)"
    if tasks and not any(task.packed for task in tasks.values()):
        raise NothingPackedError(
            f"no packed token was read in {', '.join(tasks)}: the scores would be those of the exact cache; {remedy}, "
            "or say quantized=false"
        )
    return [
        f"{name}: {100 * task.packed_fraction:.0f} % of the rows that scored queries read were packed, the rest exact "
        f"(sinks and newest tokens): its score is mostly that of the exact cache; {remedy}"
        for name, task in tasks.items()
        if task.packed_fraction < WARN_BELOW
    ]


def reads_table(tasks: dict[str, TaskReads]) -> str:
    """The counts as a Markdown table in lm-eval's manner."""
    header = ["Tasks", "requests", "filled up", "packed_fraction", "bits K / V"]
    lines = [header, ["---", "---:", "---:", "---:", "---:"]]
    for name, task in tasks.items():
        sides = [None if task.bits is None else task.bits[f"{side}_body_bits"] for side in ("key", "value")]
        bits = " / ".join("exact" if b is None else f"{b:.2f}" for b in sides)
        lines.append([name, str(task.requests), str(task.filled), f"{task.packed_fraction:.4f}", bits])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("|" + "|".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + "|" for line in lines)
