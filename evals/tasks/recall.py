"""Recall from a long context: secret codes among unrelated sentences, at a length in the model's tokens."""

import functools
import itertools
import random
import re
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from headq_ao.evals.harness.texts import find_text
from headq_ao.evals.lm_eval.arguments import resolve_model

OBJECTS = (
    "anchor basket bridge candle dragon engine falcon forest garden harbor kettle ladder lantern mirror orchard otter "
    "pillow rocket saddle temple turtle umbrella valley violin wagon willow"
)
NEEDLE = "The secret code of the {} is {}."
QUESTION = "\n\nThe secret code of the {} is"
NEEDLES = 4
CHOICES = 8

Count = Callable[[str], int]


def haystack() -> list[str]:
    """Sentences of the held-out text that comes with headq_ao."""
    lines = find_text("bundled", "report").read_text(encoding="utf-8").splitlines()
    text = " ".join(line for line in lines if line and not line.startswith("="))
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", text) if not re.search(r"\d", sentence)]


def document(rng: random.Random, length: int, sentences: list[str], count: Count) -> dict[str, Any]:
    """One prompt of at most ``length`` tokens: four codes at random places among sentences, one of them asked for.

    The sentences run on from a random one, again from the first after the last. Wrong choices are the other codes of
    the prompt, then codes that do not occur in it.
    """
    names = rng.sample(OBJECTS.split(), NEEDLES)
    codes = [str(code) for code in rng.sample(range(1000, 10000), CHOICES)]
    needles = [NEEDLE.format(*pair) for pair in zip(names, codes, strict=False)]
    question = QUESTION.format(names[0])
    room = length - sum(count(" " + needle) for needle in needles) - count(question)
    body: list[str] = []
    for sentence in itertools.islice(itertools.cycle(sentences), rng.randrange(len(sentences)), None):
        room -= count(" " + sentence)
        if room < 0:
            break
        body.append(sentence)
    for needle in needles:
        body.insert(rng.randrange(len(body) + 1), needle)
    place = body.index(needles[0]) / max(len(body) - 1, 1)
    answer = rng.randrange(CHOICES)
    choices = codes[1:]
    choices.insert(answer, codes[0])
    prompt = " ".join(body) + question
    return {"prompt": prompt, "choices": choices, "answer": answer, "code": codes[0], "place": place}


@functools.cache
def load_tokenizer(name: str, gguf_file: str | None) -> Any:
    """The tokenizer of a model, by the names that ``--model_args`` takes."""
    source = resolve_model({"pretrained": name, "gguf_file": gguf_file})
    options = {} if source["gguf_file"] is None else {"gguf_file": source["gguf_file"]}
    return AutoTokenizer.from_pretrained(source["pretrained"], **options)


def dataset(
    length: int | None = None,
    recall_length: int = 1024,
    recall_items: int = 100,
    recall_seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    gguf_file: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """What lm-eval's ``custom_dataset`` asks for; ``--metadata recall_seed=N`` sets an argument.

    Args:
        length: most tokens of a prompt, of a task that fixes it; the shortest prompt is a sentence shorter.
        recall_length: the same for tasks that do not fix it.
        recall_items, recall_seed: how many prompts and which.
        tokenizer, pretrained, gguf_file: whose tokens are counted; lm-eval passes the model arguments along.

    Raises:
        ValueError: without the name of a tokenizer.
    """
    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise ValueError(
            "recall tasks count tokens and need a tokenizer; name it in --model_args pretrained=... or in --metadata "
            "tokenizer=..."
        )
    encode = load_tokenizer(name, None if tokenizer else gguf_file)
    count = functools.cache(lambda text: len(encode(text, add_special_tokens=False)["input_ids"]))
    sentences, rng, longest = haystack(), random.Random(recall_seed), length or recall_length
    return {"test": Dataset.from_list([document(rng, longest, sentences, count) for _ in range(recall_items)])}


def exact_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether what was generated begins with the code."""
    return {"exact_match": float(results[0].strip().startswith(doc["code"]))}
