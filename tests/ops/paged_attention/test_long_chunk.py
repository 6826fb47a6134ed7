"""Parts of a long chunk: one sequence's readers, parts that are joined, and what packed tokens stand for."""

import dataclasses

import pytest
import torch

from headq_ao.ops.page_layout import PageLayout
from headq_ao.ops.paged_attention import reference
from headq_ao.ops.paged_attention.long_chunk import attention, dequantized, join, readers_of, serves
from headq_ao.ops.types import Readers, visible_positions
from tests.ops.frames import some_frame
from tests.ops.paged_cases import Case, make


def test_readers_of_one_sequence():
    """What is of sequences is cut, what all share is not."""
    query_map, read, mean = torch.randn(1, 3, 2, 8, 11), torch.randn(3, 2, 8, 8), torch.randn(1, 2, 8)
    found = readers_of(Readers(query_map, read, mean), 2)
    assert torch.equal(found.query_map, query_map[:, 2:]) and torch.equal(found.read, read[2:]) and found.mean is mean
    shared = Readers(query_map[:, :1], None, None)
    assert readers_of(shared, 2).query_map is shared.query_map and readers_of(shared, 2).read is None


def test_two_parts_are_one_softmax():
    g = torch.Generator().manual_seed(0)
    s, v = torch.randn(1, 2, 3, 20, generator=g, dtype=torch.float64) * 4, torch.randn(20, 8, generator=g).double()

    def part(t):
        return s[..., t].softmax(-1) @ v[t], s[..., t].logsumexp(-1)

    for cut in (1, 7, 19):
        found = part(slice(0, cut))
        join(*found, part(slice(cut, 20)))
        for x, y in zip(found, part(slice(0, 20)), strict=True):
            torch.testing.assert_close(x, y)
    out, lse = torch.ones(1, 2), torch.tensor([1000.0])
    join(out, lse, (torch.zeros(1, 2), torch.tensor([-1000.0])))
    assert out.tolist() == [[1.0, 1.0]] and lse.tolist() == [1000.0], "far apart, and no overflow"


CASES = {
    "plain": Case(packed=(300,)),
    "zeros": Case(packed=(300,), key_zero=True, value_zero=True, value_groups=2),
    "side code": Case(packed=(300,), keys=((2,) * 64 + (4,) * 8,)),
    "head groups": Case(packed=(300,), heads=(1, 2), keys=((3,) * 64, (2,) * 64), values=(4, 2)),
    "frame": Case(packed=(300,), frame=some_frame(64, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_keys_are_what_queries_see_of_them(name):
    """``scaling · q·k̂`` is the score of the codes; values in the model's basis, the mean with them; any part."""
    kv, readers = make(CASES[name])
    layout, q = PageLayout.parse(kv.layout), torch.randn(1, 6, 3, 64, generator=torch.Generator().manual_seed(1))
    k, v = dequantized(kv, layout, readers, 0, 300, torch.float32)
    grouped = q.unflatten(1, (layout.kv_heads, -1)).double()
    j = reference.body_tokens(kv, layout.page_tokens).flatten(1)
    frames = None if readers.frame is None else readers.frame.of(j)
    for group in layout.split(kv.pages):
        part = group.layout.part
        s = reference.group_scores(grouped[:, part], group, kv.table.long(), None, readers, frames)
        torch.testing.assert_close(grouped[:, part] @ k[:, part, None].mT.double(), s[..., :300], rtol=1e-4, atol=1e-3)
        y = reference.gathered(group.values, kv.table.long(), torch.float32, keys=False)[:, :, :300]
        want = y @ readers.read[:, part].mT + readers.mean[:, :, None]
        torch.testing.assert_close(v[:, part], want, rtol=1e-4, atol=1e-4)
    for begin, end in ((0, 1), (31, 33), (100, 300)):
        for x, whole in zip(dequantized(kv, layout, readers, begin, end, torch.float32), (k, v), strict=True):
            torch.testing.assert_close(x, whole[:, :, begin:end], rtol=1e-5, atol=1e-5)


def test_all_of_a_cache_is_read():
    """Pages, sinks, ring and the call's own tokens, of sequences of unequal lengths."""
    kv, readers = make(Case(packed=(300, 40), window=(50, 7), new=(8, 8)))
    q = torch.randn(2, 4, 8, 64, generator=torch.Generator().manual_seed(1))
    found = attention(q, 0.2, kv, readers)
    want = reference.paged_attention(q, 0.2, kv, readers, visible_positions(kv.total, 8, 0))
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_chunks_that_it_does_not_serve():
    kv, _ = make(Case(packed=(300,), window=(50,), new=(520,), dtype=torch.bfloat16))
    q = torch.zeros(1, 4, 520, 64, dtype=torch.bfloat16)
    assert serves(q, kv, None, 0)
    ranges = visible_positions(kv.total, 520, 0)
    for other in (
        (q[:, :, :500], kv, None, 0), (q.float(), kv, None, 0), (q, kv, ranges, 0), (q, kv, None, 9),
        (q.half(), kv, None, 0), (q, dataclasses.replace(kv, new_k=None), None, 0),
        (q, dataclasses.replace(kv, held=kv.held * 0), None, 0),
        (q, dataclasses.replace(kv, total=kv.total - 1), None, 0),
        (q, dataclasses.replace(kv, segment=torch.zeros(20).int()), None, 0),
        (q, dataclasses.replace(kv, layout=Case(value_dim=32).layout.spec), None, 0),
    ):  # fmt: skip
        assert not serves(*other)
