"""The generated blocks: the name in a document's marks, the files that a block is made of, and how."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headq_ao.evals.benchmarks import bench_decode, bench_generate, bench_mla, triton_table
from headq_ao.evals.gpu import report as gpu
from headq_ao.evals.harness import table
from headq_ao.evals.models import sweep_table
from headq_ao.evals.results import messages, neighbours, tables, versions
from headq_ao.evals.results.provenance import KERNELS, QUALITY, SPEED, History, footer, read
from headq_ao.evals.vllm import tables as served

SERVED = (*KERNELS, "headq_ao/integrations/vllm")
Make = Callable[[Path], str]


@dataclass(frozen=True)
class Block:
    """One generated block.

    Args:
        files: of its results, a pattern below recipes/results; empty: made of the sources, not of results.
        make: its Markdown, from the folder recipes/results.
        code: files and folders that the results describe.
        names: of the results that it shows, where not all.
    """

    files: str
    make: Make
    code: Sequence[str]
    names: Sequence[str] = ()

    def text(self, results: Path, history: History) -> str:
        """The block: what :attr:`make` gives, and where that was measured.

        Raises:
            FileNotFoundError: where results are missing.
            ValueError: where one is not whole.
        """
        if not self.files:
            return self.make(results)
        found = read(sorted(results.glob(self.files)))
        if self.names:
            found = [result for result in found if result.get("name") in self.names]
        where = f"recipes/results/{self.files}"
        return f"{self.make(results)}\n\n{footer(found, where, self.code, history)}"


def one(path: str, make: Callable[[dict[str, Any]], str], code: Sequence[str]) -> Block:
    """A block of one file."""
    return Block(path, lambda results: make(json.loads((results / path).read_text(encoding="utf-8"))), code)


def recipe(name: str, kind: str = "headline") -> Block:
    """The settings of a recipe, ``"headline"`` or ``"all"``, or its ``"panel"`` of perturbations."""
    if kind == "panel":
        return Block(f"{name}/panel.json", lambda results: table.panel_table(results / name), QUALITY)

    def make(results: Path) -> str:
        found = table.read_results(results / name)
        return table.model_tables([r for r in found if kind == "all" or r["headline"]])

    return Block(f"{name}/*.json", make, QUALITY)


def presets(results: Path) -> str:
    """Of recipes/presets.py and recipes/frontier.yaml."""
    stored = json.loads((results / "presets" / "presets.json").read_text(encoding="utf-8"))
    return tables.presets(stored, results / "frontier")


def message_table(topic: str, results: Path) -> str:
    """Of the sources beside the results."""
    return messages.table(results.parents[1], topic)


BLOCKS: dict[str, Block] = {
    "front": Block("wikitext/*.json", lambda results: tables.front(results / "wikitext"), QUALITY, tuple(tables.FRONT)),
    "presets": Block("presets/presets.json", presets, (*QUALITY, *SPEED)),
    "prompt_cache": one("prompt_cache/prompt_cache.json", tables.prompt_cache, SPEED),
    "retrieval": one("retrieval/retrieval.json", tables.retrieval, QUALITY),
    "decode_mode": Block("decode_mode/*.json", lambda results: tables.decode_mode(results / "decode_mode"), QUALITY),
    **{
        name: Block("neighbours_side/*.json" if name == "neighbours side" else "neighbours*/*.json", make, QUALITY)
        for name, make in neighbours.BLOCKS.items()
    },
    "routing": Block("routing/*.json", lambda results: tables.routing(results / "routing"), QUALITY),
    "rate_distortion": one("rate_distortion/smollm2.json", tables.rate_distortion, QUALITY),
    "latent": Block("latent/*.json", lambda results: tables.latent(results / "latent"), QUALITY),
    "shared_kv": Block("shared_kv/*.json", lambda results: tables.shared_kv(results / "shared_kv"), QUALITY),
    "calibration_size": one("calibration_size/calibration_size.json", tables.calibration_size, QUALITY),
    "decode": one("bench/decode.json", bench_decode.result_table, SPEED),
    "generate": one("bench/generate.json", bench_generate.result_table, SPEED),
    "mla": one("bench/mla.json", bench_mla.result_table, (*QUALITY, *SPEED)),
    "gpu": Block("gpu/[lps]*.json", lambda results: gpu.result_table(results / "gpu"), KERNELS),
    "vllm": Block(
        "vllm/*.json",
        lambda results: served.tables(served.read(results / "vllm")),
        ("ops", "headq_ao/integrations/vllm"),
    ),
    "versions": Block("versions/*.json", lambda results: versions.table(results / "versions"), ("headq_ao", "ops")),
    "first minutes": one("first_minutes/walk.json", tables.first_minutes, ("headq_ao", "evals/cli")),
    "triton": one("triton/aot.json", triton_table.result_table, KERNELS),
    **{f"messages {topic}": Block("", functools.partial(message_table, topic), ()) for topic in messages.TOPICS},
    **{
        f"models {mapping}": one(
            "sweep/models.json", functools.partial(sweep_table.models_table, mapping), ("headq_ao/integrations",)
        )
        for mapping in sweep_table.TITLES
    },
}


def block(name: str) -> Block:
    """The block of a mark: one of :data:`BLOCKS`, or ``"recipe NAME"``, ``"recipe NAME all"``, ``"recipe NAME panel"``.

    Raises:
        ValueError: on any other name.
    """
    if name in BLOCKS:
        return BLOCKS[name]
    words = name.split()
    if len(words) in (2, 3) and words[0] == "recipe" and words[2:] in ([], ["all"], ["panel"]):
        return recipe(*words[1:])
    known = ", ".join([*BLOCKS, "recipe NAME [all|panel]"])
    raise ValueError(f"no generated block {name!r}; there are {known}")
