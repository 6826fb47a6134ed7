"""What calibrate is given: forms of batches, masks and paddings, and which tokens count."""

import sys

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from headq_ao import calibrate
from headq_ao.calibration.text import REPEATS, counted_tokens, effective_tokens, read_batches, surprises
from headq_ao.evals.harness import inputs
from headq_ao.statistics.moments import PROFILE, TENSORS

pytestmark = pytest.mark.filterwarnings("ignore:HeadQ. the calibration rests on")
A, B, C = ([*range(start, start + n)] for start, n in ((10, 9), (30, 7), (50, 9)))


def padded(rows, width, left, pad=0):
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if left else slice(len(row))
        ids[i, at], mask[i, at] = torch.as_tensor(row), 1
    return ids, mask


RIGHT, RIGHT_MASK = padded([A, B], 12, left=False)
LEFT, LEFT_MASK = padded([A, B], 12, left=True)
FORMS = {
    "a row": ([torch.tensor(A)], None, [[A]]),
    "a batch": ([torch.tensor([A, C])], None, [[A, C]]),
    "one tensor": (torch.tensor([A, C]), None, [[A], [C]]),
    "lists": ([A, [A, C]], None, [[A], [A, C]]),
    "tuples": (((A, C), tuple(A)), None, [[A, C], [A]]),
    "lists of tensors": ([[torch.tensor(A), torch.tensor(B)]], None, [[A], [B]]),
    "arrays": ([np.array([A, C], dtype=np.int32)], None, [[A, C]]),
    "small integers": ([torch.tensor(A, dtype=torch.int16)], None, [[A]]),
    "a generator": ((torch.tensor(x) for x in (A, B)), None, [[A], [B]]),
    "rows of several lengths": ([[A, B]], None, [[A], [B]]),
    "a dict": ({"input_ids": RIGHT, "attention_mask": RIGHT_MASK}, None, [[A], [B]]),
    "a dict without a mask": ([{"input_ids": torch.tensor([A])}], None, [[A]]),
    "an encoding": (BatchEncoding({"input_ids": LEFT, "attention_mask": LEFT_MASK}), None, [[A], [B]]),
    "encodings": ([BatchEncoding({"input_ids": x, "token_type_ids": x}) for x in (A, [A, C])], None, [[A], [A, C]]),
    "an encoding of lists": (
        BatchEncoding({"input_ids": [A, B], "attention_mask": [[1] * 9, [1] * 7]}), None, [[A], [B]]
    ),
    "a mask": ([RIGHT, LEFT], [RIGHT_MASK, LEFT_MASK], [[A], [B], [A], [B]]),
    "a mask of a tensor": (LEFT, LEFT_MASK, [[A], [B]]),
    "a mask of an encoding": ({"input_ids": LEFT}, LEFT_MASK, [[A], [B]]),
    "a bool mask": ([RIGHT], [RIGHT_MASK.bool()], [[A], [B]]),
    "a float mask": ([RIGHT], [RIGHT_MASK.float()], [[A], [B]]),
    "masks where there is padding": ([torch.tensor(A), LEFT], [None, LEFT_MASK], [[A], [A], [B]]),
    "equal rows stay together": (padded([A, C], 12, False)[0][None], padded([A, C], 12, False)[1][None], [[A, C]]),
    "an empty row": ([padded([A, []], 12, False)[0]], [padded([A, []], 12, False)[1]], [[A]]),
    "a row of sinks": ([[A, [1, 2, 3]]], None, [[A]]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    batches, mask, want = FORMS[form]
    found = read_batches(batches, mask, 3, 128)
    assert [x.tolist() for x in found] == want
    assert all(x.dtype == torch.long and x.device.type == "cpu" for x in found)


REFUSED = {
    "nothing": ([], None, "got none"),
    "a number": (3, None, "got a int"),
    "None": (None, None, "got a NoneType"),
    "a text": ("some text", None, "got a str"),
    "texts": (["some text"], None, "batch 0: a str"),
    "texts in a list": ([["some text", "more"]], None, "batch 0: a str"),
    "four dimensions": ([torch.ones(1, 1, 1, 9).long()], None, r"batch 0: a Tensor of shape \(1, 1, 1, 9\)"),
    "floats": ([torch.ones(9)], None, "batch 0: torch.float32"),
    "bools": ([torch.ones(9).bool()], None, "batch 0: torch.bool"),
    "ids below 0": ([torch.tensor([*A, -100])], None, "batch 0: ids from -100 to 18"),
    "ids above the vocabulary": ([A, [*A, 128]], None, "batch 1: ids from 10 to 128, of a vocabulary of 128"),
    "no ids": ({"inputs_embeds": torch.ones(1, 9, 4)}, None, "batch 0: a dict with 'inputs_embeds'"),
    "an empty dict": ([{}], None, "batch 0: a dict with nothing"),
    "objects": ([object()], None, "batch 0: a object"),
    "short rows": ([[1, 2, 3]], None, "batch 0: 1 rows of 3"),
    "short rows behind padding": ({"input_ids": [1, 2, 3, 0], "attention_mask": [1, 1, 1, 0]}, None, "rows of fewer"),
    "a mask of another shape": ([RIGHT], [RIGHT_MASK[:, 1:]], r"rows of \[12, 12\], got rows of \[11, 11\]"),
    "a mask for each of two": ([RIGHT, LEFT], [RIGHT_MASK], "a mask for each of 2 batches, got 1"),
    "two masks": ([{"input_ids": RIGHT, "attention_mask": RIGHT_MASK}], [RIGHT_MASK], "of its own; give one of"),
    "a mask with holes": ([A], [[1, 1, 0, 1, 1, 1, 1, 1, 1]], "at the ends of a row; it has holes"),
    "an additive mask": ([A], [[0.0] * 8 + [-1e9]], r"1 for tokens and 0 for padding.* got -1"),
    "a 4-D mask": ([RIGHT], [torch.ones(2, 1, 12, 12)], r"the attention_mask of batch 0: .*\(2, 1, 12, 12\)"),
    "a mask that is a text": ([RIGHT], "causal", "attention_mask must hold a mask for each batch, got a str"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_refused_is_named(form):
    batches, mask, message = REFUSED[form]
    with pytest.raises(ValueError, match=message):
        read_batches(batches, mask, 3, 128)


def moments_of(model, batches, **options):
    made = calibrate(model, batches, **{"progress": False, "context_length": 1, "n_sink": 3} | options)
    return made.layers


def assert_alike(a, b, names=(*TENSORS, *PROFILE)):
    for one, other in zip(a, b, strict=True):
        assert (one.tokens, one.groups, one.effective) == (other.tokens, other.groups, other.effective)
        for name in names:
            want = getattr(other, name)
            torch.testing.assert_close(
                getattr(one, name), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()), msg=name
            )


@pytest.mark.parametrize("context", [1, 1000])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_leaves_no_trace(tiny, token_ids, family, left, context):
    """Moments, samples and profiles, as of the rows alone: left-padded ones begin at position 0, their sinks too."""
    model = tiny(family)
    rows = [token_ids(1, n, seed=n)[0] for n in (150, 120, 90)]
    ids, mask = padded(rows, 170, left)
    want = moments_of(model, rows, context_length=context)
    assert_alike(moments_of(model, [ids], attention_mask=[mask], context_length=context), want)
    assert_alike(moments_of(model, {"input_ids": ids, "attention_mask": mask}, context_length=context), want)


def test_tokens_by_hand():
    """Four rows of one token: the contexts of the first positions come once a row, the full one eight times in all."""
    rows = [torch.full((30,), 5)] * 4
    counted = counted_tokens(rows, 2)
    assert [int(c.sum()) for c in counted] == [2 + 1 + REPEATS, 3, 3, 3]
    assert counted[0].nonzero().flatten().tolist() == list(range(11))
    assert effective_tokens(rows, counted, 2) == 2
    copies = [torch.arange(50)] * 20
    counted = counted_tokens(copies, 4)
    assert [int(c.sum()) for c in counted] == [50] * REPEATS + [4] * 12
    assert effective_tokens(copies, counted, 4) == 46
    few = [torch.randint(4, (4000,), generator=torch.Generator().manual_seed(0))]
    assert effective_tokens(few, counted_tokens(few, 4), 4) <= 4**4


@pytest.mark.parametrize("least", [2000, 900])
def test_text_of_few_different_ids_counts_by_its_contexts(least):
    """Bytes for ids, or records of one form: few ids, but many contexts."""
    text = inputs.find_text("bundled", "calibrate").read_text(encoding="utf-8")[:16384]
    if least == 900:
        text = "".join(f'{{"id": {i * 7919 % 100003}, "ok": {i % 3}}}\n' for i in range(600))
    rows = [torch.tensor(list(text.encode()))]
    assert effective_tokens(rows, counted_tokens(rows, 4), 4) > least / 2


def test_natural_text_counts_nearly_whole():
    """Its words and marks for ids: most of 1000 count as different, whatever comes again and again among them."""
    words = inputs.find_text("bundled", "calibrate").read_text(encoding="utf-8").split()[:1004]
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    rows = [torch.tensor([number[word] for word in words])]
    assert effective_tokens(rows, counted_tokens(rows, 4), 4) > 950


@pytest.mark.parametrize("left", [False, True])
def test_padding_that_no_mask_tells(tiny, token_ids, left):
    """Long runs at the ends of a row are padding too; a row that is one run is none, and short runs stay."""
    rows = [token_ids(1, n, seed=n)[0] for n in (150, 120, 90)]
    for row in rows:
        row[:9], row[-2:] = 8, 9
        row[0] = 7
    ids, _ = padded(rows, 170, left, pad=1)
    assert_alike(moments_of(tiny(), [ids]), moments_of(tiny(), rows))
    assert [x.tolist() for x in read_batches([[0] * 30, A], None, 3, 128)] == [[[0] * 30], [A]]


def test_repeats_are_left_out_of_moments_samples_and_profiles(tiny, token_ids):
    """A row that goes on in one token: keys and values of what counts, queries too."""
    model = tiny(layers=1)
    row = torch.cat([token_ids(1, 300)[0], torch.full((200,), 7), torch.tensor([8])])
    (layer,) = moments_of(model, [row], n_rows=1000)
    n = int(counted_tokens([row], 3)[0][3:].sum())
    assert layer.tokens == n == layer.k_rows.shape[0] < 315
    k = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *x: k.append(x[2]))
    v = []
    other = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *x: v.append(x[2]))
    with torch.no_grad():
        model(row[None], use_cache=False)
    hook.remove(), other.remove()
    values = v[0][0].unflatten(-1, (2, -1))[counted_tokens([row], 3)[0]][3:]
    torch.testing.assert_close(layer.v_sum, values.sum(0), rtol=1e-4, atol=1e-4)
    assert float(layer.k_seen.min()) > 0


def test_rows_that_are_no_text_are_taken_off(tiny, token_ids, monkeypatch):
    """By what the model says of each row; a model that knows nothing is surprised by nothing."""
    model, rows = tiny(), token_ids(4, 104)
    assert calibrate(model, rows, progress=False).effective_tokens == 400
    nats = iter([0.5, 3.1, 0.6, 0.4, 9.0, 9.0, 9.0, 0.1])
    monkeypatch.setattr(
        sys.modules["headq_ao.integrations.transformers.calibrate"],
        "surprises",
        lambda *of: [next(nats) for _ in of[1]],
    )
    assert calibrate(model, [rows], progress=False).effective_tokens == 300 - 100
    with pytest.warns(UserWarning, match=r"rests on 0 effective .* not use it \(3 of 4 rows are no text to this model"):
        made = calibrate(model, [rows[:2], rows[2:]], progress=False)
    assert made.layers[0].tokens == 400 and made.meta["effective_tokens"] == 0


def test_surprise_by_hand():
    """Against the sum over tokens that count, longer than what is held at a time; a token that cannot come."""
    g = torch.Generator().manual_seed(0)
    logits, ids = 3 * torch.randn(2, 300, 7, generator=g), torch.randint(6, (2, 300), generator=g)
    logits[..., 6] = float("-inf")
    counted = torch.rand(2, 300, generator=g) < 0.7
    for b, nats in enumerate(surprises(logits, ids, counted)):
        want = []
        for t in range(1, 300):
            p = logits[b, t - 1].softmax(-1)[:6]
            if counted[b, t]:
                want.append(float(-p[ids[b, t]].log() + (p * p.log()).sum()))
        assert nats == pytest.approx(sum(want) / len(want), rel=1e-4)


def test_short_rows_are_profiled_together(tiny, token_ids):
    model = tiny()
    for layer in moments_of(model, list(token_ids(20, 20))):
        assert layer.errors is not None and bool((layer.errors > 0).all())


def test_one_row_is_a_batch(tiny, token_ids):
    ids = token_ids(1, 300)[0]
    forms = (ids, ids.tolist(), [ids], ids.numpy().astype("uint16")[None])
    moments = [calibrate(tiny(), form, progress=False).layers[0].k_outer for form in forms]
    assert all(torch.equal(m, moments[0]) for m in moments)


@pytest.mark.parametrize(
    "options",
    [{"n_sink": -1}, {"n_sink": "a"}, {"n_rows": 0}, {"n_rows": 2.0}, {"seed": None}, {"context_length": True}],
)
def test_other_arguments_are_checked(tiny, token_ids, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        calibrate(tiny(), [token_ids(1, 300)], progress=False, **options)
