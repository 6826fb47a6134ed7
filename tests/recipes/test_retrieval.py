"""The retrieval recipe: building contexts, scoring and cropping, the bootstrap, the table."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from headq_ao.cache.memory_report import NothingPackedError
from headq_ao.evals.harness.subjects import Subject
from headq_ao.evals.results import tables
from tests.conftest import VOCAB, load_recipe

retrieval = load_recipe("retrieval")

SENTENCES = [f"{word} and {word} go on." for word in "abcdefghijklmnop"]
PLAIN = retrieval.Frame("", "\n\n")
CHAT = retrieval.Frame("Remember these.\n\n", "\nAnswer: ")


class Words:
    """A tokenizer of words with numbers given as they come."""

    chat_template = None

    def __init__(self, pieces=()):
        self.ids, self.pieces = {}, set(pieces)

    def __call__(self, text):
        words = text.replace(".", " .").replace("\n", " \n ").split(" ")
        words = [part for w in words if w for part in ((w, w) if w in self.pieces else (w,))]
        return [self.ids.setdefault(w, len(self.ids)) for w in words]

    def decode(self, ids):
        words = {i: word for word, i in self.ids.items()}
        return " ".join(words[i] for i in ids)


def build(encode=None, frame=PLAIN, seed=0, tokens=600, pairs=6, questions=3, choices=4):
    encode = encode or Words()
    return encode, retrieval.build(encode, frame, SENTENCES, seed, tokens, pairs, questions, choices)


@pytest.mark.parametrize("frame", [PLAIN, CHAT])
@pytest.mark.parametrize("seed", range(5))
def test_context(seed, frame):
    encode, context = build(frame=frame, seed=seed)
    text = encode.decode(context.ids)
    assert 590 < len(context.ids) <= 600 and context == build(frame=frame, seed=seed)[1]
    assert context != build(frame=frame, seed=seed + 1)[1]
    assert text.startswith(encode.decode(encode(frame.before)))
    facts = dict(part.split(" is ") for part in text.replace(" .", "").split("The password of ")[1:])
    facts = {name: value.split()[0] for name, value in facts.items()}
    assert len(facts) == 6 and len(set(facts.values())) == 6
    assert len({q.ids for q in context.questions}) == 3
    for question in context.questions:
        name = encode.decode(question.ids).split()[-2]
        values = [encode.decode([i]) for i in question.choices]
        assert values[question.answer] == facts[name] and len(set(values)) == 4 and set(values) <= set(facts.values())
        fact = encode(f" The password of {name} is {facts[name]}.")
        at = round(question.depth * 600)
        assert list(context.ids[at : at + len(fact)]) == fact


def test_facts_stand_at_every_depth_and_none_at_the_end():
    depths = np.array([sorted(q.depth for q in build(seed=s, questions=6)[1].questions) for s in range(40)])
    assert depths.max() <= 1 - retrieval.TAIL / 600
    assert (np.diff(depths.mean(0)) > 0.05).all() and depths.min() > 0
    asked = [q.depth for s in range(40) for q in build(seed=s, pairs=6, questions=2)[1].questions]
    assert min(asked) < 0.3 and max(asked) > 0.5
    assert {build(seed=s)[1].questions[0].answer for s in range(40)} == {0, 1, 2, 3}


def test_filler_uses_every_sentence_before_any_again():
    stream = retrieval.filler(random.Random(0), SENTENCES)
    first, second = ([next(stream) for _ in SENTENCES] for _ in range(2))
    assert sorted(first) == sorted(second) == SENTENCES and first != second != SENTENCES


def test_context_errors():
    with pytest.raises(ValueError, match=r"6 pairs need a context of at least \d+ tokens, got 300"):
        build(tokens=300)
    values = retrieval.VALUES.split()
    with pytest.raises(ValueError, match="only 4 values are one token"):
        build(encode=Words(values[4:]))
    encode, context = build(encode=Words(values[6:]))
    assert {encode.decode([i]) for q in context.questions for i in q.choices} <= set(values[:6])


def test_frame_of_a_tokenizer():
    tokenizer = Words()
    assert retrieval.Frame.of(tokenizer) == PLAIN
    tokenizer.chat_template = "some"
    tokenizer.apply_chat_template = lambda chat, **_: f"<user>{chat[0]['content']}<end><assistant>"
    frame = retrieval.Frame.of(tokenizer)
    assert frame == retrieval.Frame(f"<user>{retrieval.INSTRUCTION}\n\n", "<end><assistant>")
    assert frame.question("Clara") == "<end><assistant>The password of Clara is"


@pytest.fixture
def contexts(token_ids):
    """Two contexts of random tokens with four questions of unequal lengths each."""

    def context(seed):
        ids = token_ids(5, 500, seed=seed).tolist()
        questions = [
            retrieval.Question(tuple(ids[i + 1][: 3 + 9 * i]), tuple(ids[i + 1][100:104]), i, i / 4) for i in range(4)
        ]
        return retrieval.Context(tuple(ids[0]), tuple(questions))

    return [context(0), context(1)]


def test_exact_answers_equal_those_computed_again(tiny, contexts):
    model = tiny()
    answers = retrieval.answer_all(model, Subject("exact"), contexts, "exact", progress=False)
    for c, context in enumerate(contexts):
        for q, question in enumerate(context.questions):
            ids = torch.tensor([context.ids + question.ids])
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, -1, list(question.choices)]
            assert answers.correct[c, q] == (logits.argmax() == question.answer)
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(question.answer))
            assert answers.nll[c, q] == pytest.approx(expected.item(), abs=1e-5)
    assert (answers.packed_fraction, answers.bits) == (0, None)
    assert 0 < answers.correct.sum() < 8, "both answers occur, so that the comparison says something"


def test_asking_leaves_the_cache_as_it_was(tiny, contexts):
    model = tiny()
    cache = DynamicCache(config=model.config)
    retrieval.prefill(model, cache, contexts[0].ids, 100)
    first = [retrieval.ask(model, cache, q) for q in contexts[0].questions]
    assert cache.get_seq_length() == 500
    again = [retrieval.ask(model, cache, q) for q in reversed(contexts[0].questions)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@pytest.mark.parametrize(
    ("method", "options", "bits"),
    [
        ("headq", {"k_bits": 2, "v_bits": 2, "key_codec": "affine", "value_codec": "affine", "rank": 0}, 2.5),
        ("kivi", {"k_bits": 2, "v_bits": 2, "k_group": 32, "v_group": 32}, 3.0),
    ],
)
def test_packed_answers(tiny, contexts, method, options, bits):
    model = tiny()
    exact = retrieval.answer_all(model, Subject("exact"), contexts, "exact", progress=False)
    packed = retrieval.answer_all(model, Subject(method, options), contexts, method, progress=False)
    assert packed.bits == bits and 0.8 < packed.packed_fraction < 1
    assert 0 < np.abs(packed.nll - exact.nll).max() < 3
    short = [dataclasses.replace(c, ids=c.ids[:40]) for c in contexts]
    with pytest.raises(NothingPackedError):
        retrieval.answer_all(model, Subject(method, options), short, method, progress=False)
    assert getattr(model, "_headq", None) is None


def test_interval_of_pairs():
    rng = np.random.default_rng(0)
    exact = (rng.random((400, 5)) < 0.8).astype(float)
    mean, low, high = retrieval.paired_interval(exact, exact)
    assert mean == low == high == 0
    # what all caches have in common does not widen it
    mean, low, high = retrieval.paired_interval(exact - 0.1, exact)
    assert mean == pytest.approx(-0.1) and low == pytest.approx(high)
    # the width is that of the mean over contexts
    x = np.repeat(rng.standard_normal((400, 1)), 5, 1)
    mean, low, high = retrieval.paired_interval(x, np.zeros_like(x))
    width = 2 * 1.96 * x[:, 0].std() / 20
    assert low < mean < high and high - low == pytest.approx(width, rel=0.05)
    assert retrieval.paired_interval(x, np.zeros_like(x)) == (mean, low, high)
    assert retrieval.paired_interval(x, np.zeros_like(x), seed=1) != (mean, low, high)


def entries(contexts):
    exact = retrieval.Answers(np.array([[1.0, 1, 1, 0], [1, 1, 0, 1]]), np.full((2, 4), 0.5), 0.0, None)
    packed = retrieval.Answers(np.array([[1.0, 1, 0, 0], [1, 1, 0, 1]]), np.full((2, 4), 0.75), 0.875, 2.5)
    return {
        "exact": retrieval.summarize(exact, exact, contexts, 0),
        "headq": retrieval.summarize(packed, exact, contexts, 0),
    }


def test_summary(contexts):
    found = entries(contexts)
    assert json.loads(json.dumps(found)) == found
    assert found["exact"]["accuracy"] == 0.75 and found["exact"]["accuracy_difference"]["mean"] == 0
    packed = found["headq"]
    assert packed["accuracy_difference"] == {"mean": -0.125, "low": -0.25, "high": 0.0}
    assert packed["choice_nll_difference"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert packed["accuracy_by_depth"] == {"first": 1.0, "middle": 0.0, "last": 0.5}
    assert packed["correct"] == ["1100", "1101"] and packed["packed_fraction"] == 0.875


def test_table(contexts):
    settings = {"contexts": 2, "questions": 4, "tokens": 500, "pairs": 6, "choices": 4, "model": "tiny"}
    settings |= {"dtype": "float32", "calibration": "wiki.valid.raw"}
    result = {"settings": settings, "subjects": entries(contexts), "environment": {"cpu": "Some CPU"}}
    text = tables.retrieval(result)
    assert text.startswith("| 8 questions, 500 tokens of context |")
    assert "| exact |  | 75.0 % |  |\n" in text
    assert "| HeadQ, default | 2.50 | 62.5 % | -12.5 points (-25.0 to +0.0) |\n" in text
    assert "guessing: 25.0 %" in text and "at least 88 % of the tokens" in text
    assert set(tables.CACHES) == set(retrieval.SUBJECTS) | {"exact"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "1"], "--contexts must be at least 2, got 1"),
        (["--pairs", "99"], "--pairs must be from 2 to 24, got 99"),
        (["--pairs", "4", "--questions", "5"], "--questions must be from 1 to 4, got 5"),
        (["--choices", "1"], "--choices must be from 2 to 10, got 1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--calibration", "nowhere.txt"], "no text file 'nowhere.txt'"),
        (["--tokens", "5000"], "the model has 4096 positions, got 5000"),
        (["--tokens", "300"], "10 pairs need a context of at least"),
    ],
)
def test_errors_before_work(arguments, message, tiny, monkeypatch, capsys):
    encode = Words()

    def tokenizer(text, add_special_tokens):
        return {"input_ids": encode(text)}

    tokenizer.chat_template = None
    monkeypatch.setattr(retrieval, "load", lambda *_: (tiny(), tokenizer))
    monkeypatch.setattr(retrieval, "calibrate_on", lambda *_, **__: pytest.fail("work has started"))
    assert retrieval.main(["--calibration", "bundled", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_whole_run(tiny, monkeypatch, tmp_path, capsys):
    class Hashed:
        """Words by a number of their own below the vocabulary of the tiny model."""

        chat_template = None

        def __call__(self, text, add_special_tokens):
            words = text.replace(".", " .").split()
            return {"input_ids": [3 + sum(w.encode()) % (VOCAB - 3) for w in words]}

    monkeypatch.setattr(retrieval, "load", lambda *_: (tiny(head_dim=64), Hashed()))
    monkeypatch.setattr(retrieval, "calibrate_on", lambda *_, **__: None)
    path = tmp_path / "r.json"
    command = "--calibration bundled --contexts 2 --tokens 700 --questions 3 --subjects headq_2bit turboquant_2bit"
    assert retrieval.main([*command.split(), "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["subjects"]) == ["exact", "headq_2bit", "turboquant_2bit"]
    assert result["exact_at_least_half"] is (result["subjects"]["exact"]["accuracy"] >= 0.5)
    assert result["settings"]["calibration"] == "calibration.txt" and result["settings"]["guessing"] == 1 / 8
    assert result["subjects"]["turboquant_2bit"]["options"] == {"k_bits": 2, "v_bits": 2}
    assert result["environment"]["command"]
    out, err = capsys.readouterr()
    assert "turboquant_2bit: 0." in out and ("below one half" in err) is not result["exact_at_least_half"]
    one = f"--calibration bundled --contexts 2 --tokens 700 --questions 3 --keep --json {path}".split()
    assert retrieval.main([*one, "--subjects", "turboquant_2bit"]) == 0
    kept = json.loads(path.read_text(encoding="utf-8"))["subjects"]
    assert list(kept) == list(result["subjects"])
    assert kept["headq_2bit"] == result["subjects"]["headq_2bit"] | {"environment": result["environment"]}
    assert "environment" not in kept["turboquant_2bit"]
    assert retrieval.main([*one, "--subjects", "turboquant_2bit", "--seed", "7"]) == 2
    assert "which differ in seed" in capsys.readouterr().err
    changed = json.loads(path.read_text(encoding="utf-8"))
    changed["subjects"]["exact"]["correct"][0] = "no"
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert retrieval.main([*one, "--subjects", "turboquant_2bit"]) == 1
    assert "answers otherwise" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        retrieval.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "examples:" in text and "guessing scores 1 in --choices" in text
