"""Picks, Pareto fronts and paired comparisons by hand; labels that keep apart."""

import matplotlib
import pytest

from headq_ao.evals.report import text
from headq_ao.evals.report.choice import Budget, Choice, choose, paired_ratio, pareto
from headq_ao.evals.report.data import Group, Setting
from headq_ao.evals.report.page import render
from headq_ao.evals.report.read import read_recipe
from headq_ao.evals.report.style import new_figure, place_labels


@pytest.fixture
def read(tmp_path, write_recipe):
    """``read(*names)``: the group of those settings, or of all."""
    return lambda *names: read_recipe(write_recipe(tmp_path, "frontier", names or None)).groups[0]


def test_nothing_fits(read, tmp_path):
    group = read("kv_3bit", "kv_4bit", "k_default", "affine3")
    picks = [choice.pick.name if choice.pick else None for choice in choose(group)]
    assert picks == [None, None, None, "kv_4bit"]
    page = render([read_recipe(tmp_path / "frontier")], {}, [])
    words = page.split('id="bits-3">')[1].split("</article>")[0]
    assert "within 3.05 bits at 4096 tokens; the smallest is kv_3bit at 3.25 bits." in words
    assert "No baseline of that few bits was measured here." in words


def changed(setting, **score):
    return Setting(setting.recipe, {**setting.data, "score": {**setting.score, **score}})


def test_paired_ratio(read):
    a, b = (s for s in read("kv_default", "turboquant2").settings)
    a, b = changed(a, mean_kl=2.0, kl_by_row=[1.0, 3.0]), changed(b, mean_kl=2.0, kl_by_row=[2.0, 2.0])
    assert paired_ratio(a, b) == (1.0, 0.5)  # residuals −1, 1: sqrt(2 / (2 · 1)) over a mean of 2
    choice = Choice(Budget(2.5), pick=a, baseline=b)
    assert "1.00 ± 0.50 times that (± over rows, paired): the rows do not tell the two apart." in text.baseline_words(
        choice
    )
    other = Setting("r", {**b.data, "protocol": {"rows": 9}})
    assert paired_ratio(a, other) == (1.0, None)
    assert "do not share several rows" in text.baseline_words(Choice(Budget(2.5), pick=a, baseline=other))
    assert paired_ratio(a, changed(b, mean_kl=0.0)) is None
    better = Choice(Budget(2.5), pick=changed(a, kl_by_row=[5.9, 6.1]), baseline=b)
    assert "3.00 ± 0.05 times that (± over rows, paired): the baseline is better here." in text.baseline_words(better)


def test_baseline_room_and_noise(read):
    """A baseline may take 0.1 bits more, or what a pick beyond its budget takes; near ones are named."""
    group = read("kv_default", "kv_uncalibrated", "kv_4bit", "kivi2_g128", "kivi2_g64", "kivi4_g64", "turboquant2")
    at_4 = choose(group, [Budget(2.4), Budget(4, stretch=0.3), Budget(4, tolerance=0.26, stretch=0.3)])
    assert [c.baseline.name for c in at_4] == ["turboquant2", "turboquant2", "kivi4_g64"]
    default, uncalibrated, *others = group.settings
    noisy = changed(uncalibrated, kl_by_row=[k * (0.5 + i % 2) for i, k in enumerate(default.score["kl_by_row"])])
    for other, near in ((uncalibrated, []), (noisy, [noisy])):
        (choice,) = choose(Group("r", "m", (default, other, *others), "m"), [Budget(2.5)])
        assert choice.pick is default and list(choice.near) == near and choice.uncalibrated is other
    assert "within two paired standard errors: kv_uncalibrated (2.50 bits)." in text.near_words(choice)


def test_pareto(read):
    headq = [s for s in read().both_sides if s.is_headq]
    names = "kv_no_side_code kv_default kv_k3v2 kv_k3v2_side kv_3bit kv_4bit kv_8bit"
    assert [s.name for s in pareto(headq)] == names.split()


def test_labels_keep_apart():
    points = [(x / 10, y / 10) for x in range(5) for y in range(4)]
    with new_figure(6, 5) as figure:
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), "o")
        figure.draw_without_rendering()
        place_labels(axes, [(x, y, "a long name", i % 2 == 0) for i, (x, y) in enumerate(points)], points)
        boxes = [matplotlib.text.Text.get_window_extent(label) for label in axes.texts]
        dots = axes.transData.transform(points)
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
