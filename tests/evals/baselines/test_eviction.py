"""Eviction: bytes within the budget, what stays, and attention over what is left."""

import pytest
import torch

from headq_ao import HeadQCache
from headq_ao.evals.baselines.eviction import VALUE_LOSS, allocate, token_weights
from headq_ao.evals.baselines.mixed_rows import CHOICES, choice_bytes, pack_rows, row_bytes, unpack_rows
from headq_ao.evals.harness.subjects import Subject


def test_rows_of_any_bits_round_trip():
    generator = torch.Generator().manual_seed(0)
    x, choice = torch.randn(50, 70, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    blob = pack_rows(x, choice, 32)
    assert blob.dtype == torch.uint8 and len(blob) == sum(row_bytes(70, c, 32) for c in choice.tolist())
    found, used = unpack_rows(torch.cat([blob, blob]), choice, 70, 32)
    assert used == len(blob) and found[choice == 0].eq(0).all()
    for number, bits in list(enumerate(CHOICES))[1:]:
        error, rows = (found - x)[choice == number].abs(), x[choice == number]
        width = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
        assert (error <= 0.51 * width[:, None] + 4e-3).all()


@pytest.mark.parametrize("n", [1, 3, 5, 64])
def test_a_single_row_of_odd_length(n):
    x = torch.linspace(-1, 1, n)[None]
    for choice in range(1, 5):
        found, _ = unpack_rows(pack_rows(x, torch.tensor([choice]), 32), torch.tensor([choice]), n, 32)
        assert (found - x).abs().max() <= 1 / (2 ** CHOICES[choice] - 1) + 1e-3


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_the_budget_holds_and_is_used(share):
    weight = torch.rand(3, 200, generator=torch.Generator().manual_seed(1)) ** 4
    sizes = choice_bytes(64, 64)
    budget = int(share * 200 * sizes[-1])
    choice = allocate(weight, VALUE_LOSS, sizes, budget)
    spent = torch.tensor(sizes)[choice].sum(1)
    assert (spent <= budget).all() and (spent > 0.9 * budget - sizes[-1]).all()
    heavy, light = weight.topk(20).indices, (-weight).topk(20).indices
    assert (choice.gather(1, heavy).float().mean(1) > choice.gather(1, light).float().mean(1)).all()


def test_choices_that_are_barred_are_not_taken():
    weight = torch.rand(2, 200, generator=torch.Generator().manual_seed(3)) ** 4
    weight[:, :50] = 0
    sizes = choice_bytes(64, 64)
    budget = int(0.3 * 200 * sizes[-1])
    choice = allocate(weight, VALUE_LOSS, sizes, budget, (0, 16))
    assert set(choice.unique().tolist()) == {0, 4}
    assert torch.equal((choice == 4).sum(1), torch.tensor([budget // sizes[-1]] * 2))  # the heaviest that fit
    assert (choice.gather(1, weight.topk(budget // sizes[-1]).indices) == 4).all()


def test_no_single_change_is_better():
    """At the same bytes no exchange of two items' choices has a smaller loss."""
    weight, loss = torch.rand(1, 30, generator=torch.Generator().manual_seed(2)), torch.tensor(VALUE_LOSS)
    choice = allocate(weight, VALUE_LOSS, choice_bytes(64, 64), 900)[0]
    total = (weight[0] * loss[choice]).sum()
    for i in range(30):
        for j in range(i):
            other = choice.clone()
            other[i], other[j] = choice[j], choice[i]
            assert (weight[0] * loss[other]).sum() >= total - 1e-6


def test_weights_are_pooled_attention():
    q, k = torch.zeros(2, 3, 8), torch.zeros(1, 10, 8)
    weight = token_weights(q, k, 1.0)[0]
    whole = sum(torch.cat([torch.full((n,), 1.0 / n), torch.zeros(10 - n)]) for n in (8, 9, 10)) * 2
    torch.testing.assert_close(weight[4], whole[2:7].mean())
    torch.testing.assert_close(weight[0], (whole[0] + 2 * whole[1] + 2 * whole[2]) / 5)  # reflected at the end


def outputs(model, subject, ids, first):
    with subject.on(model):
        cache = HeadQCache(model)
        model(ids[:, :first], cache=cache)
        chunk = model(ids[:, first:-20], cache=cache).logits
        steps = [model(ids[:, i : i + 1], cache=cache).logits for i in range(ids.shape[1] - 20, ids.shape[1])]
        return torch.cat([chunk, *steps], 1), cache, cache.bits_report().to_dict()


@pytest.mark.parametrize(
    ("name", "options"),
    [("rdkv", {"bits": 16.0, "later_bits": 16}), ("random_eviction", {"bits": 16, "kept_bits": 16})],
)
def test_a_full_budget_is_half_precision(tiny, token_ids, name, options):
    """With nothing to save, what is left out is what the index and the kept set take."""
    model, ids = tiny(), token_ids(2, 260)
    wanted = model(ids).logits[:, 200:]
    out, _, _ = outputs(model, Subject(name, options | {"residual_length": 16}), ids, 200)
    assert (out - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("bits", [2.0, 3.0, 5.0])
def test_bytes_stay_within_the_budget(tiny, token_ids, bits):
    model, ids = tiny(), token_ids(2, 300)
    for name in ("rdkv", "random_eviction"):
        subject = Subject(name, {"bits": bits, "residual_length": 16})
        with subject.on(model):
            cache = HeadQCache(model)
            model(ids, cache=cache)
            packed = 300 - 4 - 16
            budget = bits / 8 * 2 * 2 * 32 * packed  # of a layer: two sides of two heads of 32
            for layer in cache.layers:
                own = sum(t[0].nbytes for n, t in layer.codec.own_tensors().items() if "dropped" not in n)
                pages = int(layer.codec.own["key.kept"][0])
                assert (pages > 0) == (name == "random_eviction")
                stored = sum(t[0].nbytes for t in layer.pool.tensors) / layer.batch.page_tokens * pages + own - 8
                assert 0.85 * budget < stored <= budget + 16
            report = cache.bits_report()
            assert (report.key_stored_bits + report.value_stored_bits) / 2 == pytest.approx(bits, rel=0.15)
            assert sum(report.bytes.values()) == cache.get_memory_footprint()


def test_rdkv_reads_what_it_kept(tiny, token_ids):
    """One layer, one step: exact attention of each head over the tokens that it has kept."""
    model, ids = tiny(layers=1), token_ids(2, 201)
    subject, seen = Subject("rdkv", {"bits": 2.0, "residual_length": 16}), {}
    with subject.on(model):
        cache = HeadQCache(model)
        model(ids[:, :200], cache=cache)
        layer = cache.layers[0]
        attend = layer.attend

        def spy(q, scaling, *rest):
            seen["q"], seen["out"] = q * scaling, attend(q, scaling, *rest)
            return seen["out"]

        layer.attend = spy
        model(ids[:, 200:], cache=cache)
        window = [layer.window.at(n, torch.cat([torch.arange(4), torch.arange(184, 201)]).expand(2, -1)) for n in "kv"]
        dropped = 0
        for b in range(2):
            k, v, kept = layer.codec.prompt_tokens(b)
            dropped += int((~kept).sum())
            for h in range(4):
                keys = torch.cat([window[0][b, h // 2], k[h // 2, kept[h // 2]]])
                values = torch.cat([window[1][b, h // 2], v[h // 2, kept[h // 2]]])
                expected = (seen["q"][b, h] @ keys.T).softmax(-1) @ values
                torch.testing.assert_close(seen["out"][b, h], expected, atol=1e-5, rtol=1e-4)
        assert dropped > 100  # the budget has made it choose


def test_random_eviction_keeps_both_ends(tiny, token_ids):
    model, ids = tiny(layers=1), token_ids(1, 300)
    options = {"bits": 2.0, "kept_bits": 8, "head": 12, "residual_length": 16}
    drawn = []
    for seed in (0, 0, 1):
        subject = Subject("random_eviction", options | {"seed": seed})
        with subject.on(model):
            cache = HeadQCache(model)
            model(ids, cache=cache)
            layer = cache.layers[0]
            n = int(layer.codec.own["key.kept"][0])
            position = layer.pool.tensors[-1][layer.block_table[0].long()].flatten()[:n]
            drawn.append(position.tolist())
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == len(drawn[2])
    assert drawn[0][:12] == list(range(4, 16)) and drawn[0] == sorted(drawn[0])


@pytest.mark.parametrize("name", ["rdkv", "random_eviction"])
def test_files_and_generation(tiny, token_ids, tmp_path, name):
    model, ids = tiny(), token_ids(2, 330)
    with Subject(name, {"bits": 3.0, "residual_length": 16}).on(model):
        cache = HeadQCache(model)
        model(ids[:, :300], cache=cache)
        cache.save(tmp_path / "prompt.safetensors")
        loaded = HeadQCache.load(tmp_path / "prompt.safetensors", model)
        a, b = (model(ids[:, 300:], cache=c).logits for c in (cache, loaded))
        torch.testing.assert_close(a, b, atol=0, rtol=0)
        assert model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0).shape[1] > 330


def test_a_sliding_window_is_refused(tiny):
    with pytest.raises(ValueError, match="a sliding window is not evicted from"), Subject("rdkv").on(tiny("mistral")):
        pass
