"""Does a packed cache still find facts in a long context? ``python recipes/retrieval.py --help``."""

import argparse
import bisect
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from headq_ao import HeadQCache
from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.evals.harness.inputs import DTYPES, SMOLLM2, calibrate_on, describe, load
from headq_ao.evals.harness.subjects import Subject
from headq_ao.evals.harness.texts import find_text
from headq_ao.integrations.transformers.models import with_cache

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "retrieval" / "retrieval.json"
EPILOG = """\
examples:
  HEADQ_WIKITEXT=path/to/wikitext-2-raw python recipes/retrieval.py
  python recipes/retrieval.py --calibration bundled --contexts 2 --subjects headq turboquant_2bit
  python recipes/retrieval.py --tokens 8000 --json retrieval_8000.json
  python recipes/retrieval.py --chunk 4096 --subjects rdkv_2.25 random_4bit_2.25 --json evictions.json

Each context is prose with a fact ("The password of Clara is copper.") at every depth. It is computed once into the
cache, in calls of 512 tokens. Each question is then fed to that cache, the likeliest of a few values that are all facts
of this context is the answer, and the cache is cropped back. Only a model that reads the fact can tell its value from
the others; guessing scores 1 in --choices. All caches get the same contexts and questions, so the interval of a
difference is that of pairs (bootstrap over contexts). Where the exact cache itself scores below one half, the task says
nothing about a cache: take fewer --pairs or --choices.
"""

NAMES = (
    "Alice Anna Clara Daniel Emma Felix George Grace Helen Henry Julia Laura Maria Martin Nina Oscar Peter Robert Ruth "
    "Simon Sophie Thomas Victor Walter"
)
VALUES = (
    "amber anchor apple blanket bottle butter button camel candle carpet castle cedar cherry coffee compass copper "
    "coral cotton crystal diamond dragon eagle engine falcon feather guitar hammer honey ivory jade ladder lantern "
    "lemon maple marble mirror needle orange pearl pencil pepper piano planet purple rabbit ribbon rocket saddle "
    "salmon shadow silver thunder tiger turtle velvet violin wagon whale wheat wolf yellow"
)
FACT = "The password of {} is {}."
QUESTION = "The password of {} is"
INSTRUCTION = "Read this text and remember the password of each person."
TAIL = 128  # filler after the last fact: none lies among the newest rows, which every cache holds exactly
CHUNK = 512  # tokens of a prefill call
RESAMPLES = 10_000
PARTS = ("first", "middle", "last")  # thirds of the depth

# name: method and options of a Subject
SUBJECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "headq": ("headq", {}),
    "headq_quality": ("headq", {"preset": "quality"}),
    "headq_near_lossless": ("headq", {"preset": "near_lossless"}),
    "headq_2bit": ("headq", {"k_bits": 2, "v_bits": 2}),
    "kivi_2bit_g64": ("kivi", {"k_bits": 2, "v_bits": 2, "k_group": 64, "v_group": 64}),
    "turboquant_2bit": ("turboquant", {"k_bits": 2, "v_bits": 2}),
}
DEFAULT = tuple(SUBJECTS)
# those of recipes/neighbours*.yaml, by the names of their settings
SUBJECTS |= {
    "kv_mean_2": ("headq", {"mean_bits": 2.0}),
    "trellis_headq_2bit": ("trellis", {"k_bits": 2, "v_bits": 2, "basis": "headq"}),
    "trellis_2bit": ("trellis", {"k_bits": 2, "v_bits": 2}),
    "residual_vq_6": ("residual_vq", {"books": 6}),
    "kvlinc_base": ("kvlinc_base", {"residual_length": 128}),
    "int4_per_token_head": ("int4_per_token_head", {}),
    "turboquant_3bit_nc": ("turboquant_3bit_nc", {}),
    "rdkv_2.25": ("rdkv", {"bits": 2.25}),
    "rdkv_0.4": ("rdkv", {"bits": 0.4}),
    "random_16bit_2.25": ("random_eviction", {"bits": 2.25, "kept_bits": 16}),
    "random_4bit_2.25": ("random_eviction", {"bits": 2.25, "kept_bits": 4}),
}
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Frame:
    """What stands before the prose and between the prose and a question."""

    before: str
    after: str

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """The instruction in the user's turn of the chat template, or without a template a blank line and no more."""
        if tokenizer.chat_template is None:
            return cls("", "\n\n")
        chat = [{"role": "user", "content": INSTRUCTION}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before, _, after = text.partition(INSTRUCTION)
        return cls(f"{before}{INSTRUCTION}\n\n", after)

    def question(self, name: str) -> str:
        return self.after + QUESTION.format(name)


@dataclass(frozen=True)
class Question:
    """What is fed, the token of each choice, which of them is true, and where the fact stands (0 to 1)."""

    ids: tuple[int, ...]
    choices: tuple[int, ...]
    answer: int
    depth: float


@dataclass(frozen=True)
class Context:
    """Token ids and what is asked about them."""

    ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass
class Answers:
    """Of one cache: ``[contexts, questions]`` whether right, and the nats by which the true choice is missed."""

    correct: np.ndarray
    nll: np.ndarray
    packed_fraction: float
    bits: float | None


def read_sentences(paths: Sequence[Path]) -> list[str]:
    """Sentences of prose files, headings left out."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("="))
    return re.split(r"(?<=[.!?]) ", text)


def filler(rng: random.Random, sentences: list[str]) -> Iterator[str]:
    """The sentences in random order, again in another one when all have been used."""
    while True:
        yield from rng.sample(sentences, len(sentences))


def one_token(encode: Encode, words: Sequence[str]) -> dict[str, int]:
    """The words that are one token after a space."""
    found = {word: encode(" " + word) for word in words}
    return {word: ids[0] for word, ids in found.items() if len(ids) == 1}


def build(
    encode: Encode,
    frame: Frame,
    sentences: list[str],
    seed: int,
    tokens: int,
    pairs: int,
    questions: int,
    choices: int,
) -> Context:
    """One context of at most ``tokens`` tokens (less than a sentence short of it).

    Each of ``pairs`` equal parts of the prose holds one fact at a random place; the last 128 tokens hold none.
    Questions are about facts that are spread evenly over the depth, asked in random order.

    Raises:
        ValueError: when the facts do not fit, or the tokenizer cuts too many of the values into pieces.
    """
    rng = random.Random(seed)
    values = one_token(encode, VALUES.split())
    if len(values) < pairs:
        raise ValueError(f"only {len(values)} values are one token of this tokenizer, {pairs} pairs need as many")
    names, chosen = rng.sample(NAMES.split(), pairs), rng.sample(sorted(values), pairs)
    facts = [encode(" " + FACT.format(*pair)) for pair in zip(names, chosen, strict=True)]
    head = encode(frame.before)
    room = tokens - len(head) - sum(map(len, facts))
    if room < TAIL + 32 * pairs:
        least = tokens - room + TAIL + 32 * pairs
        raise ValueError(f"{pairs} pairs need a context of at least {least} tokens, got {tokens}")
    body: list[list[int]] = []
    for sentence in filler(rng, sentences):
        ids = encode(" " + sentence if body else sentence)
        if len(ids) > room:
            break
        room -= len(ids)
        body.append(ids)
    starts = list(itertools.accumulate(map(len, body), initial=0))  # of each sentence, and the end
    before: dict[int, list[int]] = {}  # facts by the sentence that follows
    for i in range(pairs):
        target = (i + rng.random()) / pairs * (starts[-1] - TAIL)
        before.setdefault(max(bisect.bisect_right(starts, target) - 1, 1), []).append(i)
    ids, depth = head, [0.0] * pairs
    for at, sentence_ids in enumerate(body):
        for i in before.get(at, []):
            depth[i] = len(ids) / tokens
            ids += facts[i]
        ids += sentence_ids
    asked = []
    for i in (int((j + 0.5) * pairs / questions) for j in range(questions)):
        offered = rng.sample([v for v in chosen if v != chosen[i]], choices - 1)
        answer = rng.randrange(choices)
        offered.insert(answer, chosen[i])
        question = tuple(encode(frame.question(names[i])))
        asked.append(Question(question, tuple(values[v] for v in offered), answer, depth[i]))
    rng.shuffle(asked)
    return Context(tuple(ids), tuple(asked))


@torch.no_grad()
def prefill(model: Any, cache: Any, ids: Sequence[int], chunk: int = CHUNK) -> None:
    """Compute a context into a cache, in calls of ``chunk`` tokens."""
    for part in torch.tensor([ids], device=model.device).split(chunk, 1):
        model(part, **with_cache(cache), logits_to_keep=1)


@torch.no_grad()
def ask(model: Any, cache: Any, question: Question) -> Tensor:
    """Log-probabilities of the choices, among themselves; the cache is as long as before."""
    ids = torch.tensor([question.ids], device=model.device)
    logits = model(ids, **with_cache(cache), logits_to_keep=1).logits[0, -1]
    cache.crop(-len(question.ids))
    return logits[list(question.choices)].float().log_softmax(-1).cpu()


def answer_all(
    model: Any, subject: Subject, contexts: Sequence[Context], label: str, progress: bool = True, chunk: int = CHUNK
) -> Answers:
    """Put a cache on the model, ask everything, take it off.

    The exact window of a packed cache stays at least ``residual_length`` less one question long: a question can make a
    block be packed, and cropping takes the question's full-precision tokens away, not that block's.

    Raises:
        NothingPackedError: when a packed cache has read no packed token.
    """
    correct = np.zeros((len(contexts), len(contexts[0].questions)))
    nll = np.zeros_like(correct)
    packed = read = 0
    report: dict[str, Any] = {}
    with (
        subject.on(model) as make_cache,
        tqdm(total=correct.size, desc=label, unit="question", disable=not progress) as bar,
    ):
        for c, context in enumerate(contexts):
            cache = HeadQCache(model) if make_cache is None else make_cache()
            prefill(model, cache, context.ids, chunk)
            before = getattr(cache, "rows_read", (0, 0))
            for q, question in enumerate(context.questions):
                logprobs = ask(model, cache, question)
                correct[c, q] = logprobs.argmax().item() == question.answer
                nll[c, q] = -logprobs[question.answer].item()
                bar.update()
            if subject.kind != "exact":
                packed += cache.rows_read[0] - before[0]
                read += cache.rows_read[1] - before[1]
                report = cache.bits_report().to_dict()
    if subject.kind != "exact" and not packed:
        raise NothingPackedError(f"{label} read no packed token: this would score the exact cache; use longer contexts")
    bits = None if subject.kind == "exact" else subject.bits(model, report)["body"]
    return Answers(correct, nll, packed / read if read else 0.0, bits)


def paired_interval(
    x: np.ndarray, reference: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``x − reference [contexts, questions]`` and its 95 % interval, contexts drawn again with replacement."""
    difference = (x - reference).mean(1)
    drawn = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def summarize(answers: Answers, exact: Answers, contexts: Sequence[Context], seed: int) -> dict[str, Any]:
    """One cache's entry of the result."""
    part = np.array([[min(int(q.depth * len(PARTS)), len(PARTS) - 1) for q in c.questions] for c in contexts])
    out: dict[str, Any] = {"accuracy": float(answers.correct.mean()), "choice_nll": float(answers.nll.mean())}
    for name, x, reference in (
        ("accuracy_difference", answers.correct, exact.correct),
        ("choice_nll_difference", answers.nll, exact.nll),
    ):
        mean, low, high = paired_interval(x, reference, seed=seed)
        out[name] = {"mean": mean, "low": low, "high": high}
    held = {name: part == i for i, name in enumerate(PARTS)}
    out["accuracy_by_depth"] = {n: float(answers.correct[at].mean()) if at.any() else None for n, at in held.items()}
    out |= {"packed_fraction": answers.packed_fraction, "body_bits": answers.bits}
    return out | {"correct": ["".join(str(int(x)) for x in row) for row in answers.correct]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Compare caches by how well a model finds facts in a long context through them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", default=SMOLLM2, help="'smollm2' or what transformers loads (default: %(default)s)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=4096, help="of a context, at most (default: %(default)s)")
    p.add_argument("--pairs", type=int, default=10, help="facts in a context (default: %(default)s)")
    p.add_argument("--contexts", type=int, default=20, help="how many, at least 2 (default: %(default)s)")
    p.add_argument("--questions", type=int, default=10, help="of each context (default: %(default)s)")
    p.add_argument("--choices", type=int, default=8, help="values to choose from (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the first context; the others follow (default: %(default)s)")
    p.add_argument(
        "--calibration",
        default="wikitext",
        help="text to calibrate on: 'wikitext', 'bundled' (its prose is then no filler) or a file "
        "(default: %(default)s)",
    )
    p.add_argument("--calibration-tokens", type=int, default=4096, help="how many (default: %(default)s)")
    p.add_argument(
        "--subjects",
        nargs="+",
        choices=list(SUBJECTS),
        default=list(DEFAULT),
        metavar="NAME",
        help=f"caches of {', '.join(SUBJECTS)}, always with the exact one; default: {', '.join(DEFAULT)}",
    )
    p.add_argument(
        "--chunk",
        type=int,
        default=CHUNK,
        help="tokens of a call that reads a context; caches that leave tokens of a prompt out take the first call for "
        "it: give them one as long as the context (default: %(default)s)",
    )
    p.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    p.add_argument("--json", type=Path, default=RESULT, help="the result (default: recipes/results/retrieval)")
    p.add_argument(
        "--keep",
        action="store_true",
        help="keep what --json has of caches that are not in --subjects; the exact cache is asked again and must agree",
    )
    return p


def check(args: argparse.Namespace) -> None:
    """Raise ValueError on arguments that do not go together."""
    for name, least, most in (
        ("contexts", 2, None),
        ("pairs", 2, len(NAMES.split())),
        ("questions", 1, args.pairs),
        ("choices", 2, args.pairs),
        ("calibration_tokens", 1, None),
        ("chunk", 1, None),
        ("threads", 1, None),
    ):
        value = getattr(args, name)
        if value is not None and (value < least or (most is not None and value > most)):
            limit = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"--{name.replace('_', '-')} must be {limit}, got {value}")


def prepare(args: argparse.Namespace) -> tuple[Any, Any, list[Context], Path]:
    """Model, tokenizer, contexts and the text to calibrate on.

    Raises:
        ValueError, OSError, ModuleNotFoundError: with what is wrong.
    """
    check(args)
    text = find_text(args.calibration, "calibrate")
    prose = [find_text("bundled", "report")]
    if args.calibration != "bundled":
        prose.append(find_text("bundled", "calibrate"))
    model, tokenizer = load(args.model, None, DTYPES[args.dtype])
    encode: Encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    frame = Frame.of(tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = args.tokens + max(len(encode(frame.question(name))) for name in NAMES.split())
    if limit is not None and longest > limit:
        raise ValueError(f"--tokens must leave room for a question: the model has {limit} positions, got {args.tokens}")
    sentences = read_sentences(prose)
    seeds = range(args.seed, args.seed + args.contexts)
    contexts = [
        build(encode, frame, sentences, seed, args.tokens, args.pairs, args.questions, args.choices) for seed in seeds
    ]
    return model, tokenizer, contexts, text


def settings_of(args: argparse.Namespace, calibration: str, chat: bool) -> dict[str, Any]:
    """All that the contexts, the questions and the calibration depend on."""
    kept = ("dtype", "tokens", "pairs", "contexts", "questions", "choices", "seed", "calibration_tokens")
    return {
        "model": Path(args.model).name,
        **{name: getattr(args, name) for name in kept},
        "calibration": calibration,
        "fact": FACT,
        "question": QUESTION,
        "chat": chat,
        "prefill_chunk": args.chunk,
        "resamples": RESAMPLES,
        "guessing": 1 / args.choices,
    }


def stored_entries(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The entries of a stored result, each with the environment that it was measured in.

    Raises:
        ValueError: when other contexts were asked about.
        OSError: when there is no such file.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name in settings if result["settings"].get(name) != settings[name]]:
        raise ValueError(f"--keep needs the settings of {path}, which differ in {', '.join(other)}")
    return {name: {"environment": result["environment"], **entry} for name, entry in result["subjects"].items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        model, tokenizer, contexts, text = prepare(args)
        settings = settings_of(args, text.name, tokenizer.chat_template is not None)
        stored = stored_entries(args.json, settings) if args.keep else {}
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        calibration = None
        if set(args.subjects) - {"exact"}:
            calibration = calibrate_on(
                model, tokenizer, text, args.calibration_tokens, True, context_length=args.tokens
            )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    entries: dict[str, Any] = {}
    result: dict[str, Any] = {}
    exact: Answers | None = None
    for name in SUBJECTS:  # the exact one is first
        if name != "exact" and name not in args.subjects:
            continue
        method, options = SUBJECTS[name]
        subject = Subject(method, options, calibration)
        answers = answer_all(model, subject, contexts, name, chunk=args.chunk)
        exact = answers if exact is None else exact
        config = {} if subject.kind != "headq" or subject.config is None else {"config": describe(subject.config)}
        entries[name] = summarize(answers, exact, contexts, args.seed) | subject.describe() | config
        half = entries["exact"]["accuracy"] >= 0.5
        if name == "exact" and stored and stored["exact"]["correct"] != entries["exact"]["correct"]:
            print(f"error: the exact cache answers otherwise than in {args.json}: run all caches", file=sys.stderr)
            return 1
        shown = {n: e for n in SUBJECTS if (e := entries.get(n, stored.get(n))) is not None}
        result = {"settings": settings, "exact_at_least_half": half, "subjects": shown, "environment": environment()}
        write_json(args.json, result)  # what has been measured stays when the rest is stopped
        entry = entries[name]
        difference = (
            ""
            if name == "exact"
            else " ({mean:+.3f}, {low:+.3f} to {high:+.3f})".format(**entry["accuracy_difference"])
        )
        print(f"{name}: {entry['accuracy']:.3f} right{difference}, choice NLL {entry['choice_nll']:.3f}", flush=True)
    if not result["exact_at_least_half"]:
        print("warning: the exact cache scores below one half; take fewer --pairs or --choices", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
