"""Masks: any mask among the new tokens of a call is applied as it is; of the cached ones some ranges, or a refusal."""

import pytest
import torch
import transformers
from transformers import DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_, restore_
from headq_ao.cache import masks
from headq_ao.cache.masks import mask_view, real_spans
from headq_ao.cache.schedule import Span
from headq_ao.evals.baselines import kvlinc

NEAR_EXACT = {"k_bits": 8, "v_bits": 8, "epoch_tokens": 32, "residual_length": 32, "block_size": 16}
CACHED, NEW = 150, 24
WINDOW = 100
LOW = torch.finfo(torch.float32).min


def relative(a, b):
    return float((a - b).norm() / (b - b.mean((0, 1))).norm())


def causal(total, window=None):
    age = torch.arange(total)[:, None] - torch.arange(total)
    return ((age >= 0) & (age < (window or total)))[None, None]


def tree(new, seed=0):
    """Each token sees itself and the ancestors of a random tree."""
    g, mask = torch.Generator().manual_seed(seed), torch.eye(new, dtype=torch.bool)
    for i in range(1, new):
        mask[i] |= mask[int(torch.randint(0, i, (1,), generator=g))]
    return mask


AMONG_NEW = {
    "tree": tree(NEW),
    "block": torch.ones(NEW, NEW, dtype=torch.bool).tril()
    | (torch.arange(NEW) // 8 == torch.arange(NEW)[:, None] // 8),
    "all": torch.ones(NEW, NEW, dtype=torch.bool),
    "packed sequences": torch.block_diag(*[torch.ones(n, n).tril() for n in (10, 14)]).bool(),
}


def masks_of(model, among_new, cached_from=0):
    """The mask of all tokens by layer type, and that of the new ones, for a text model with or without windows."""
    total, found = CACHED + NEW, {}
    for kind in set(getattr(model.config, "layer_types", None) or ["full_attention"]):
        window = WINDOW if kind == "sliding_attention" else None
        whole = causal(total, window).clone()
        whole[..., CACHED:, CACHED:] = among_new & (causal(NEW, window) | among_new)
        whole[..., CACHED:, :cached_from] = False
        found[kind] = whole
    plain = found if len(found) > 1 or "sliding_attention" in found else found["full_attention"]
    cut = {k: m[..., CACHED:, :] for k, m in found.items()}
    return plain, cut if plain is found else cut["full_attention"]


@pytest.mark.parametrize("among_new", AMONG_NEW)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_any_mask_among_new_tokens(tiny, token_ids, family, among_new):
    model, ids = tiny(family), token_ids(2, CACHED + NEW)
    whole, new = masks_of(model, AMONG_NEW[among_new])
    with torch.no_grad():
        exact = model(ids, attention_mask=whole, use_cache=False).logits[:, CACHED:]
        plain = model(ids, use_cache=False).logits[:, CACHED:]
    assert relative(plain, exact) > 0.06, "the mask changes nothing: this test shows nothing"
    quantize_(model, headq_config(**NEAR_EXACT))
    for mask in (new, additive(new)):
        cache = HeadQCache(model)
        with torch.no_grad():
            model(ids[:, :CACHED], cache=cache)
            found = model(ids[:, CACHED:], attention_mask=mask, cache=cache).logits
        assert relative(found, exact) < 0.04
        assert cache.rows_read[0] > 0


def additive(mask):
    if isinstance(mask, dict):
        return {k: additive(m) for k, m in mask.items()}
    return torch.zeros(mask.shape).masked_fill(~mask, LOW)


def test_positions_by_depth_of_a_tree(tiny, token_ids):
    """Drafts of a tree stand at positions that repeat; their mask says what they see."""
    model, ids = tiny(), token_ids(1, CACHED + NEW)
    whole, new = masks_of(model, AMONG_NEW["tree"])
    depth = torch.cat([torch.arange(CACHED), CACHED - 1 + AMONG_NEW["tree"].sum(1)])[None]
    with torch.no_grad():
        exact = model(ids, attention_mask=whole, position_ids=depth, use_cache=False).logits[:, CACHED:]
        quantize_(model, headq_config(**NEAR_EXACT))
        cache = HeadQCache(model)
        model(ids[:, :CACHED], cache=cache)
        found = model(ids[:, CACHED:], attention_mask=new, position_ids=depth[:, CACHED:], cache=cache).logits
    assert relative(found, exact) < 0.04
    cache.crop(-NEW)
    assert cache.get_seq_length() == CACHED


@pytest.mark.parametrize("first_seen", [2, 30, 100, 140, CACHED])
def test_hidden_beginning_of_the_cache(tiny, token_ids, first_seen):
    """A mask may hide the oldest cached tokens, packed or not: sequences packed into one row go on with the last."""
    model, ids = tiny(), token_ids(2, CACHED + NEW)
    whole, new = masks_of(model, causal(NEW)[0, 0], cached_from=first_seen)
    with torch.no_grad():
        exact = model(ids, attention_mask=whole, use_cache=False).logits[:, CACHED:]
        quantize_(model, headq_config(**NEAR_EXACT))
        cache = HeadQCache(model)
        model(ids[:, :CACHED], cache=cache)
        found = model(ids[:, CACHED:], attention_mask=new, cache=cache).logits
    assert relative(found, exact) < 0.04


def test_left_padded_batch_under_a_4d_mask(tiny, token_ids):
    model, ids = tiny(), token_ids(2, CACHED + NEW)
    real = torch.ones(2, CACHED + NEW, dtype=torch.bool)
    real[1, :40] = False
    whole, _ = masks_of(model, AMONG_NEW["block"])
    whole = whole & real[:, None, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        exact = model(ids, attention_mask=whole, position_ids=positions, use_cache=False).logits[:, CACHED:]
        quantize_(model, headq_config(**NEAR_EXACT))
        cache = HeadQCache(model)
        model(ids[:, :CACHED], attention_mask=real[:, :CACHED].long(), position_ids=positions[:, :CACHED], cache=cache)
        new = {"attention_mask": whole[:, :, CACHED:], "position_ids": positions[:, CACHED:]}
        found = model(ids[:, CACHED:], **new, cache=cache).logits
    assert relative(found, exact) < 0.04


def planted(name):
    mask = causal(CACHED + NEW)[..., CACHED:, :].clone()
    if name == "hole":
        mask[..., 3:, 60:70] = False
    elif name == "hole in the window":
        mask[..., 140:145] = False
    elif name == "holes":
        mask[..., :4, 10:150:20] = False
        mask[..., 4:9, :70] = False
        mask[..., 9, :CACHED] = False
    elif name == "too many holes":
        mask[..., 3, 2:150:16] = False
    elif name == "heads":
        mask = mask.expand(1, 4, -1, -1).clone()
        mask[:, 1, :, :50] = False
    elif name == "bias":
        mask = additive(mask) + 0.5 * mask
    elif name == "shape":
        mask = mask[..., 1:]
    return mask


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too many holes", r"of sequence 0 shows cached tokens in 11 ranges.*up to 8"),
        ("heads", "the same for all heads"),
        ("bias", "adds a bias"),
        ("shape", r"must be \[1 or 1, 1, 24, 174\]"),
    ],
)
def test_masks_that_cannot_be_served_are_refused_and_change_nothing(tiny, token_ids, name, message):
    model, ids = tiny(), token_ids(1, CACHED + NEW)
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :CACHED], cache=cache)
        with pytest.raises(ValueError, match=message):
            model(ids[:, CACHED:], attention_mask=planted(name), cache=cache)
        assert [layer.seen for layer in cache.layers] == [CACHED] * 2
        other = HeadQCache(model)
        model(ids[:, :CACHED], cache=other)
        after = [model(ids[:, CACHED:], cache=c).logits for c in (cache, other)]
    assert torch.equal(*after)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["hole", "hole in the window", "holes"])
def test_masks_that_hide_cached_tokens_between_others(tiny, token_ids, name, padded):
    """Each range of cached tokens is read by itself, whichever other queries see fewer."""
    model, ids, mask = tiny(), token_ids(2, CACHED + NEW), planted(name)
    whole = torch.cat([causal(CACHED + NEW)[..., :CACHED, :], mask], 2).expand(2, -1, -1, -1).clone()
    real = torch.ones(2, CACHED + NEW, dtype=torch.long)
    real[1, : 45 if padded else 0] = 0
    whole &= real[:, None, None].bool()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        exact = model(ids, attention_mask=whole, position_ids=positions, use_cache=False).logits[:, CACHED:]
        plain = model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits[:, CACHED:]
    assert relative(plain, exact) > 0.05, "the mask changes nothing: this test shows nothing"
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    given = {"attention_mask": whole[:, :, CACHED:], "position_ids": positions[:, CACHED:]}
    with torch.no_grad():
        model(ids[:, :CACHED], attention_mask=real[:, :CACHED], position_ids=positions[:, :CACHED], cache=cache)
        found = model(ids[:, CACHED:], **given, cache=cache).logits
    assert relative(found, exact) < 0.04


def test_weights_under_a_mask_that_hides_cached_tokens_between_others(tiny, token_ids):
    model, ids, mask = tiny(), token_ids(2, CACHED + NEW), planted("holes")
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :CACHED], cache=cache)
        told = model(ids[:, CACHED:], attention_mask=mask, cache=cache, output_attentions=True).attentions
    for weights in told:
        assert torch.equal(weights > 0, mask.expand(2, 4, -1, -1))


def test_a_codec_that_attends_beside_tokens_refuses_holes(tiny, token_ids, monkeypatch):
    """Its further term would be counted with each range."""
    model, ids = tiny(), token_ids(1, CACHED + NEW)
    quantize_(model, headq_config(codec="kvlinc_base", residual_length=32))

    def call():
        cache = HeadQCache(model)
        with torch.no_grad():
            model(ids[:, :CACHED], cache=cache)
            return model(ids[:, CACHED:], attention_mask=planted("hole"), cache=cache).logits

    assert call().isfinite().all()
    monkeypatch.setattr(kvlinc.Pair, "extra", lambda self, q: None, raising=False)
    with pytest.raises(ValueError, match="attends beside tokens to what it keeps of all of them"):
        call()


@pytest.mark.parametrize("how", ["positions", "no positions", "generate", "compiled", "compiled caller"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_2d_mask_that_hides_the_oldest_cached_tokens(tiny, token_ids, family, how):
    """A later call's 2-D mask may hide a beginning of the cache, whichever way the call comes."""
    model, ids = tiny(family), token_ids(2, 175)
    mask = torch.ones(2, 175, dtype=torch.long)
    mask[0, :50] = 0
    positions = torch.arange(175)[None].expand(2, -1)

    def run(cache, model=model):
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            model(ids[:, :150], position_ids=positions[:, :150], cache=cache)
            found = []
            for a, b in ((150, 160), (160, 161), (161, 175)):
                told = {} if how == "no positions" else {"position_ids": positions[:, a:b]}
                found.append(model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache, **told).logits)
        return torch.cat(found, 1)

    exact = run(DynamicCache(config=model.config))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[:, 150:]
    assert relative(exact, plain) > 0.05, "the mask changes nothing: this test shows nothing"
    calibration = calibrate(model, [token_ids(4, 256, seed=1)], progress=False) if "compiled" in how else None
    quantize_(model, headq_config(**NEAR_EXACT, calibration=calibration))
    if how == "generate":
        asked = dict(attention_mask=mask, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        logits = []
        for make_cache in (lambda: HeadQCache(model), lambda: DynamicCache(config=model.config)):
            cache = make_cache()
            with torch.no_grad():
                model(ids[:, :174], cache=cache)
            logits.append(model.generate(ids, cache=cache, do_sample=False, **asked).logits[0])
            if isinstance(cache, HeadQCache):
                restore_(model)
        assert relative(*logits) < 0.05
        return
    if how == "compiled":
        found = run(HeadQCache(model), torch.compile(model, backend="eager"))
    elif how == "compiled caller":
        cache = HeadQCache(model, max_length=175, batch_size=2)
        with pytest.raises(RuntimeError, match="hides or shows other tokens than those that the cache holds"):
            run(cache, torch.compile(lambda *a, **kw: model(*a, **kw), backend="eager"))
        return
    else:
        found = run(HeadQCache(model))
    assert relative(found, exact) < 0.04


def test_2d_mask_that_shows_padding_again_is_refused(tiny, token_ids):
    model, ids, mask = tiny(), token_ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :10] = 0
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :50], attention_mask=mask[:, :50], cache=cache)
        with pytest.raises(ValueError, match="row 1 shows slots that an earlier call's mask named padding"):
            model(ids[:, 50:], attention_mask=torch.ones_like(mask), cache=cache)
        assert cache.get_seq_length() == 50
        model(ids[:, 50:], attention_mask=mask, cache=cache)


def test_4d_mask_after_padding_on_the_right_is_refused(tiny, token_ids):
    model, ids, mask = tiny(), token_ids(2, 60), torch.ones(2, 50, dtype=torch.long)
    mask[1, 40:] = 0
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :50], attention_mask=mask, cache=cache)
        with pytest.raises(ValueError, match="would follow padding on the right"):
            model(ids[:, 50:], attention_mask=causal(60)[..., 50:, :], cache=cache)
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 1, 10, 60, dtype=torch.bool), r"must be \[2 or 1, 1, 10, 60\].*got \(3, 1, 10, 60\)"),
        (torch.ones(2, 1, 10, 60, dtype=torch.long), "must be bool, or floating point and additive, got torch.int64"),
        ({"full_attention": [[1]]}, "got a list"),
    ],
)
def test_4d_masks_of_another_form(tiny, token_ids, mask, message):
    model, ids = tiny(), token_ids(2, 60)
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :50], cache=cache)
        with pytest.raises(ValueError, match=message):
            model(ids[:, 50:], attention_mask=mask, cache=cache)
    assert [layer.seen for layer in cache.layers] == [50, 50]


def test_masks_of_the_model_itself_are_not_searched(tiny, token_ids, monkeypatch):
    """Of cached tokens they say what the counts say: a long chunk costs its own tokens, a step nothing."""
    model, ids, asked = tiny("gemma3", sliding_window=40), token_ids(1, 160), []
    quantize_(model, headq_config(**NEAR_EXACT))
    plain = masks.mask_view
    monkeypatch.setattr(masks, "mask_view", lambda mask, *rest: asked.append(tuple(mask.shape)) or plain(mask, *rest))
    cache = HeadQCache(model)
    with torch.no_grad():
        for part in ids.split([100, 20, *[1] * 40], 1):
            model(part, cache=cache)
    assert set(asked) <= {(1, 1, 20, 20)}


def tiny_vlm():
    text = dict(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=WINDOW, initializer_range=0.1,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=4096, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.eos_token_id = None
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("begin", [160, 60, 0])
def test_image_block_in_any_call(token_ids, begin):
    """Image tokens see their whole block, whichever call brings them."""
    model, ids = tiny_vlm(), token_ids(1, 220)
    types = torch.zeros_like(ids)
    types[:, begin + 5 : begin + 25] = 1
    calls = [(a, b) for a, b in [(0, begin), (begin, begin + 40), (begin + 40, 220)] if b > a]

    def run(cache, types):
        with torch.no_grad():
            return torch.cat([model(ids[:, a:b], token_type_ids=types[:, :b], cache=cache).logits for a, b in calls], 1)

    try:
        exact = run(DynamicCache(config=model.config), types)
    except RuntimeError as error:
        pytest.skip(f"this transformers has no image blocks in later calls: {error}")
    no_block = run(DynamicCache(config=model.config), torch.zeros_like(types))
    assert relative(no_block, exact) > 0.05, "the block changes nothing: this test shows nothing"
    quantize_(model, headq_config(**NEAR_EXACT))
    assert relative(run(HeadQCache(model), types), exact) < 0.04


@pytest.mark.parametrize("packed", [True, False])
def test_right_padded_prompt_is_refused_before_its_prefill(tiny, token_ids, packed):
    model, ids = tiny(), token_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    quantize_(model, headq_config(**NEAR_EXACT))
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"row 0 ends in padding.*padding_side"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, **({"cache": HeadQCache(model)} if packed else {}))
    assert not calls
    model.generate(ids, attention_mask=mask.flip(1), max_new_tokens=4, do_sample=False)
    with pytest.warns(UserWarning, match="use_cache is False"):  # dense: nothing to say about padding
        model.generate(ids, attention_mask=mask, max_new_tokens=4, use_cache=False)


@pytest.mark.parametrize("how", ["set", "config", "dict"])
def test_another_attn_implementation_on_a_live_model(tiny, token_ids, how):
    """A running cache goes on; the other implementation is what restore_ leaves."""
    model, ids = tiny(), token_ids(1, 150)
    quantize_(model, headq_config(**NEAR_EXACT))
    cache, plain = HeadQCache(model), HeadQCache(model)
    with torch.no_grad():
        expected = [model(part, cache=plain).logits for part in ids.split([140, 10], 1)][1]
        model(ids[:, :140], cache=cache)
        if how == "config":
            model.config._attn_implementation = "eager"
        else:
            model.set_attn_implementation("eager" if how == "set" else {"": "eager"})
        with pytest.warns(UserWarning, match="attn_implementation was set to 'eager'"):
            assert torch.equal(model(ids[:, 140:], cache=cache).logits, expected)
        model.generate(torch.cat([ids, ids[:, :1]], 1), cache=cache, max_new_tokens=3, do_sample=False)
    restore_(model)
    assert model.config._attn_implementation == "eager"


def test_another_attn_implementation_with_the_hook_bypassed(tiny, token_ids):
    model, ids = tiny(), token_ids(1, 150)
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model(ids[:, :140], cache=cache)
        model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="only the 'headq' attention can read"):
            model.model(ids[:, 140:], cache=cache)
        assert [layer.seen for layer in cache.layers] == [140, 140]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_self_speculation(tiny, token_ids, layers):
    """``assistant_early_exit`` drafts with the first layers of the model, on a cache of its own."""
    model, ids = tiny(layers=4), token_ids(1, 120)

    def run():
        return model.generate(ids, max_new_tokens=24, do_sample=False, assistant_early_exit=layers)[0].tolist()

    dense = run()
    quantize_(model, headq_config(**NEAR_EXACT))
    assert run() == dense
    assert model.config.num_hidden_layers == 4


def test_layers_that_a_call_does_not_run_need_not_agree(tiny, token_ids):
    model, ids = tiny(layers=4), token_ids(1, 120)
    quantize_(model, headq_config(**NEAR_EXACT))
    cache = HeadQCache(model)
    with torch.no_grad():
        model.config.num_hidden_layers = 2
        for part in ids.split([100, 10, 10], 1):
            model(part, cache=cache)
        cache.crop(-4)
        model(ids[:, :4], cache=cache)
        assert [layer.seen for layer in cache.layers] == [120, 120, 0, 0]
        model.config.num_hidden_layers = 4
        with pytest.raises(RuntimeError, match=r"hold 0 to 120 tokens.*fewer layers"):
            model(ids[:, :1], cache=cache)


def test_mask_views_follow_the_counts():
    """Masks that transformers makes of padding and windows are what the counts say."""
    seen, new = 30, 5
    for pads, window in ((0, None), (7, None), (0, 12), (7, 12), (29, 12)):
        real = torch.ones(2, seen + new, dtype=torch.bool)
        real[1, :pads] = False
        mask = causal(seen + new, window)[..., seen:, :] & real[:, None, None]
        counts = [seen, seen - min(pads, seen)], [0, 0]
        spans = real_spans(real, 2, new, seen) or [Span(0, new)] * 2
        assert mask_view(mask, *counts, spans, seen, window) is None
        assert mask_view(additive(mask), *counts, spans, seen, window) is None
        shown = mask.clone()
        shown[:, :, 0, seen + 1] = True
        assert mask_view(shown, *counts, spans, seen, window) is not None
        if not pads and window:  # of a window's own cache the last W - 1 tokens are there, whatever is shown before
            whole = torch.ones_like(mask) & real[:, None, None]
            assert mask_view(whole, *counts, spans, seen, window, None, False, 11).low.tolist() == [[19] * new] * 2
        for hidden in (3, 9):  # the oldest cached tokens of the second sequence
            view = mask_view(mask, *counts, spans, seen, window, torch.tensor([0, hidden]))
            usual = [max(counts[0][1] + i - window + 1, 0) if window else 0 for i in range(new)]
            low = [min(max(x, hidden), counts[0][1]) for x in usual]
            assert (view is None) == (low == usual)
            if view is not None:
                assert view.low[1].tolist() == low and view.high[1].tolist() == [counts[0][1]] * new
