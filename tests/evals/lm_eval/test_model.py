"""Scoring through the cache: equal to stock lm-eval when exact, independent of the batch, counted for its task."""

import random

import pytest
import tokenizers
import torch
import transformers

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from headq_ao import HeadQCache, headq_config, quantize_
from headq_ao.evals.lm_eval import HeadQLM, ModelArgumentError, NothingPackedError
from headq_ao.evals.lm_eval import model as module

WORDS = [f"w{i}" for i in range(125)]
SMALL = {"warmup_tokens": 32, "residual_length": 16, "block_size": 16, "chunk_size": 16}


@pytest.fixture
def lm(tiny):
    """``lm(**arguments)``: a HeadQLM around a tiny model; ``stock=True``: lm-eval's own class."""
    words = {"<unk>": 0, "</s>": 1, "<s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")

    def make(stock=False, family="llama", double=False, **arguments):
        model = tiny(family)
        model = model.double() if double else model
        return (HFLM if stock else HeadQLM)(pretrained=model, tokenizer=tokenizer, **arguments)

    return make


def words(n, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=n))


def instance(kind, *arguments, task="task"):
    return Instance(kind, {}, arguments, 0, metadata=(task, 0, 1))


def scored(context_tokens, continuation_tokens, seed=0, task="task"):
    """A request; those of one seed share their context."""
    continuation = " " + words(continuation_tokens, f"{seed}-{continuation_tokens}")
    return instance("loglikelihood", words(context_tokens, seed), continuation, task=task)


LENGTHS = [(150, 3), (33, 20), (1, 100), (150, 40), (90, 1), (120, 17)]
REQUESTS = [scored(*lengths, seed=i) for i, lengths in enumerate(LENGTHS)]
SHARED = [scored(140, n, seed=9) for n in (1, 2, 30)]
TEXTS = [instance("loglikelihood_rolling", words(n, n)) for n in (300, 20, 129, 128)]


def prompts(n_new=10):
    until = {"until": ["nothing"], "max_gen_toks": n_new}
    return [instance("generate_until", words(n, n), dict(until)) for n in (60, 110, 1, 30)]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_exact_cache_equals_stock(lm, family, batch_size):
    stock = lm(stock=True, family=family, batch_size=batch_size, max_length=128)
    ours = lm(family=family, batch_size=batch_size, max_length=128, quantized=False, chunk_size=16)
    for method, requests in (("loglikelihood", REQUESTS + SHARED), ("loglikelihood_rolling", TEXTS)):
        expected, found = getattr(stock, method)(requests), getattr(ours, method)(requests)
        tokens = [len(request.args[-1].split()) for request in requests]
        for a, b, n in zip(expected, found, tokens, strict=True):
            a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
            torch.testing.assert_close(b, a, rtol=0, atol=1e-4 * n)
    assert stock.generate_until(prompts()) == ours.generate_until(prompts())


def test_greedy_flag_equals_stock(lm):
    """A continuation that the model would write itself."""
    stock, ours = lm(stock=True), lm(quantized=False, chunk_size=4)
    context = words(20, 1)
    (written,) = stock.generate_until([instance("generate_until", context, {"until": ["x"], "max_gen_toks": 9})])
    requests = [instance("loglikelihood", context, " " + text) for text in (written, words(9, 2))]
    flags = [answer[1] for answer in ours.loglikelihood(requests)]
    assert flags == [answer[1] for answer in stock.loglikelihood(requests)] == [True, False]


@pytest.mark.parametrize(("family", "prefill"), [("llama", None), ("llama", 32), ("gpt2", None), ("mistral", 32)])
def test_answers_do_not_depend_on_the_batch(lm, family, prefill):
    one, four = (lm(family=family, double=True, batch_size=n, prefill=prefill, **SMALL) for n in (1, 4))
    for method, requests in (("loglikelihood", REQUESTS + SHARED), ("loglikelihood_rolling", TEXTS)):
        alone, together = getattr(one, method)(requests), getattr(four, method)(requests)
        torch.testing.assert_close(
            torch.tensor(together, dtype=torch.float64), torch.tensor(alone, dtype=torch.float64), rtol=0, atol=1e-9
        )
    assert one.generate_until(prompts()) == four.generate_until(prompts())
    counts = [(task.packed, task.read) for lm in (one, four) for task in lm.tasks.values()]
    assert counts[0] == counts[1] and counts[0][0] > 0


def test_packed_rows_are_read(lm):
    """The packed cache gives other numbers than the exact one, near ones at 8 bits."""
    exact, coarse, fine = lm(quantized=False), lm(**SMALL), lm(k_bits=8, v_bits=8, rank=0, **SMALL)
    answers = [torch.tensor([a[0] for a in each.loglikelihood(REQUESTS)]) for each in (exact, coarse, fine)]
    error = [(answer - answers[0]).abs().max().item() for answer in answers[1:]]
    assert error[0] > 10 * error[1] and error[1] < 0.1


def test_score_is_that_of_a_loop_over_the_model(lm):
    """One request by hand: the context at once, its last token and the continuation in chunks of two."""
    each = lm(double=True, **SMALL | {"chunk_size": 2})
    request = scored(100, 5)
    ((found, _),) = each.loglikelihood([request])
    ids = each.tokenizer(" ".join(request.args), return_tensors="pt")["input_ids"]
    cache = HeadQCache(each.model)
    with torch.no_grad():
        each.model(ids[:, :99], cache=cache)
        before = cache.rows_read
        logits = torch.cat([each.model(ids[:, i : min(i + 2, 104)], cache=cache).logits for i in (99, 101, 103)], 1)
    expected = logits.log_softmax(-1)[0].gather(-1, ids[0, 100:, None]).sum()
    assert found == pytest.approx(expected.item(), abs=1e-9)
    assert each.tasks["task"].packed == cache.rows_read[0] - before[0] > 0
    assert each.tasks["task"].read == cache.rows_read[1] - before[1]


def test_prefill_sends_the_context_in_chunks(lm, monkeypatch):
    calls = []
    each = lm(prefill=32, **SMALL)
    each.model.register_forward_pre_hook(lambda model, args, kwargs: calls.append(args[0].shape), with_kwargs=True)
    each.loglikelihood([scored(70, 20)])
    assert [shape[1] for shape in calls] == [32, 16, 16, 5, 16, 4]
    assert each.tasks["task"].read == 2 * sum(range(70, 90))


def test_shared_context_goes_in_once(lm):
    calls = []
    each = lm(batch_size=3, **SMALL)
    each.model.register_forward_pre_hook(lambda model, args, kwargs: calls.append(args[0].shape), with_kwargs=True)
    each.loglikelihood(SHARED)
    assert [tuple(shape) for shape in calls] == [(1, 139), (3, 16), (3, 14)]


def test_first_generated_token_reads_the_cache(lm):
    each = lm(**SMALL)
    each.generate_until([instance("generate_until", words(100, 1), {"until": ["x"], "max_gen_toks": 1})])
    assert each.tasks["task"].packed > 0
    assert each.tasks["task"].read == 2 * 100


def test_beam_search(lm):
    """The cache holds each prompt once per beam."""
    arguments = {"until": ["x"], "max_gen_toks": 6, "num_beams": 3}
    requests = [instance("generate_until", words(n, n), dict(arguments)) for n in (50, 80)]
    exact = lm(batch_size=2, quantized=False).generate_until(requests)
    assert exact == lm(stock=True, batch_size=2).generate_until(requests)
    each = lm(batch_size=2, k_bits=8, v_bits=8, rank=0, **SMALL)
    assert each.generate_until(requests) == exact
    assert each.tasks["task"].packed > 0


def test_automatic_batch_size(lm):
    each = lm(double=True, batch_size="auto", max_batch_size=4, max_length=192, **SMALL)
    torch.testing.assert_close(
        torch.tensor(each.loglikelihood(REQUESTS), dtype=torch.float64),
        torch.tensor(lm(double=True, **SMALL).loglikelihood(REQUESTS), dtype=torch.float64),
        rtol=0,
        atol=1e-9,
    )
    assert each.batch_sizes == {0: 4}


def test_automatic_batch_size_with_chunked_prompts(lm):
    """Prompts that go in by chunks make batches of their own; none is left out or answered twice."""
    fixed, each = (
        lm(prefill=32, **SMALL),
        lm(prefill=32, batch_size="auto:2", max_batch_size=2, max_length=192, **SMALL),
    )
    torch.testing.assert_close(
        torch.tensor(each.loglikelihood(REQUESTS + SHARED)),
        torch.tensor(fixed.loglikelihood(REQUESTS + SHARED)),
        rtol=0.05,
        atol=0.1,
    )


def test_counts_by_task(lm, caplog):
    each = lm(**SMALL)
    answers = each.loglikelihood([scored(150, 3, task="long"), scored(20, 3, task="short"), scored(90, 3, task="long")])
    assert answers == lm(**SMALL).loglikelihood([scored(150, 3), scored(20, 3), scored(90, 3)])
    info = each.get_model_info()["headq"]
    assert {name: task["requests"] for name, task in info["tasks"].items()} == {"long": 2, "short": 1}
    assert info["tasks"]["long"]["packed_fraction"] > 0.6 > 0.5 > info["tasks"]["short"]["packed_fraction"]
    assert info["tasks"]["long"]["bits"]["key_body_bits"] == 2.25
    assert (info["chunk_size"], info["prefill"], info["min_context"]) == (16, None, 0)
    assert info["config"]["residual_length"] == 16 and info["config"]["n_sink"] == 4
    assert "short: 0 % of the rows" in caplog.text and "long:" not in caplog.text


def test_table_is_printed(lm, capsys):
    each = lm(**SMALL)
    each.loglikelihood([scored(150, 3, task="long")])
    capsys.readouterr()
    each.get_model_info()
    head, _, line = capsys.readouterr().out.strip().splitlines()
    assert "packed_fraction" in head
    assert line.startswith("|long |1") and "2.25 / 2.50" in line


def test_fails_when_nothing_was_packed(lm):
    each = lm()
    each.loglikelihood([scored(50, 3)])
    with pytest.raises(NothingPackedError, match="no packed token was read in task: the scores would be those of the"):
        each.get_model_info()


def test_exact_cache_may_read_no_packed_row(lm):
    each = lm(quantized=False)
    each.loglikelihood([scored(50, 3)])
    info = each.get_model_info()["headq"]
    assert info["quantized"] is False and info["config"] is None
    assert info["tasks"]["task"]["packed_fraction"] == 0


def test_min_context(lm):
    """Short prompts are filled up in front, long ones and texts are left alone; the filling changes the answer only."""
    plain, filled = (lm(quantized=False, min_context=n) for n in (0, 100))
    requests = [scored(20, 3, seed=1), scored(150, 3, seed=2)]
    (short, long), (short_filled, long_filled) = (each.loglikelihood(requests) for each in (plain, filled))
    assert long == long_filled and short != short_filled
    assert filled.tasks["task"].filled == 1
    assert filled.loglikelihood_rolling(TEXTS) == plain.loglikelihood_rolling(TEXTS)
    filled.generate_until(prompts())
    assert filled.tasks["task"].filled == 1 + 3
    info = filled.get_model_info()["headq"]
    assert info["min_context"] == 100 and info["neutral_text"] == "neutral.txt"


def test_min_context_fills_with_neutral_text(lm):
    each = lm(quantized=False, min_context=1000)
    text = module.fill_front("w1 w2", 1000, each.tokenizer, each.tok_encode)
    assert text.endswith("\n\nw1 w2")
    assert 1000 <= len(each.tok_encode(text)) < 1010
    assert module.fill_front(text, 1000, each.tokenizer, each.tok_encode) == text


def test_min_context_makes_short_prompts_read_packed_rows(lm):
    each = lm(min_context=100, **SMALL)
    each.loglikelihood([scored(10, 3)])
    each.generate_until([instance("generate_until", words(5, 1), {"until": ["x"], "max_gen_toks": 2})])
    assert each.get_model_info()["headq"]["tasks"]["task"]["packed_fraction"] > 0.6


def test_long_prompts_are_cut_on_the_left(lm):
    stock, ours = lm(stock=True, max_length=64), lm(quantized=False, max_length=64)
    requests = [scored(100, 5), scored(100, 64)]
    expected = stock.loglikelihood(requests)
    torch.testing.assert_close(torch.tensor(ours.loglikelihood(requests)), torch.tensor(expected), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="1 to max_length=64 continuation tokens, got 100 and 65"):
        ours.loglikelihood([scored(100, 65)])


def test_half_precision_is_scored_in_float32(tiny, lm):
    each = lm(quantized=False)
    each.model.to(torch.bfloat16)
    ((answer, _),) = each.loglikelihood([scored(30, 1)])
    assert answer != torch.tensor(answer).bfloat16().item()


def test_mixed_precision_of_the_exact_cache(lm):
    plain, mixed = (lm(quantized=False, mixed_precision_dtype=dtype) for dtype in (None, "bfloat16"))
    answers = [torch.tensor([a[0] for a in each.loglikelihood(REQUESTS)]) for each in (plain, mixed)]
    assert 1e-3 < (answers[0] - answers[1]).abs().max() < 2
    assert all(isinstance(text, str) for text in mixed.generate_until(prompts(2)))


def test_stored_answers_of_another_cache_are_refused(lm, tmp_path):
    store, requests = str(tmp_path / "answers"), [scored(150, 3)]
    first = lm(**SMALL)
    answers = CachingLM(first, store).loglikelihood(requests)
    again = lm(**SMALL)
    assert CachingLM(again, store).loglikelihood(requests) == answers
    assert again.tasks == {}
    again.get_model_info()
    for other in (lm(**SMALL | {"k_bits": 3}), lm(quantized=False), lm(**SMALL | {"chunk_size": 8})):
        with pytest.raises(ModelArgumentError, match="answers of another model or cache"):
            CachingLM(other, store)


def test_lm_evals_own_model_is_told_that_it_reads_no_cache(lm, recwarn):
    """Once; and its generation, and HeadQ's own model, are not."""
    stock = lm(stock=True)
    quantize_(stock.model, headq_config())
    stock.generate_until(prompts(2)[:1])
    assert not [w for w in recwarn if "reads no cached token" in str(w.message)]
    with pytest.warns(UserWarning, match="headq-lm-eval --model headq feeds each request through the cache"):
        stock.loglikelihood(REQUESTS[:1])
    stock.loglikelihood(REQUESTS[1:2])
    lm(**SMALL).loglikelihood(REQUESTS[:1])
    assert not [w for w in recwarn if "reads no cached token" in str(w.message)]  # pytest.warns has had the only one
