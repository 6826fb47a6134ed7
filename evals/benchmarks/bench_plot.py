"""The figures of the benchmarks."""

import os
from typing import Any

# colours that stay apart for colour-blind readers (Okabe and Ito)
COLORS = {
    "bf16": ("bf16 C++", "#0072b2"),
    "folded": ("SDPA bf16, folded", "#009e73"),
    "gqa": ("SDPA bf16, enable_gqa", "#8c8c8c"),
    "compiled": ("compiled reference", "#cc79a7"),
    "external": ("external bf16 C++", "#e69f00"),
}
CACHE_COLORS = {"dense": ("DynamicCache", "#8c8c8c"), "packed": ("HeadQ", "#d55e00")}
RATIOS = [m * 10**e for e in range(-3, 4) for m in (1, 2, 5)]
STYLES = ("-", "--", ":", "-.")


def plot_decode(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw how many times as fast as each baseline packed attention is, against the context, a panel for each shape.

    The last setting of the result is shown (the default's mix, usually). Needs matplotlib (the extra ``plot``).

    Args:
        result: of :mod:`headq_ao.evals.benchmarks.bench_decode`.
        path: of the PNG.
    """
    plt = pyplot()
    shapes = list(dict.fromkeys(c["shape"] for c in result["cells"]))
    setting = list(result["cells"][0]["speedup"])[-1]
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(max(4.2 * len(shapes), 6.5), 4.8), layout="constrained", sharey=True, squeeze=False
    )
    for axes, shape in zip(panels[0], shapes, strict=True):
        for style, threads in zip(STYLES, result["threads"], strict=False):
            cells = [c for c in result["cells"] if (c["shape"], c["threads"]) == (shape, threads)]
            for name, (label, color) in COLORS.items():
                points = [(c["context"], c["speedup"][setting][name]) for c in cells if name in c["speedup"][setting]]
                if points:
                    x, y = zip(*points, strict=True)
                    axes.plot(x, y, style, color=color, marker="o", ms=4, label=f"{label}, {plural(threads)}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", title=f"heads {shape}")
        tidy(axes, sorted({c["context"] for c in result["cells"]}))
    finish_ratios(figure, panels[0][0], f"packed tokens ({setting}): times as fast as …", len(shapes) + 1)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_generate(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw milliseconds per token against the context, with the linear fits, a panel for each number of threads.

    Needs matplotlib (the extra ``plot``).

    Args:
        result: of :mod:`headq_ao.evals.benchmarks.bench_generate`.
        path: of the PNG.
    """
    plt = pyplot()
    threads = result["threads"]
    figure, panels = plt.subplots(
        1, len(threads), figsize=(5.2 * len(threads), 4.2), layout="constrained", squeeze=False
    )
    for axes, n in zip(panels[0], threads, strict=True):
        cells = [c for c in result["cells"] if c["threads"] == n and c["batch"] == 1]
        x = [c["context"] for c in cells]
        for kind, (label, color) in CACHE_COLORS.items():
            axes.plot(x, [c[kind]["ms"] for c in cells], "o", color=color, label=label)
            for fit in result["fits"]:
                if (fit["threads"], fit["cache"]) == (n, kind):
                    ends = [min(x), max(x)]
                    line = [fit["at_0"] + fit["slope"] * t / 1024 for t in ends]
                    axes.plot(ends, line, color=color, label=f"{fit['slope']:.2f} ms per 1024 tokens")
        axes.set(
            xlabel="context (tokens)", ylabel="ms per token", title=f"{result['model']}, {plural(n)}", ylim=(0, None)
        )
        tidy(axes, x)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def finish_ratios(figure: Any, first: Any, label: str, columns: int) -> None:
    """Ticks and label of the ratios that all panels share, on the first of them, and one legend for all."""
    low, high = first.get_ylim()
    ticks = [x for x in RATIOS if low <= x <= high]
    first.set_yticks(ticks, [f"{x:g}" for x in ticks])
    first.set_ylabel(label)
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def tidy(axes: Any, contexts: list[int]) -> None:
    """The look that the figures share."""
    axes.set_xticks(contexts, [f"{c // 1024}k" if c % 1024 == 0 else str(c) for c in contexts])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def plural(threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{threads} thread" + "s" * (threads != 1)
