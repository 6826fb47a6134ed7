"""Numbers, options and sentences of the report, all from the results."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headq_ao.evals.harness.table import measured, number
from headq_ao.evals.report.choice import Choice, paired_ratio, told_apart
from headq_ao.evals.report.data import Group, Setting

MIB = 2**20
CALIBRATION_FILE = "calibration.safetensors"


def small(x: float, sem: float | None = None) -> str:
    """A KL with its standard error: four decimals, or two digits that count where those would be zeros.

    Example:
        >>> from headq_ao.evals.report.text import small
        >>> small(0.02627, 0.0088), small(0.0000312), small(0.0)
        ('0.0263 ± 0.0088', '0.000031', '0.0000')
    """
    digits = 4 if abs(x) >= 1e-3 or x == 0 else min(1 - math.floor(math.log10(abs(x))), 7)
    return measured(x, sem, digits)


def percent(x: float, digits: int = 1) -> str:
    return f"{100 * x:.{digits}f} %"


def size(n: float) -> str:
    """Bytes in MiB, to three digits or whole."""
    mib = n / MIB
    return f"{mib:,.{0 if mib >= 100 else 1 if mib >= 10 else 2}f} MiB"


def context(tokens: int) -> str:
    """A context length as ``4k``."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def kl_text(setting: Setting) -> str:
    if setting.kind == "exact":
        return "0"
    return small(setting.kl, setting.score["mean_kl_sem"])


def ratio_text(setting: Setting) -> str:
    """Perplexity ratio to the exact cache."""
    if setting.kind == "exact":
        return "1"
    return measured(setting.score["ppl_ratio"], setting.score["ppl_ratio_sem"], 3)


def perplexity_text(setting: Setting) -> str:
    return measured(setting.score["perplexity"], setting.score.get("perplexity_sem"), 2)


def body_bits(setting: Setting) -> str:
    """Bits of packed tokens, keys / values."""
    sides = [setting.data["bits"].get(side) for side in ("key", "value")]
    return " / ".join("exact" if bits is None else number(bits) for bits in sides)


def arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def call(setting: Setting) -> str:
    """The call of ``headq_config`` that asks for a setting, a calibration named by the file it was saved in."""
    options = setting.options | ({"calibration": CALIBRATION_FILE} if setting.data["calibrated"] else {})
    return f"headq_config({arguments(options)})"


def options_text(setting: Setting) -> str:
    """What a setting asked for: options of ``headq_config``, or a method with its options."""
    if setting.kind == "exact":
        return "no quantization"
    asked = arguments(setting.options)
    if not setting.is_headq:
        return f"{setting.data['method']['name']}({asked})"
    return ", ".join([asked or "defaults", *([] if setting.data["calibrated"] else ["no calibration"])])


def exact_rows(setting: Setting) -> str:
    """Mean rows of a sequence that stay exact at its end."""
    rows = setting.score["report"].get("exact_rows")
    return "all" if setting.sides == "none" else number(rows, 0)


def kl_ratio_text(a: Setting, b: Setting) -> str:
    """KL of ``a`` over that of ``b`` with the paired standard error."""
    ratio = paired_ratio(a, b)
    return "–" if ratio is None else measured(ratio[0], ratio[1], 3 if ratio[0] < 1 else 2)


def memory_words(setting: Setting, exact: Mapping[int, float] | None, tokens: Sequence[int]) -> str:
    """What a sequence takes at some contexts, against the exact cache where that is known."""
    parts = []
    for t in tokens:
        held = setting.memory.get(t)
        if held is not None:
            part = f"{size(held)} at {context(t)} tokens"
            if exact and t in exact:
                part += f" instead of {size(exact[t])} in bf16 ({exact[t] / held:.1f} times less)"
            parts.append(part)
    return " and ".join(parts)


def cost_words(setting: Setting, exact: Mapping[int, float] | None) -> str:
    """What a setting costs, in a sentence or two."""
    s = setting.score
    words = (
        f"What it costs: perplexity goes from {s['exact_perplexity']:.3f} to {s['perplexity']:.3f}, "
        f"times {ratio_text(setting)}; the most likely next token changes at {percent(s['flips'])} of positions; "
        f"KL is {kl_text(setting)} nats."
    )
    memory = memory_words(setting, exact, (4096, 16384))
    return f"{words} The cache of one sequence takes {memory}." if memory else words


def baseline_words(choice: Choice) -> str:
    """How the pick stands against the best baseline."""
    pick, baseline = choice.pick, choice.baseline
    if baseline is None:
        return "No baseline of that few bits was measured here."
    words = (
        f"The best baseline of about as many bits is {baseline.name} ({baseline.bits:.2f} bits): KL {kl_text(baseline)}"
    )
    if pick is None:
        return f"{words}."
    ratio = paired_ratio(pick, baseline)
    if ratio is None:
        return f"{words}; it has no KL to compare with."
    words += f". The pick's KL is {kl_ratio_text(pick, baseline)} times that"
    apart = told_apart(pick, baseline)
    if apart is None:
        return f"{words}, without a standard error: the two do not share several rows."
    verdict = "the pick is better" if ratio[0] < 1 else "the baseline is better here"
    return f"{words} (± over rows, paired): {verdict if apart else 'the rows do not tell the two apart'}."


def near_words(choice: Choice) -> str:
    """Settings that may be as good as the pick."""
    names = ", ".join(f"{s.name} ({s.bits:.2f} bits)" for s in choice.near)
    return f"Not told from the pick by these rows, within two paired standard errors: {names}." if names else ""


def no_pick_words(choice: Choice, group: Group) -> str:
    """That no setting fits a budget, and which one comes nearest."""
    most = max(choice.budget.most, choice.budget.bits + choice.budget.stretch)
    words = f"No setting of headq_config measured here packs both sides within {most:.2f} bits at 4096 tokens"
    smallest = min((s for s in group.both_sides if s.is_headq), key=lambda s: s.bits, default=None)
    return f"{words}." if smallest is None else f"{words}; the smallest is {smallest.name} at {smallest.bits:.2f} bits."


def most_common(values: Sequence[Any]) -> Any | None:
    """The most frequent of some values, the first of equals, None of none."""
    known = [v for v in values if v is not None]
    return max(known, key=known.count) if known else None


def protocol_words(group: Group) -> str:
    """Model, text, rows, chunks, calibration, sinks and window in a sentence."""
    p = group.protocol
    configs = [s.data["config"] or {} for s in group.packed]
    sinks, window = (most_common([c.get(key) for c in configs]) for key in ("n_sink", "residual_length"))
    rows = most_common([s.score["report"].get("exact_rows") for s in group.packed])
    words = (
        f"{group.model} in {p['dtype']}; {p['rows']} rows of {p['row_length']} tokens of {p['text']}, "
        f"{p['prefill']} tokens at once and then chunks of {p['chunk']} that read the cache"
    )
    if sinks is not None and window is not None:
        words += f"; {sinks} sinks and the newest {window} or more tokens stay exact"
    if rows is not None:
        words += f" ({rows:.0f} rows at the end of a row)"
    calibrated = any(s.data["calibrated"] for s in group.settings)
    if calibrated:
        words += f"; calibration on {p['calibration_tokens']} tokens of {p['calibration']}"
    return words + f"; exact perplexity {exact_perplexity(group)}."


def exact_perplexity(group: Group) -> str:
    score = group.settings[0].score
    return measured(score["exact_perplexity"], score.get("exact_perplexity_sem"), 3)
