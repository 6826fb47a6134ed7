"""The look of the report's plots: colours and markers, figures, ticks, labels, PNG files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Okabe and Ito's palette and Tol's, which stay apart for colour-blind eyes; each family has a marker of its own too
FAMILIES: dict[str, tuple[str, str]] = {
    "HeadQ": ("#0072B2", "o"),
    "HeadQ, equal bits": ("#56B4E9", "s"),
    "HeadQ, side code": ("#4477AA", "d"),
    "HeadQ, rotated rows": ("#88CCEE", "8"),
    "KIVI": ("#D55E00", "^"),
    "per-token affine": ("#E69F00", "v"),
    "Hadamard per-token": ("#CC79A7", "D"),
    "TurboQuant-like": ("#009E73", "P"),
    "SQuat-like": ("#999933", "X"),
    "GEAR-like": ("#666666", "<"),
    "trellis": ("#AA3377", "o"),
    "residual VQ": ("#117733", "s"),
    "KVLinC-like": ("#DDAA33", "^"),
    "RDKV-like": ("#EE6677", "D"),
    "random eviction": ("#BBBBBB", "D"),
    "vLLM's types": ("#44AA99", "v"),
    "FP8": ("#000000", "*"),
    "transformers quanto": ("#882255", ">"),
    "transformers hqq": ("#332288", "h"),
    "exact": ("#000000", "_"),
}
OTHER_FAMILY = ("#8A8A8A", "p")
DPI = 140

STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def family_style(family: str) -> tuple[str, str]:
    """Colour and marker; grey where the family is none of :data:`FAMILIES`."""
    return FAMILIES.get(family, OTHER_FAMILY)


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure on the Agg canvas in the report's style; neither pyplot nor the user's settings are touched.

    Raises:
        ModuleNotFoundError: naming the extra that brings matplotlib.
    """
    try:
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the report's plots need matplotlib: pip install 'headq_ao[plot]'") from error
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Any, path: Path) -> Path:
    """Write a PNG of 256 colours (a third of the bytes) that depends on what is drawn alone."""
    import numpy as np
    from PIL import Image

    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)
    return path


def plain_log_ticks(axis: Any) -> None:
    """Ticks of a drawn logarithmic axis as plain numbers: at 1, 2 and 5, or at powers of ten where it spans many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 5e3 * low else (1,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def place_labels(axes: Any, labels: Sequence[tuple[float, float, str, bool]], obstacles: Any) -> None:
    """Write a label near each of some points, where it covers no obstacle and no other label; none where it would.

    Args:
        axes: of a figure whose layout is done.
        labels: x, y in data coordinates, text, and whether it should rather stand below its point than above.
        obstacles: points ``[n, 2]`` in data coordinates.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(obstacles)]
    for x, y, text, below in labels:
        label = axes.annotate(
            text, (x, y), textcoords="offset points", xytext=(0, 0), fontsize=8.5, color="#222222",
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        label.set_in_layout(False)
        for dx, dy in _label_steps(-1 if below else 1):
            label.set_position((dx, dy))
            label.set_ha("center" if dx == 0 else "left" if dx > 0 else "right")
            label.set_va("center" if dy == 0 else "bottom" if dy > 0 else "top")
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and box.y1 <= axes.bbox.y1 and not any(box.overlaps(other) for other in taken):
                label.arrow_patch.set_visible(max(abs(dx), abs(dy)) > 10)
                taken.append(box)
                break
        else:
            label.remove()


def _label_steps(side: int) -> list[tuple[float, float]]:
    """Offsets to try in points: near ones first, on the wanted side first."""
    near = [(side * 7, side * 7), (-side * 7, side * 7), (0, side * 10), (9, 0), (-9, 0)]
    far = [(side * k * sx * 7, side * k * 7) for k in (2, 3, 4.5, 6) for sx in (1, -1, 2, -2)]
    return [*near, *far, *((x, -y) for x, y in near if y)]
