"""``recipes/serving.py``: unequal prompts over a shared prefix in one batch, several turns, bounded memory."""

import pytest
import torch

from headq_ao import HeadQCache, estimate_memory, headq_config, quantize_
from tests.conftest import load_recipe

FAST = {"warmup_tokens": 64, "residual_length": 32, "block_size": 16}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("serving")


def prompt(length, seed):
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def turns_of(n):
    """Turns of a few to 40 tokens; some conversations have three, some one."""
    return [[prompt(3 + (7 * i + 11 * t) % 38, 10 * i + t) for t in range(1 + i % 3)] for i in range(n)]


@torch.no_grad()
def alone(model, prefix, turns, length, sizes):
    """Each conversation by itself on a cache of its own, in calls of as many tokens as the server's."""
    answers = []
    for turn in turns:
        cache, steps = HeadQCache(model), iter(sizes)
        model(torch.tensor([prefix]), cache=cache)
        feed, mine = [], []
        for user in turn:
            feed += user
            answer = []
            while len(answer) < length:
                n = next(steps)
                logits = model(torch.tensor([feed[:n]]), cache=cache).logits
                feed = feed[n:]
                if not feed:
                    answer.append(int(logits[0, -1].argmax()))
                    feed = [answer[-1]]
            mine.append(answer)
        answers.append(mine)
    return answers


@pytest.mark.parametrize("options", [{}, {"key_codec": "affine", "value_codec": "affine"}], ids=["visible", "affine"])
def test_each_row_answers_as_if_alone(recipe, tiny, monkeypatch, options):
    model, prefix, turns = tiny().double(), prompt(150, 99), turns_of(8)
    quantize_(model, headq_config(**FAST | options))
    server, sizes = recipe.Server(model, prefix, [], 7), []
    forward = server.forward
    monkeypatch.setattr(server, "forward", lambda rows: sizes.append(len(rows[0])) or forward(rows))
    conversations = [recipe.Conversation(i, list(t)) for i, t in enumerate(turns)]
    events = list(server.serve(conversations, 8))
    assert max(sizes) > 1
    assert [c.answers for c in conversations] == alone(model, prefix, turns, 7, sizes)
    assert len(events) == 7 * sum(map(len, turns))
    for c in conversations:
        mine = [(e.turn, e.token, e.last) for e in events if e.conversation == c.number]
        assert mine == [(t + 1, a, i == 6) for t, answer in enumerate(c.answers) for i, a in enumerate(answer)]
    longest = len(prefix) + max(sum(map(len, t)) + 7 * len(t) for t in turns)
    assert server.most_tokens <= longest
    assert server.cache.packed_fraction > 0


def test_batches_after_the_first_start_from_the_prefix(recipe, tiny):
    """Two batches of 4 on one cache: as long and as large as one batch, not twice that."""
    model, prefix, turns = tiny(), prompt(150, 99), turns_of(8)
    quantize_(model, headq_config(**FAST))
    server = recipe.Server(model, prefix, [], 7)
    conversations = [recipe.Conversation(i, list(t)) for i, t in enumerate(turns)]
    lengths = [server.cache.get_seq_length() for _ in server.serve(conversations, 4)]
    assert all(len(answer) == 7 for c in conversations for answer in c.answers)
    longest = len(prefix) + max(sum(map(len, t)) + 7 * len(t) for t in turns)
    assert max(lengths) <= longest
    estimate = estimate_memory(model, headq_config(**FAST), longest, 4)
    assert server.peak_bytes < 1.25 * sum(estimate.bytes.values())


def test_stop_tokens_end_an_answer(recipe, tiny):
    model, prefix = tiny(), prompt(150, 99)
    quantize_(model, headq_config(**FAST))
    first = recipe.Conversation(0, [prompt(9, 1)])
    list(recipe.Server(model, prefix, [], 9).serve([first], 1))
    stop = first.answers[0][3]
    second = recipe.Conversation(0, [prompt(9, 1), prompt(5, 2)])
    list(recipe.Server(model, prefix, [stop], 9).serve([second], 1))
    assert second.answers[0] == first.answers[0][: first.answers[0].index(stop) + 1]
    assert len(second.answers) == 2


def test_command(recipe, tiny_folder, tmp_path, capsys):
    """The prefix is stored by the first run and read by the second, which answers the same."""
    (tmp_path / "c.txt").write_text("\n".join(f"w{i} w{i + 1} w{i + 2} | w{2 * i}" for i in range(8)))
    system = " ".join(f"w{i % 100}" for i in range(300))
    arguments = ["--model", str(tiny_folder), "--conversations", str(tmp_path / "c.txt"), "--system", system]
    arguments += ["--answer-length", "5", "--batch-size", "4", "--prefix-cache", str(tmp_path / "prefix")]
    shown = []
    for _ in range(2):
        assert recipe.main(arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "8 conversations" in shown[0] and "[7.2]" in shown[0]
    assert recipe.main([*arguments, "--system", "w1 w2"]) == 2
    assert "the cache holds 300 tokens, the prefix has 2" in capsys.readouterr().err
