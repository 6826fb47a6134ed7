"""Plain facts with one right ending among four, from the pairs in ``choice.json``."""

import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

PAIRS = Path(__file__).parent / "choice.json"  # written for this project, CC0 1.0
CHOICES = 4


def documents(seed: int = 0) -> list[dict[str, Any]]:
    """One document per pair: ``question``, four ``choices``, the right one's number as ``answer``; in random order.

    Args:
        seed: of the wrong endings, which are other answers to the same question, of the places, and of the order.

    Example:
        >>> from headq_ao.evals.tasks.choice import documents
        >>> document = documents()[0]
        >>> len(document["choices"]), document["choices"][document["answer"]] in document["choices"]
        (4, True)
    """
    rng = random.Random(seed)
    found = []
    for question, pairs in json.loads(PAIRS.read_text(encoding="utf-8")).items():
        for subject, right in pairs.items():
            choices = rng.sample(sorted(set(pairs.values()) - {right}), CHOICES - 1)
            answer = rng.randrange(CHOICES)
            choices.insert(answer, right)
            found.append({"question": question.format(subject), "choices": choices, "answer": answer})
    rng.shuffle(found)
    return found


def dataset(choice_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """What lm-eval's ``custom_dataset`` asks for; ``--metadata choice_seed=N`` sets the seed."""
    return {"test": Dataset.from_list(documents(choice_seed))}
