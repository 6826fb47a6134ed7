"""What transformers does with a cache: decoding strategies, padding, cropping, reordering, copies, refusals."""

import copy
import threading

import pytest
import torch

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from tests.integrations.transformers.calling import FINE, OPTIONS, forward, greedy
from tests.pages import codes_of, same_codes, scales_of

AFFINE = {"key_codec": "affine", "value_codec": "affine"}


# Decoding strategies
def test_greedy_equals_a_loop_over_forward(model, token_ids):
    ids = token_ids(2, 70)
    cache, tokens = HeadQCache(model), ids
    logits = forward(model, ids, cache=cache)
    for _ in range(24):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        logits = forward(model, tokens[:, -1:], cache=cache)
    assert torch.equal(greedy(model, ids), tokens)
    assert cache.packed_fraction > 0


def test_greedy_near_dense(tiny, model, token_ids):
    """With eight bits the chosen tokens are those of the dense model, as long as both have read the same text."""
    ids = token_ids(4, 100)
    dense, packed = greedy(tiny(), ids, 16), greedy(model, ids, 16)
    assert (dense == packed)[:, 100:].float().mean() > 0.8


def test_sampling_is_repeatable(model, token_ids):
    ids, outs = token_ids(2, 70), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model.generate(ids, max_new_tokens=24, do_sample=True, top_k=0))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_num_return_sequences(model, token_ids):
    torch.manual_seed(0)
    out = model.generate(token_ids(2, 70), max_new_tokens=20, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 90)
    assert len({tuple(row) for row in out[:3].tolist()}) > 1
    assert torch.equal(out[:, :70], token_ids(2, 70).repeat_interleave(3, 0))


def test_beam_search_scores_what_it_returns(model, token_ids):
    """The best beam's score is that of its tokens read in one stream: reordering carried rows, codes and codecs."""
    ids = token_ids(2, 60)
    out = model.generate(
        ids, max_new_tokens=40, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert out.past_key_values.packed_fraction > 0
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        cache = HeadQCache(model)
        logits = [forward(model, row[None, :60], cache=cache)[:, -1:]]
        logits += [forward(model, row[None, i : i + 1], cache=cache) for i in range(60, 99)]
        logprobs = torch.cat(logits, 1).log_softmax(-1)[0].gather(-1, row[60:, None])
        torch.testing.assert_close(logprobs.sum() / 40, score, rtol=1e-3, atol=1e-4)


def test_beam_search_with_every_kind_of_codec(quantized, tiny, token_ids):
    calibration = calibrate(tiny(), [token_ids(2, 200)], progress=False)
    for options in (
        {"rank": 16},
        AFFINE,
        AFFINE | {"basis": "random"},
        AFFINE | {"k_zero_point": True, "v_zero_point": True},
        {"k_bits": None},
        {"v_bits": None},
        {"calibration": calibration},
        {"calibration": calibration, "adapt": "off"},
        AFFINE | {"calibration": calibration},
    ):
        model = quantized(options=options)
        assert greedy(model, token_ids(2, 60), 30, num_beams=2).shape == (2, 90)


def test_prompt_lookup_equals_greedy(model, token_ids, monkeypatch):
    ids = token_ids(1, 12).repeat(1, 6)  # repeats itself: drafts are found, and mostly rejected
    cropped = []
    crop = HeadQCache.crop
    monkeypatch.setattr(HeadQCache, "crop", lambda self, n: (cropped.append(n), crop(self, n))[1])
    out = greedy(model, ids, 60, prompt_lookup_num_tokens=5)
    assert sum(-n for n in cropped) > 20, "no draft was rejected: crop was not exercised"
    assert torch.equal(out, greedy(model, ids, 60))


def test_prompt_lookup_on_window_layers(quantized, token_ids):
    model, ids = quantized("mistral", FINE, sliding_window=24), token_ids(1, 12).repeat(1, 6)
    assert torch.equal(greedy(model, ids, 60, prompt_lookup_num_tokens=5), greedy(model, ids, 60))


def test_assistant_model(model, tiny, token_ids):
    ids, draft = token_ids(1, 70), tiny(layers=2, seed=3)
    assert torch.equal(greedy(model, ids, 40, assistant_model=draft), greedy(model, ids, 40))
    quantize_(draft, headq_config(**FINE))
    assert torch.equal(greedy(model, ids, 40, assistant_model=draft), greedy(model, ids, 40))


def test_prefill_chunk_size(model, token_ids):
    ids = token_ids(1, 130)
    whole = greedy(model, ids, 16)
    chunked = greedy(model, ids, 16, prefill_chunk_size=40)
    assert (whole == chunked)[:, 130:].float().mean() > 0.8


def test_second_generate_continues_from_the_cache(model, token_ids):
    ids = token_ids(2, 70)
    first = greedy(model, ids, 20, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 89
    more = torch.cat([first.sequences, token_ids(2, 9, seed=5)], 1)
    continued = greedy(model, more, 20, cache=first.past_key_values)
    assert continued.shape == (2, 119)
    cache = HeadQCache(model)
    forward(model, ids, cache=cache)
    for part in first.sequences[:, 70:-1].split(1, 1):
        forward(model, part, cache=cache)
    logits, tokens = forward(model, more[:, 89:], cache=cache), more
    for _ in range(20):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        logits = forward(model, tokens[:, -1:], cache=cache)
    assert torch.equal(continued, tokens)


def test_inputs_embeds(model, token_ids):
    ids = token_ids(2, 70)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(greedy(model, None, 20, inputs_embeds=embeds), greedy(model, ids, 20)[:, 70:])
    cache = HeadQCache(model)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=mask, cache=cache)
    assert cache.batch.lengths.totals() == [61, 70]


def test_two_threads_on_one_model(model, token_ids):
    prompts = [token_ids(1, 70, seed=1), token_ids(2, 55, seed=2)]
    expected, found = [greedy(model, ids, 30) for ids in prompts], [None, None]

    def work(i):
        found[i] = greedy(model, prompts[i], 30)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# Padding
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", FINE),
        ("llama", {"k_bits": 2, "v_bits": 2}),
        ("llama", AFFINE | {"k_bits": 2, "v_bits": 2}),
        ("llama", AFFINE | {"k_bits": 3, "v_bits": 3, "k_zero_point": True, "v_zero_point": True, "block_size": 32}),
        ("mistral", FINE),
        ("qwen3", FINE),
        ("gpt2", FINE),
    ],
)
def test_left_padded_batch_equals_single_prompts(quantized, token_ids, family, options):
    """Pads enter no statistic, scale or block: codes equal but for rounding flips, under 1 % of them."""
    model, lengths = quantized(family, options), (90, 61, 3, 120)
    prompts = [token_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(p, (120 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (120 - p.shape[1], 0)) for p in prompts])
    batch = greedy(model, ids, 30, attention_mask=mask, return_dict_in_generate=True)
    flips = total = 0
    for b, prompt in enumerate(prompts):
        one = greedy(model, prompt, 30, return_dict_in_generate=True)
        if options is FINE:
            assert torch.equal(one.sequences[0, -30:], batch.sequences[b, -30:])
        else:  # coarse codes: a rounding flip may turn a near tie, so teach the single run the same tokens
            cache = HeadQCache(model)
            forward(model, prompt, cache=cache)
            for token in batch.sequences[b, -30:-1]:
                forward(model, token.view(1, 1), cache=cache)
            one.past_key_values = cache
        for alone, together in zip(one.past_key_values.layers, batch.past_key_values.layers, strict=True):
            lengths, other = alone.batch.lengths, together.batch.lengths
            assert other.totals()[b] == lengths.totals()[0] == prompt.shape[1] + 29
            assert other.packed()[b] == lengths.packed()[0]
            for x, y in zip(codes_of(alone, 0), codes_of(together, b), strict=True):
                flips, total = flips + (x != y).sum().item(), total + x.numel()
                assert (x - y).abs().max() <= 1 if x.numel() else True
            for x, y in zip(scales_of(alone, 0), scales_of(together, b), strict=True):
                torch.testing.assert_close(x, y, rtol=0.05, atol=0)
    assert total > 10_000
    assert flips < 0.01 * total


def test_pad_tokens_do_not_matter(model, token_ids):
    ids, mask = token_ids(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[0, :33] = 0
    other = ids.clone()
    other[0, :33] = 77
    out = [greedy(model, x, 20, attention_mask=mask, return_dict_in_generate=True) for x in (ids, other)]
    assert torch.equal(out[0].sequences[:, 80:], out[1].sequences[:, 80:])
    for a, b in zip(out[0].past_key_values.tensors(), out[1].past_key_values.tensors(), strict=True):
        assert torch.equal(a, b)


def test_right_padded_prefill(model, token_ids):
    """Log-likelihoods of right-padded rows, as lm-eval batches them; pads are not cached."""
    ids, mask = token_ids(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[1, 90:] = 0
    cache = HeadQCache(model)
    logits = forward(model, ids, attention_mask=mask, cache=cache)
    assert cache.batch.lengths.totals() == [120, 90]
    alone = HeadQCache(model)
    expected = forward(model, ids[1:, :90], cache=alone)[0]
    torch.testing.assert_close(logits[1, :90], expected, rtol=1e-4, atol=1e-4)
    assert cache.batch.lengths.packed()[1] == alone.batch.lengths.packed()[0] > 0
    for x, y in zip(codes_of(alone.layers[0], 0), codes_of(cache.layers[0], 1), strict=True):
        assert (x != y).float().mean() < 0.01


def test_crop_removes_right_pads_first(model, token_ids):
    """After a right-padded call the last slots of the short row are pads: cropping them takes no real token."""
    ids, mask = token_ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[1, 60:] = 0
    cache = HeadQCache(model)
    forward(model, ids, attention_mask=mask, cache=cache)
    cache.crop(-10)
    assert cache.batch.lengths.totals() == [60, 60]
    logits = forward(model, ids[:, 60:65], cache=cache)
    alone = HeadQCache(model)
    forward(model, ids[1:, :60], cache=alone)
    torch.testing.assert_close(logits[1:], forward(model, ids[1:, 60:65], cache=alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_sink", [0, 1, 4, 40])
def test_rows_shorter_than_the_sink(quantized, token_ids, n_sink):
    model = quantized(options=FINE | {"n_sink": n_sink})
    ids, mask = token_ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :18], mask[1, :19] = 0, 0
    out = greedy(model, ids, 60, attention_mask=mask)
    for b, start in enumerate((18, 19, 0)):
        assert torch.equal(greedy(model, ids[b : b + 1, start:], 60)[0, -60:], out[b, -60:])


def test_chunked_prefill_of_padded_batch(model, token_ids):
    """The pads of a row may fill whole chunks."""
    ids, mask = token_ids(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :70] = 0
    cache, alone = HeadQCache(model), HeadQCache(model)
    for a, b in ((0, 40), (40, 80), (80, 120)):
        logits = forward(model, ids[:, a:b], attention_mask=mask[:, :b], cache=cache)
    assert cache.batch.lengths.totals() == [50, 120]
    for a, b in ((70, 80), (80, 120)):
        expected = forward(model, ids[:1, a:b], cache=alone)
    torch.testing.assert_close(logits[:1], expected, rtol=1e-3, atol=1e-3)


def test_mask_of_floats_and_bools(model, token_ids):
    ids, mask = token_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :20] = 0
    expected = forward(model, ids, attention_mask=mask)
    assert torch.equal(forward(model, ids, attention_mask=mask.bool()), expected)


# Copies
@pytest.mark.parametrize("calibrated", [False, True])
def test_deepcopy_of_model_and_cache(tiny, token_ids, calibrated):
    model, ids = tiny(), token_ids(1, 80)
    calibration = calibrate(model, [token_ids(2, 200)], progress=False) if calibrated else None
    quantize_(model, headq_config(**FINE, calibration=calibration))
    cache = HeadQCache(model)
    forward(model, ids, cache=cache)
    branch, twin = copy.deepcopy(cache), copy.deepcopy(model)
    one, two = token_ids(1, 30, seed=1), token_ids(1, 30, seed=2)
    first = forward(model, one, cache=cache)
    assert branch.get_seq_length() == 80
    second = forward(twin, two, cache=branch)
    fresh = HeadQCache(model)
    forward(model, ids, cache=fresh)
    assert torch.equal(first, forward(model, one, cache=copy.deepcopy(fresh)))
    assert torch.equal(second, forward(model, two, cache=fresh))
    assert {t.data_ptr() for t in cache.tensors()}.isdisjoint(t.data_ptr() for t in branch.tensors())
    expected = greedy(model, ids)
    restore_(model)
    assert torch.equal(greedy(twin, ids), expected), "the copy lost its cache with the original"
    restore_(twin)
    assert torch.equal(forward(twin, ids), forward(model, ids))


# Refusals
def test_a_static_cache_is_a_packed_one_of_static_capacity(model, token_ids):
    ids = token_ids(1, 70)
    found = greedy(model, ids, 30, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(found.sequences, greedy(model, ids, 30))
    cache = found.past_key_values
    assert isinstance(cache, HeadQCache) and cache.batch.capacity == 100 and cache.rows_read[0] > 0
    with pytest.raises(ValueError, match="room for 100 tokens and holds 99; 3 more do not fit"):
        forward(model, ids[:, :3], cache=cache)
    assert cache.get_seq_length() == 99


def test_masks_that_are_refused(model, token_ids):
    ids = token_ids(2, 20)
    with pytest.raises(ValueError, match=r"must be 2-D .*\(2, 20\), or 4-D, \(2, 1, 20, 20\), got shape \(2, 20, 20\)"):
        model(ids, attention_mask=torch.ones(2, 20, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be \[2 or 1, 1, 20, 20\], .*got \(2, 1, 20, 21\)"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 21, dtype=torch.bool))
    with pytest.raises(ValueError, match="got a list"):
        model(ids, attention_mask=[[1] * 20] * 2)
    hole = torch.ones(2, 20, dtype=torch.long)
    hole[1, 7] = 0
    with pytest.raises(ValueError, match="row 1 has a hole"):
        model(ids, attention_mask=hole)
    cache = HeadQCache(model)
    forward(model, ids, cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 21\), .*got shape \(2, 1\)"):
        forward(model, ids[:, :1], attention_mask=torch.ones(2, 1, dtype=torch.long), cache=cache)
    assert cache.get_seq_length() == 20, "a refused call must not enter the cache"


def test_packed_position_ids_are_refused(model, token_ids):
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(ValueError, match="position_ids must count up by one within each row"):
        model(token_ids(1, 20), position_ids=positions)
    with pytest.raises(ValueError, match="position_ids must count up by one within each row"):
        model(token_ids(1, 20), None, positions)
    forward(model, token_ids(1, 20), position_ids=torch.arange(7, 27)[None])


def test_cache_of_another_model_or_config_is_refused(model, quantized, tiny, token_ids):
    ids = token_ids(1, 40)
    for other, match in (
        (quantized(options={"k_bits": 4}), "made with another config"),
        (quantized(options=FINE, layers=3), "another model"),
        (quantized(options=FINE, layers=1), "another model"),
        (quantized(options=FINE, head_dim=64), "another model"),
        (quantized("mistral", FINE), "another model"),
    ):
        cache = HeadQCache(other)
        with pytest.raises(ValueError, match=match):
            model(ids, cache=cache)
        assert cache.get_seq_length() == 0
    calibrations = [calibrate(tiny(), [token_ids(2, 200, seed=s)], progress=False) for s in (0, 1)]
    one, two = (quantized(options=FINE | {"calibration": c}) for c in calibrations)
    with pytest.raises(ValueError, match="made with another config"):
        one(ids, cache=HeadQCache(two))
    with pytest.raises(ValueError, match="made with another config"):
        one(ids, cache=HeadQCache(model))


def test_batch_size_change_is_refused(model, token_ids):
    cache = HeadQCache(model)
    forward(model, token_ids(2, 40), cache=cache)
    before = [t.clone() for t in cache.tensors()]
    with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3"):
        forward(model, token_ids(3, 4), cache=cache)
    assert cache.get_seq_length() == 40
    assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    assert cache.batch_size == 2


def test_non_finite_states_are_named(quantized, token_ids):
    for side, name in (("k_proj", "keys"), ("v_proj", "values")):
        for check in (None, True):
            model = quantized(options={"check_finite": check})
            embedding = model.get_input_embeddings().weight
            ids = token_ids(3, 70)
            ids[ids == 99] = 98
            ids[1, 50] = 99
            with torch.no_grad():
                embedding[99] = 0
                embedding[99, 0] = 1
                getattr(model.model.layers[0].self_attn, side).weight[:, 0] = float("inf")
                embedding[:99, 0] = 0
                embedding[100:, 0] = 0
            cache = HeadQCache(model)
            with pytest.raises(ValueError, match=rf"{name} must be finite.* sequence"):
                model(ids, cache=cache)


# Reordering
def select(model, ids, operation):
    cache = HeadQCache(model)
    forward(model, ids, cache=cache)
    operation(cache)
    return cache


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"k_bits": None}, AFFINE | {"basis": "random"}, FINE])
def test_batch_operations(quantized, token_ids, family, options):
    model, ids, more = quantized(family, options), token_ids(3, 100), token_ids(6, 20, seed=4)
    for operation, order in (
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        cache, expected = select(model, ids, operation), select(model, ids[order], lambda c: None)
        assert cache.batch_size == len(order)
        parts = more[: len(order)]
        torch.testing.assert_close(
            forward(model, parts, cache=cache), forward(model, parts, cache=expected), rtol=1e-3, atol=1e-3
        )


def test_batch_operations_on_ragged_rows(model, token_ids):
    ids, mask = token_ids(3, 100), torch.ones(3, 100, dtype=torch.long)
    mask[0, :80], mask[1, :40] = 0, 0
    cache = HeadQCache(model)
    forward(model, ids, attention_mask=mask, cache=cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    assert cache.batch.lengths.totals() == [60, 20]
    more = token_ids(2, 40, seed=4)
    full = torch.cat([mask[[1, 0]], torch.ones(2, 40, dtype=torch.long)], 1)
    logits = forward(model, more, attention_mask=full, cache=cache)
    for b, (row, start) in enumerate(((1, 40), (0, 80))):
        alone = HeadQCache(model)
        forward(model, ids[row : row + 1, start:], cache=alone)
        torch.testing.assert_close(
            logits[b : b + 1], forward(model, more[b : b + 1], cache=alone), rtol=1e-3, atol=1e-3
        )


def test_selection_does_not_share_rows(model, token_ids):
    cache = select(model, token_ids(1, 100), lambda c: c.batch_repeat_interleave(2))
    forward(model, token_ids(2, 60, seed=1), cache=cache)
    layer = cache.layers[1]
    assert not torch.equal(codes_of(layer, 0)[0], codes_of(layer, 1)[0])


# Cropping
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("drafted", [1, 5, 32])
def test_crop_within_the_window_equals_never_having_drafted(quantized, token_ids, family, drafted):
    model = quantized(family, FINE, sliding_window=40) if family != "llama" else quantized(options=FINE)
    ids = token_ids(2, 150)
    plain, cropped = HeadQCache(model), HeadQCache(model)
    draft = token_ids(2, drafted, seed=9)
    for cache in (plain, cropped):
        forward(model, ids[:, :90], cache=cache)
    for i in range(90, 150):
        if i % 7 == 0:
            forward(model, draft, cache=cropped)
            cropped.crop(-drafted)
        assert cropped.get_seq_length() == plain.get_seq_length() == i
        expected, found = (forward(model, ids[:, i : i + 1], cache=cache) for cache in (plain, cropped))
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)  # a block may close at a draft, so earlier
    for a, b in zip(plain.layers, cropped.layers, strict=True):
        assert a.seen == b.seen
    ahead = [b - a for a, b in zip(plain.batch.lengths.packed(), cropped.batch.lengths.packed(), strict=True)]
    assert 0 <= min(ahead) <= max(ahead) <= drafted  # a draft may push tokens out of the window
    for row in (0, 1):  # layer 0 sees the same keys and values on both routes: its codes are the same
        assert same_codes(plain.layers[0], cropped.layers[0], row) > 0


@pytest.mark.parametrize("sliding_window", [8, 24, 32])
@pytest.mark.parametrize("drafted", [5, 32])
def test_crop_of_short_window_layers_is_exact(quantized, token_ids, sliding_window, drafted):
    """A window that never packs still holds all that is visible after a crop by ``residual_length``."""
    model, ids = quantized("mistral", FINE, sliding_window=sliding_window), token_ids(2, 150)
    plain, cropped = HeadQCache(model), HeadQCache(model)
    for cache in (plain, cropped):
        forward(model, ids[:, :90], cache=cache)
    for i in range(90, 150):
        forward(model, token_ids(2, drafted, seed=i), cache=cropped)
        cropped.crop(-drafted)
        expected, found = (forward(model, ids[:, i : i + 1], cache=cache) for cache in (plain, cropped))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_crop_that_closes_no_block_is_bit_exact(model, token_ids):
    ids = token_ids(2, 60)
    plain, cropped = HeadQCache(model), HeadQCache(model)
    for cache in (plain, cropped):
        forward(model, ids[:, :55], cache=cache)
    forward(model, token_ids(2, 5, seed=9), cache=cropped)
    cropped.crop(-5)
    assert torch.equal(forward(model, ids[:, 55:], cache=plain), forward(model, ids[:, 55:], cache=cropped))


def test_crop_while_statistics_are_awaited(quantized, token_ids):
    """Rejected drafts enter no statistic."""
    model = quantized(options=FINE | {"epoch_tokens": 64})
    ids = token_ids(1, 140)
    plain, cropped = HeadQCache(model), HeadQCache(model)
    for i in range(0, 140, 4):
        expected = forward(model, ids[:, i : i + 4], cache=plain)
        forward(model, token_ids(1, 8, seed=i), cache=cropped)
        cropped.crop(-8)
        found = forward(model, ids[:, i : i + 4], cache=cropped)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    for x, y in zip(codes_of(plain.layers[0], 0), codes_of(cropped.layers[0], 0), strict=True):
        n = min(x.shape[1], y.shape[1])
        assert n >= 64
        assert torch.equal(x[:, :n], y[:, :n])


def test_crop_everything_then_start_again(model, token_ids):
    cache = HeadQCache(model)
    forward(model, token_ids(2, 100, seed=1), cache=cache)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    assert cache.get_memory_footprint() == 0
    ids = token_ids(2, 50)
    fresh = HeadQCache(model)
    torch.testing.assert_close(forward(model, ids, cache=cache), forward(model, ids, cache=fresh))
    cache.crop(-1000)
    assert cache.get_seq_length() == 0


def test_crop_positive_is_refused(model, token_ids):
    cache = HeadQCache(model)
    forward(model, token_ids(1, 60), cache=cache)
    with pytest.raises(ValueError, match="negative number, the tokens to remove, got 5"):
        cache.crop(5)
    cache.crop(0)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize(("sliding_window", "deep"), [(24, 45), (24, 90), (60, 110), (60, 150)])
def test_deep_crop_of_window_layers_is_refused_whole(quantized, token_ids, sliding_window, deep):
    """A window layer has let tokens go: what a deep crop would need is gone, and the cache stays as it was."""
    kinds = ["full_attention", "sliding_attention"]
    model = quantized("gemma3", FINE, sliding_window=sliding_window, layer_types=kinds)
    ids, mask = token_ids(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, :250] = 0
    cache = HeadQCache(model)
    forward(model, ids, attention_mask=mask, cache=cache)
    before = [t.clone() for t in cache.tensors()]
    with pytest.raises(RuntimeError, match="sliding-window layer"):
        cache.crop(-deep)
    assert cache.get_seq_length() == 300
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors(), before, strict=True))


def test_reset_and_reuse(model, token_ids):
    cache = HeadQCache(model)
    first = forward(model, token_ids(3, 100, seed=1), cache=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.get_memory_footprint(), cache.rows_read) == (0, 0, (0, 0))
    ids = token_ids(2, 100)
    for part in ids.split([60, 40], 1):
        logits = forward(model, part, cache=cache)
    fresh = HeadQCache(model)
    for part in ids.split([60, 40], 1):
        expected = forward(model, part, cache=fresh)
    assert torch.equal(logits, expected)
    assert first.shape[0] == 3
    assert cache.batch_size == 2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("held", [0, 100, 300])
def test_a_call_that_fails_in_a_later_layer_is_taken_back(tiny, token_ids, family, held):
    """No layer then holds its tokens, and the call can be made again."""
    model, ids = tiny(family), token_ids(1, 320)
    quantize_(model, headq_config(**OPTIONS))
    cache, other = HeadQCache(model), HeadQCache(model)
    with torch.no_grad():
        for c in (cache, other) if held else ():
            model(ids[:, :held], cache=c)
        weight = model.model.layers[1].self_attn.k_proj.weight
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="keys must be finite"):
            model(ids[:, held : held + 3], cache=cache)
        weight.copy_(kept)
        assert [layer.seen for layer in cache.layers] == [held, held]
        found = [model(ids[:, held : held + 20], cache=c).logits for c in (cache, other)]
    torch.testing.assert_close(*found)


def test_call_after_one_that_failed_elsewhere_is_refused(tiny, token_ids):
    """A failure outside attention leaves earlier layers ahead: going on would store a token twice."""
    model = tiny("llama")
    quantize_(model, headq_config(**OPTIONS))
    cache = HeadQCache(model)

    def fail(*args):
        raise MemoryError("planted")

    with torch.no_grad():
        model(token_ids(1, 100), cache=cache)
        hook = model.model.layers[0].mlp.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(token_ids(1, 1), cache=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match="hold 100 to 101 tokens: an earlier call failed part-way"):
            model(token_ids(1, 1), cache=cache)
        cache.reset()
        model(token_ids(1, 100), cache=cache)


def test_crop_to_nothing_starts_anew(tiny, token_ids):
    model = tiny("llama")
    quantize_(model, headq_config(**OPTIONS))
    first, second = token_ids(1, 200), token_ids(1, 200).flip(1)
    used, fresh = HeadQCache(model), HeadQCache(model)
    with torch.no_grad():
        model(first, cache=used)
        used.crop(-200)
        for ids in (second[:, :150], second[:, 150:]):
            a, b = model(ids, cache=used).logits, model(ids, cache=fresh).logits
    assert torch.equal(a, b)
