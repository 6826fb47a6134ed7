"""The page and its plots: what to pick and what it costs, self-contained and escaped."""

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from headq_ao import headq_config
from headq_ao.evals.report import __main__ as command
from headq_ao.evals.report import write_report
from headq_ao.evals.report.page import render
from headq_ao.evals.report.read import read_recipe

pytestmark = pytest.mark.xdist_group("report")  # one report serves all


def matplotlib_state():
    """All settings; the backend as it is, without choosing one."""
    settings = {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
    return settings, matplotlib.get_backend(auto_select=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_recipe, panel):
    """Results of four recipes, and the folder of their report."""
    root = tmp_path_factory.mktemp("report")
    write_recipe(root / "results", "controls", ["kv_default", "kv_wrong_sign"])
    (root / "results" / "controls" / "panel.json").write_text(json.dumps(panel), encoding="utf-8")
    Image.new("RGB", (30, 20)).save(root / "results" / "controls" / "panel.png")
    write_recipe(root / "results", "frontier")
    write_recipe(
        root / "results", "small", ["kv_default", "kv_4bit", "fp8"], model="small-gpt2", exact=41.0, layers=None
    )
    write_recipe(root / "results", "wikitext", ["exact", "kv_default", "kivi2_g32", "kv_3bit"], layers=None)
    (root / "results" / "memory").mkdir()
    (root / "results" / "memory" / "other.json").write_text("{}", encoding="utf-8")
    before = matplotlib_state()
    assert command.main(["--results", str(root / "results"), "--out", str(root / "out"), "--no-progress"]) == 0
    assert matplotlib_state() == before
    return root


@pytest.fixture(scope="module")
def page(made):
    return (made / "out" / "report.html").read_text(encoding="utf-8")


def cards(page):
    """Text of each budget's article, tags taken off, by the budget."""
    found = re.findall(r'<article class="card" id="bits-([\d.]+)">(.*?)</article>', page, re.DOTALL)
    return {budget: re.sub(r"<[^>]+>", " ", body).replace("&#39;", "'") for budget, body in found}


@pytest.mark.parametrize(
    ("budget", "pick", "bits", "call", "baseline", "kl_over_it", "other"),
    [
        ("2.25", "kv_no_side_code", "2.25", "rank=0, ", "turboquant2 (2.25 bits)", 0.080 / 0.095, None),
        ("2.5", "kv_default", "2.50", "", "turboquant2 (2.25 bits)", 0.030 / 0.095,
         "without a side code: kv_no_side_code"),
        ("3", "kv_k3v2_side", "3.00", "k_bits=3, rank=16, ", "turboquant2 (2.25 bits)", 0.0165 / 0.095,
         "without a calibration: kv_uncalibrated"),
        ("4", "kv_4bit", "4.25", "k_bits=4, v_bits=4, rank=0, ", "turboquant3 (3.25 bits)", 0.0034 / 0.016,
         "within 4.05 bits: kv_3bit"),
    ],
)  # fmt: skip
def test_choice(page, budget, pick, bits, call, baseline, kl_over_it, other):
    card = cards(page)[budget]
    assert f"{budget} bits: {pick}" in card and f"{bits} bits at 4096 tokens" in card
    assert f"headq_config({call}calibration='calibration.safetensors')" in card
    assert (
        f"is {baseline}" in card and f"The pick's KL is {kl_over_it:.3f} ± 0.0" in card and "the pick is better" in card
    )
    assert other is None or other in card
    assert ("0.25 bits more than asked" in card) == (budget == "4")
    config = eval(re.search(r"headq_config\(.*?\)", card).group(), {"headq_config": headq_config})
    assert config.calibration == "calibration.safetensors"


def test_costs(page):
    card = cards(page)["2.5"]
    exact = 4096 * 30 * 192 * (16 + 16) / 8 / 2**20  # 30 layers of 192 coordinates a side
    packed = (96 * 30 * 192 * (16 + 16) + 4000 * 30 * 192 * (2.75 + 2.25)) / 8 / 2**20
    assert f"{packed:.1f} MiB at 4k tokens instead of {exact:.1f} MiB in bf16 ({exact / packed:.1f} times less)" in card
    assert "perplexity goes from 17.400 to" in card and f"at {45 * math.sqrt(0.03):.1f} % of positions" in card
    assert "The same setting in other recipes: wikitext (8 rows, chunk 64): KL 0.0300" in card


class Checker(HTMLParser):
    """Tags that must close do, in order; and what is referred to."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.hrefs, self.sources = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("link", "iframe", "object", "base"), tag
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.hrefs += [attrs["href"]] if "href" in attrs else []
        self.sources += [attrs["src"]] if "src" in attrs else []
        assert tag != "img" or attrs["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_self_contained(made, page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert page.startswith("<!DOCTYPE html>") and checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert {href.removeprefix("#") for href in checker.hrefs} <= set(checker.ids)
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in checker.sources)
    shown = {base64.b64decode(source.removeprefix(prefix)) for source in checker.sources}
    files = [*(made / "out").glob("*.png"), made / "results" / "controls" / "panel.png"]
    assert shown == {path.read_bytes() for path in files} and len(files) == 5 + 4 + 4 + 1 + 1 + 1
    assert "url(" not in page and "@import" not in page and "http" not in re.sub(prefix + '[^"]*', "", page)
    assert len(page.encode()) < 3e6


def test_plots(made):
    kinds = {"kl", "perplexity", "layers", "positions", "memory"}
    names = {path.stem for path in (made / "out").glob("*.png")}
    assert {f"frontier-smollm2-{kind}" for kind in kinds} | {"controls-smollm2-bars", "across-models-kl"} <= names
    assert "wikitext-smollm2-layers" not in names
    for path in (made / "out").glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
            assert "Software" not in image.info
        assert pixels.shape[1] > 1200
        assert 0.02 < (pixels < 250).mean() < 0.5, path  # neither empty nor covered


def test_plots_are_deterministic(made, tmp_path):
    write_report([made / "results" / "wikitext"], tmp_path, progress=False)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes() == (made / "out" / path.name).read_bytes()


def test_sections_and_tables(page, settings):
    assert re.findall(r'<section id="([\w-]+)">', page) == [
        "choice", "models", "recipe-wikitext", "recipe-frontier", "recipe-small", "recipe-controls",
    ]  # fmt: skip
    section = page.split('<section id="recipe-frontier">')[1].split("</section>")[0]
    rows = re.findall(r"<tbody data-sides=.*?</tbody>", section, re.DOTALL)
    assert len(rows) == len(settings)
    for row, (name, *_, kl) in zip(rows, settings, strict=True):
        keys = re.findall(r'data-sort="([^"]*)"', row)
        assert keys[0] == name and float(keys[9]) == kl
        assert (keys[5] == "") == (name == "exact")
        assert f"python recipes/run.py --only {name}" in row and "0123456789abcdef and changes not committed" in row
    assert '<th scope="row">small-gpt2 at 4 bits</th>' in page
    controls = page.split('<section id="recipe-controls">')[1]
    assert "key MSE, all (7)" in controls and "<td>0.125</td>" in controls and "&lt;null&gt;" in controls


def test_source_note_and_protocol(page):
    head = re.sub(r"\s+", " ", page.split("<main>")[0])
    assert "arXiv 2605.03562. That entry was withdrawn by its author" in head
    assert "8 rows of 1024 tokens of wiki.test.raw, 256 tokens at once and then chunks of 64" in head
    assert "4 sinks and the newest 64 or more tokens stay exact" in head and "a &lt;processor&gt;" in head


def test_chunk_lengths(tmp_path, write_recipe):
    """Settings that differ in the chunk only are groups of their own, compared row by row."""
    for chunk, factor in ((64, 1.0), (1, 1.25)):
        folder = write_recipe(tmp_path, "streaming", ["kv_default", "k_default"], factor=factor)
        for path in folder.glob("k*default.json"):
            data = json.loads(path.read_text(encoding="utf-8"))
            data["protocol"] = data["protocol"] | {"chunk": chunk}
            (folder / f"chunk_{chunk}_{path.name}").write_text(json.dumps(data), encoding="utf-8")
            path.unlink()
    recipe = read_recipe(folder)
    assert [g.label for g in recipe.groups] == ["smollm2, chunk 1", "smollm2, chunk 64"]
    page = render([recipe], {}, [])
    row = page.split("smollm2: kv_default / kv_default")[1].split("</tr>")[0]
    assert re.findall(r"<td>([^<]*)", row)[:2] == ["1", "64"]
    assert "<td>0.800 ± 0.000</td>" in row
    assert "<h3>smollm2, chunk 64</h3>" in page


def test_text_is_escaped(tmp_path, write_recipe):
    write_recipe(tmp_path, "frontier", ["kv_default"], title="<script>alert(1)</script> & **co**")
    page = render([read_recipe(tmp_path / "frontier")], {}, [])
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_sort_order():
    script = Path(command.__file__).parent / "templates" / "report.js"
    values = ["10", "", "9.5", "1e-05", "2"]
    sort = "(down) => [...values].sort((a, b) => compare(a, b, down))"
    probe = f"const values = {json.dumps(values)}; console.log(JSON.stringify([false, true].map({sort})));"
    code = "const document = {querySelectorAll: () => []};\n" + script.read_text(encoding="utf-8") + probe
    out = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [["1e-05", "2", "9.5", "10", ""], ["10", "9.5", "2", "1e-05", ""]]
