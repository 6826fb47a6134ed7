"""What a codec may ask of the cache, each with a toy, against exact attention over what its tokens stand for."""

import copy

import pytest
import torch

from headq_ao.cache.batch import Batch
from headq_ao.cache.layer import PackedLayer
from headq_ao.cache.schedule import Span, page_tokens, schedule_of
from headq_ao.cache.serialize import batch_from_data, batch_to_data, layer_from_tensors, layer_to_tensors
from headq_ao.codecs.registry import LayerContext, TokenSource
from headq_ao.codecs.tokenwise import Form, TokenCodec
from headq_ao.config import headq_config
from headq_ao.layer_shape import LayerShape

SINKS, WINDOW, HEADS, KV, D = 4, 16, 4, 2, 8
CPU = torch.device("cpu")


class Plain(TokenCodec):
    """Keys and values in fp64 as they are, so that whatever differs is the engine's."""

    def forms(self):
        return {side: Form(side, (self.shape.head_dim,), torch.float64) for side in ("key", "value")}

    def encode(self, k, v, position):
        return {"key": k, "value": v}

    def decode_keys(self, held):
        return held["key"]

    def decode_values(self, held):
        return held["value"]


class Grouped(Plain):
    """Values per token; of keys the mean over 8 tokens, stored once."""

    granularity = 8

    def forms(self):
        return super().forms() | {"key": Form("key", (self.shape.head_dim,), torch.float64, tokens=8)}

    def encode(self, k, v, position):
        assert k.shape[2] % 8 == 0
        assert bool(((position[:, ::8] - SINKS) % 8 == 0)[position[:, ::8] >= 0].all())
        return {"key": k.unflatten(2, (-1, 8)).mean(3), "value": v}

    def decode_keys(self, held):
        return held["key"].repeat_interleave(8, 2)


class Centred(Plain):
    """Keys in fp16, less the mean of the sequence's own first tokens."""

    warmup = 24

    def forms(self):
        return super().forms() | {"key": Form("key", (self.shape.head_dim,), torch.float16)}

    def statistics(self, q, k, v, scaling, sliding):
        assert k.shape[2] == SINKS + self.warmup
        return {"key.mean": k[:, :, SINKS:].mean(2)}

    def encode(self, k, v, position):
        return super().encode(k - self.own["key.mean"][:, :, None], v, position)

    def decode_keys(self, held):
        return held["key"].double() + self.own["key.mean"][:, :, None]


class Summed(Plain):
    """One token more: the sums of all packed keys and of all packed values."""

    accumulates = True

    def state(self, device):
        shape = self.batch, self.shape.n_kv_heads, self.shape.head_dim
        new = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in ("key.sum", "value.sum")}
        return new | {"key.end": torch.zeros(self.batch, dtype=torch.int64, device=device)}

    def encode(self, k, v, position):
        new = (position >= self.own["key.end"][:, None])[:, None, :, None]
        self.own["key.sum"].add_((k * new).sum(2))
        self.own["value.sum"].add_((v * new).sum(2))
        self.own["key.end"].copy_(self.own["key.end"].maximum(position.amax(1) + 1))
        return super().encode(k, v, position)

    def extra(self, q):
        k, v = self.own["key.sum"][:, :, None], self.own["value.sum"][:, :, None]
        lse = (q * k[:, :, None]).sum(-1)
        return v[:, :, None].expand(q.shape), lse


class Dropping(Plain):
    """Keeps every third token of the prompt, by the sequence's own count, and what its own first query points at."""

    prompt = drops = True

    def see_prompt(self, q, k, v, scaling, position):
        assert bool((position.amax(1) > 0).all())
        return self, kept_of(position)


def kept_of(position):
    return position % 3 == 0


class Paged(Plain):
    """Two codec ids: keys of pages from the second on are stored four times as large."""

    segments = 2

    def segment(self, page, page_tokens):
        return (page >= 2).long()

    def encode(self, k, v, position):
        factor = torch.where(position - SINKS >= 2 * 16, 4.0, 1.0)
        return super().encode(k * factor[:, None, :, None], v, position)

    def decode_keys(self, held):
        return held["key"] / torch.where(held.segment == 1, 4.0, 1.0)[:, None, :, None]


class Positioned(Plain):
    """Keys less their position."""

    def encode(self, k, v, position):
        return super().encode(k - position[:, None, :, None], v, position)

    def decode_keys(self, held):
        return held["key"] + held.position[:, None, :, None]


TOYS = [Plain, Grouped, Centred, Summed, Dropping, Paged, Positioned]
SHARED_ROWS = [Plain, Grouped, Centred, Paged, Positioned]


def shape_of(sliding=None, softcap=None):
    return LayerShape(HEADS, KV, D, sliding, softcap=softcap)


def make(toy, sliding=None, capacity=None, softcap=None):
    """An empty layer, alone in its cache."""
    config = headq_config(n_sink=SINKS, residual_length=WINDOW, block_size=16)
    source = TokenSource(toy(), LayerContext(shape_of(sliding, softcap), SINKS, CPU), "a toy")
    schedule = schedule_of(config, [source])
    batch = Batch(schedule, page_tokens(config, schedule), capacity)
    batch.layers = [PackedLayer(shape_of(sliding, softcap), source, batch)]
    return batch.layers[0]


def states(batch, tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, tokens, D, generator=g, dtype=torch.float64) for h in (HEADS, KV, KV))
    return q, k, v


def feed(layer, q, k, v, calls, spans=None):
    """Give a layer the tokens in calls of those lengths; what attention gave behind the first, ``[B, Hq, n, D]``."""
    at, outs = 0, []
    for i, n in enumerate(calls):
        part = slice(at, at + n)
        if spans is not None and i == 0:
            layer.batch.begin(len(k), n, spans)
        layer.update(k[:, :, part], v[:, :, part])
        if layer.batch.lengths.first:
            layer.commit(q[:, :, part], 1.0)
        else:
            outs.append(layer.attend(q[:, :, part], 1.0, k[:, :, part], v[:, :, part]))
        at += n
    return torch.cat(outs, 2) if outs else None


def attention(q, k, v, seen, softcap=None):
    """Exact attention over tokens ``[B, Hkv, T, D]``, ``seen [B or 1, S, T]``."""
    s = q.unflatten(1, (KV, -1)) @ k[:, :, None].transpose(-1, -2)
    s = s if softcap is None else softcap * (s / softcap).tanh()
    a = s.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    return (a @ v[:, :, None]).flatten(1, 2)


def stands_for(toy, k, packed):
    """What the first ``packed`` body tokens of keys are read as."""
    if toy is not Grouped:
        return k
    body = k[:, :, SINKS : SINKS + packed].unflatten(2, (-1, 8)).mean(3, keepdim=True).expand(-1, -1, -1, 8, -1)
    return torch.cat([k[:, :, :SINKS], body.flatten(2, 3), k[:, :, SINKS + packed :]], 2)


@pytest.mark.parametrize("calls", [(60, *(1,) * 60), (60, 30, 30), (1, 59, *(1,) * 20, 40), (5, *(1,) * 115)])
@pytest.mark.parametrize("toy", SHARED_ROWS)
def test_attention_is_over_what_tokens_stand_for(toy, calls):
    q, k, v = states(2, 120)
    layer = make(toy)
    out = feed(layer, q, k, v, calls)
    begin = calls[0]
    group = toy.granularity
    packed = max(120 - SINKS - WINDOW, 0) // group * group
    assert layer.batch.lengths.packed() == [packed] * 2
    rows, values = layer.dequantize()
    torch.testing.assert_close(rows, stands_for(toy, k, packed), atol=2e-3 if toy is Centred else 1e-12, rtol=0)
    torch.testing.assert_close(values, v, atol=1e-12, rtol=0)
    if toy is Grouped:  # what is packed differs from call to call
        total = 120
        expected = attention(q[:, :, -1:], rows, v, torch.ones(1, 1, total, dtype=torch.bool))
        last = layer.attend(q[:, :, -1:], 1.0, k[:, :, -1:], v[:, :, -1:]) if calls[-1] == 1 else None
        if last is not None:
            torch.testing.assert_close(last, expected, atol=1e-9, rtol=0)
        return
    at = torch.arange(120)
    expected = attention(q, k, v, (at[:, None] >= at)[None])[:, :, begin:]
    torch.testing.assert_close(out, expected, atol=5e-3 if toy is Centred else 1e-9, rtol=0)


@pytest.mark.parametrize("toy", [Plain, Paged, Positioned, Grouped])
def test_a_sliding_window_uses_pages_again(toy):
    q, k, v = states(1, 300)
    layer = make(toy, sliding=50)
    out = feed(layer, q, k, v, (60, *(1,) * 100, 40, *(1,) * 100))
    assert layer.table.columns <= 7
    if toy in (Plain, Positioned):
        at = torch.arange(300)
        age = at[:, None] - at
        expected = attention(q, k, v, ((age >= 0) & (age < 50))[None])[:, :, 60:]
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    assert out.isfinite().all()


def test_scores_of_all_tokens_are_under_the_layers_softcap():
    (q, k, v), at = states(1, 100), torch.arange(100)
    out = feed(make(Plain, softcap=1.5), q, k, v, (60, 25, *(1,) * 15))
    expected = attention(q, k, v, (at[:, None] >= at)[None], 1.5)[:, :, 60:]
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


def test_a_tail_of_a_group_stays_in_full_precision():
    layer = make(Grouped)
    q, k, v = states(1, 100)
    feed(layer, q, k, v, (30, *(1,) * 70))
    packed = layer.batch.lengths.packed()[0]
    assert WINDOW <= 100 - SINKS - packed <= WINDOW + 7 and packed % 8 == 0 and layer.batch.page_tokens == 16
    with pytest.raises(RuntimeError, match="8 tokens are coded together here, and the crop ends within them"):
        layer.check_crop(30)
    layer.check_crop(100 - SINKS - 64)


def test_state_follows_its_sequence():
    layer, (q, k, v) = make(Centred), states(2, 80)
    k[1] += 3
    feed(layer, q, k, v, (60,))
    layer.select(torch.tensor([1, 0, 1]), layer.batch.select([1, 0, 1])[None])
    assert layer.codec.own["key.mean"].shape == (3, KV, D)
    q, k, v = (x[[1, 0, 1]] for x in (q, k, v))
    out = [layer_call(layer, q, k, v, i) for i in range(60, 80)]
    at = torch.arange(80)
    expected = attention(q, k, v, (at[:, None] >= at)[None])[:, :, 60:]
    torch.testing.assert_close(torch.cat(out, 2), expected, atol=5e-3, rtol=0)


def layer_call(layer, q, k, v, i, n=1):
    part = slice(i, i + n)
    layer.update(k[:, :, part], v[:, :, part])
    return layer.attend(q[:, :, part], 1.0, k[:, :, part], v[:, :, part])


def test_an_extra_term_is_merged():
    layer, (q, k, v) = make(Summed), states(2, 90)
    k, v = k / 10, v / 10
    feed(layer, q, k, v, (60,))
    for i in range(60, 90):
        out = layer_call(layer, q, k, v, i)
        n = i - SINKS - WINDOW  # packed before this call; what it packs is packed behind its attention
        assert layer.batch.lengths.coded == [n] * 2
        sums = (x[:, :, SINKS : SINKS + n].sum(2, keepdim=True) for x in (k, v))
        more_k, more_v = (torch.cat([x[:, :, : i + 1], s], 2) for x, s in zip((k, v), sums, strict=True))
        expected = attention(q[:, :, i : i + 1], more_k, more_v, torch.ones(1, 1, i + 2, dtype=torch.bool))
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    with pytest.raises(RuntimeError, match="a toy sums up what it packs, and 3 of those tokens would go"):
        layer.check_crop(WINDOW + 3)
    layer.check_crop(WINDOW)


def test_a_copy_sums_up_its_own():
    layer, (q, k, v) = make(Summed), states(1, 90)
    feed(layer, q, k, v, (60, 1))
    layer.batch.settle()
    other = copy.deepcopy(layer)
    before = layer.codec.own["key.sum"].clone()
    layer_call(other, q, k, v, 61)
    other.batch.settle()
    assert torch.equal(layer.codec.own["key.sum"], before) and not torch.equal(other.codec.own["key.sum"], before)
    assert copy.deepcopy(make(Plain).source.prototype).own == {}


def dropped_attention(q, k, v, i, prompt):
    """Of query ``i``, where the prompt's packed tokens were thinned out."""
    at = torch.arange(i + 1)
    leaving = (at >= SINKS) & (at < prompt - WINDOW)
    return attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], (~leaving | kept_of(at))[None, None])


def test_a_prompt_is_thinned_out():
    layer, (q, k, v) = make(Dropping), states(2, 200)
    feed(layer, q, k, v, (140,))
    kept = int(kept_of(torch.arange(SINKS, 140 - WINDOW)).sum())
    assert layer.codec.own["key.kept"].tolist() == [kept] * 2 and layer.table.stored([120, 120]) == [kept] * 2
    assert layer.table.columns == -(-kept // 16) and layer.pool.pages <= 1 + 2 * (-(-kept // 16) + 1)
    for i in range(140, 180):
        torch.testing.assert_close(layer_call(layer, q, k, v, i), dropped_attention(q, k, v, i, 140), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="a toy leaves tokens out: they have no keys and values"):
        layer.dequantize()
    chunk = layer_call(layer, q, k, v, 180, 20)
    expected = torch.cat([dropped_attention(q, k, v, i, 140) for i in range(180, 200)], 2)
    torch.testing.assert_close(chunk, expected, atol=1e-9, rtol=0)
    layer.batch.settle()
    pages = -(-(kept + 60) // 16)
    assert layer.table.columns < -(-(200 - SINKS - WINDOW) // 16) and layer.table.columns >= pages


def test_thinned_prompts_of_different_lengths():
    """Padding on the left; each sequence counts its own positions. Then one of them twice, and from a file."""
    layer, (q, k, v) = make(Dropping), states(2, 160)
    feed(layer, q, k, v, (120,), [Span(50, 120), Span(0, 120)])
    alone = [x[:1, :, 50:] for x in (q, k, v)]
    out = layer_call(layer, q, k, v, 120)
    torch.testing.assert_close(out[:1], dropped_attention(*alone, 70, 70), atol=1e-9, rtol=0)
    torch.testing.assert_close(out[1:], dropped_attention(q[1:], k[1:], v[1:], 120, 120), atol=1e-9, rtol=0)
    batch = layer.batch
    order = [1, 0, 0]
    batch.settle()
    copies = batch.select(order)
    layer.select(torch.tensor(order), copies[layer.table_key])
    q, k, v = (x[order] for x in (q, k, v))
    batch.settle()
    tensors, data = layer_to_tensors(layer)
    other = make(Dropping)
    batch_from_data(other.batch, batch_to_data(batch))
    layer_from_tensors(other, data, tensors, CPU)
    for i in range(121, 160):
        out, again = (layer_call(x, q, k, v, i) for x in (layer, other))
        assert torch.equal(out, again)
        torch.testing.assert_close(out[:1], dropped_attention(q[:1], k[:1], v[:1], i, 120), atol=1e-9, rtol=0)
        for b in (1, 2):
            mine = [x[b : b + 1, :, 50:] for x in (q, k, v)]
            torch.testing.assert_close(out[b : b + 1], dropped_attention(*mine, i - 50, 70), atol=1e-9, rtol=0)
    with pytest.raises(RuntimeError, match="a toy has left tokens out"):
        layer.check_crop(100)
    with pytest.raises(ValueError, match="sequences differ in length"):
        layer.dequantize()


@pytest.mark.parametrize("toy", TOYS)
def test_stored_and_restored(toy):
    layer, (q, k, v) = make(toy), states(2, 130)
    feed(layer, q, k, v, (90, 1, 1))
    layer.batch.settle()
    tensors, data = layer_to_tensors(layer)
    other = make(toy)
    batch_from_data(other.batch, batch_to_data(layer.batch))
    layer_from_tensors(other, data, {name: t.clone() for name, t in tensors.items()}, CPU)
    for i in range(92, 130):
        assert torch.equal(layer_call(layer, q, k, v, i), layer_call(other, q, k, v, i))
    held = {name: t.shape for name, t in layer.codec.own_tensors().items()}
    assert held == {name: t.shape for name, t in other.codec.own_tensors().items()}


@pytest.mark.parametrize("toy", TOYS)
def test_tokens_read_are_counted(toy):
    layer, (q, k, v) = make(toy), states(1, 101)
    feed(layer, q, k, v, (100,))
    before = layer.tokens_read
    layer_call(layer, q, k, v, 100)
    packed, every = (b - a for a, b in zip(before, layer.tokens_read, strict=True))
    n = layer.table.stored([100 - SINKS - WINDOW])[0]
    assert packed == n and every == n + SINKS + WINDOW + 1


def test_codec_ids_are_of_pages():
    layer, (q, k, v) = make(Paged), states(1, 130)
    feed(layer, q, k, v, (130,))
    assert layer.pool.segment[layer.block_table[0].long()].tolist()[:7] == [0, 0, 1, 1, 1, 1, 1]
    assert layer._before().segment is layer.pool.segment
    assert any(t is layer.pool.segment for t in layer.tensors())
    plain = make(Plain)
    feed(plain, q, k, v, (130,))
    assert plain._before().segment is None


def test_what_an_engine_cannot_hold():
    with pytest.raises(ValueError, match="a toy leaves tokens of the prompt out, and a sliding-window layer"):
        make(Dropping, sliding=64)
    with pytest.raises(ValueError, match="a toy leaves tokens of the prompt out, and a cache of fixed capacity"):
        make(Dropping, capacity=256)
    assert make(Plain, capacity=256).source.prototype.captured
    for toy in (Grouped, Centred, Summed, Dropping):
        layer, (q, k, v) = make(toy), states(1, 130)
        feed(layer, q, k, v, (90,))
        layer.batch.begin(len(k), 40)
        problem = layer._traced_problem(k[:, :, 90:], v[:, :, 90:])
        assert not layer.codec.captured and "a toy, which decides on the host" in problem


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"granularity": 4}, "a toy codes 4 tokens at a time, and entries are of more: key .8."),
        ({"prompt": True, "drops": True}, "a toy leaves tokens out and codes 8 together"),
    ],
)
def test_attributes_must_fit(attributes, message):
    with pytest.raises(ValueError, match=message):
        make(type("Toy", (Grouped,), attributes))


def test_what_must_see_the_prompt_does():
    layer, (_, k, v) = make(Dropping), states(1, 100)
    layer.update(k, v)
    with pytest.raises(RuntimeError, match="never attended"):
        layer.batch.settle()
