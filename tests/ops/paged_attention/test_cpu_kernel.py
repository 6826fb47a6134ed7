"""Arguments of the compiled kernel: what it serves, and plans that follow pages. Its results are in
test_paged_attention.py."""

import copy
import dataclasses

import pytest
import torch

from headq_ao.ops.layout import PIECES, plane_columns, plane_pieces
from headq_ao.ops.paged_attention import cpu_kernel
from headq_ao.ops.paged_attention.cpu_kernel import CHUNK, FEW_TOKENS, MOST_QUERIES, plan, recent, same_query, serves
from tests.ops.paged_cases import Case, make

needs_kernel = pytest.mark.skipif(cpu_kernel.library() is None, reason="no C++ compiler: the reference serves")


@pytest.mark.parametrize(
    ("case", "served"),
    [
        (Case(), True),
        (Case(page=16, dtype=torch.float16), True),
        (Case(page=2048), False),
        (Case(keys=((),)), False),
        (Case(values=(0,)), False),
        (Case(keys=((2,) * 576,), key_dim=576), True),
        (Case(keys=((2,) * 592,), key_dim=592), False),
        (Case(keys=((1,) * 1160,)), False),
        (Case(dtype=torch.float64), False),
    ],
    ids=["plain", "half", "page", "no key bits", "no value bits", "576", "592", "columns", "fp64"],
)
def test_what_it_serves(case, served):
    """Both sides coded, in pages that make up a chunk, of heads up to 576 and planes up to 1152 columns."""
    kv, _ = make(dataclasses.replace(case, packed=(20,)))
    assert serves(kv) is served
    assert (kv.new_k is None) and not serves(dataclasses.replace(kv, new_k=kv.window_k.double()))


@pytest.mark.parametrize(
    ("bits", "same"),
    [((2,) * 64, True), ((3,) * 64, True), ((8,) * 64, False), ((2,) * 24, False), ((2,) * 48 + (4,) * 16, False),
     ((5,) * 32, True), ((5,) * 16, False), ((4,) * 8, True)],
)  # fmt: skip
def test_planes_that_read_the_query_as_it_is(bits, same):
    """Whole granules of the same bits, each piece in a plane of its own: 8 bits have two pieces in one."""
    assert same_query(bits) is same
    if same:
        assert all(plane_columns(w, len(p)) == len(bits) for w, p in plane_pieces(bits).items())
        assert len(plane_pieces(bits)) == len(PIECES[bits[0]])


def test_columns_of_the_query():
    """Coordinate and power of two of each column of each plane; padding reads the number behind the last."""
    bits = (4, 3, 1, 2)
    most, planes = cpu_kernel._columns(bits)
    assert most == max(plane_columns(w, len(p)) for w, p in plane_pieces(bits).items())
    for (column, factor), (width, pieces) in zip(planes, plane_pieces(bits).items(), strict=True):
        assert len(column) == plane_columns(width, len(pieces))
        assert list(zip(column, factor, strict=True))[: len(pieces)] == [(c, 2.0**s) for c, s in pieces]
        assert set(column[len(pieces) :]) <= {4}


@pytest.mark.parametrize(("columns", "heads"), [(1, 2), (64, 8), (20000, 32)])
def test_tiles_of_queries_bound_what_is_kept(columns, heads):
    kv, _ = make(Case(packed=(20,)))
    kv = dataclasses.replace(kv, table=torch.zeros(1, columns).int())
    tile = cpu_kernel._query_tile(torch.zeros(1, heads, 1, 64), kv)
    chunks = -(-columns * 32 // CHUNK)
    assert FEW_TOKENS <= tile <= MOST_QUERIES
    assert tile == FEW_TOKENS or tile * 4 * heads * chunks * (64 + 2) <= cpu_kernel.MOST_BYTES


@needs_kernel
def test_a_plan_goes_on_with_pages_that_have_grown():
    kv, readers = make(Case(packed=(300,), heads=(1, 1), keys=((2,) * 64, (3,) * 64), values=(2, 4), key_zero=True))
    q = torch.randn(1, 6, 1, 64)
    step = plan(kv, readers, 6, 0, None)
    want = step(q, 0.1)
    pages = [torch.cat([x, torch.zeros_like(x)]) for x in kv.pages]
    table = torch.nn.functional.pad(kv.table, (0, 3))
    for x in kv.pages:
        x.fill_(77) if x.dtype == torch.uint8 else x.fill_(float("nan"))
    assert not torch.equal(step(q, 0.1).nan_to_num(0), want)
    step.moved(pages, table)
    assert torch.equal(step(q, 0.1), want)
    assert copy.deepcopy({"plan": step}) == {"plan": None}, "a copied cache makes one of its own"


@needs_kernel
@pytest.mark.parametrize("name", ["packed", "held", "total"])
def test_lengths_of_a_plan_have_an_address(name):
    kv, readers = make(Case(packed=(300, 20), window=(10, 10), new=(0, 0)))
    apart = torch.stack([getattr(kv, name)] * 2, 1)[:, 0]
    with pytest.raises(ValueError, match=f"{name} must be contiguous, its address is kept"):
        plan(dataclasses.replace(kv, **{name: apart}), readers, 6, 0, None)


@needs_kernel
def test_requests_have_coordinates_side_by_side():
    kv, readers = make(Case(packed=(300,)))
    step = plan(kv, readers, 6, 0, None)
    q = torch.zeros(2, 6, 64)
    for one, other in ((q.transpose(1, 2).contiguous().transpose(1, 2), q), (q, q.double())):
        with pytest.raises(ValueError, match="with coordinates side by side"):
            step.requests(one, 0.1, other, None)


def test_no_recent_tokens_are_minus_one():
    assert [recent(x) for x in (None, 0, 7)] == [-1, 0, 7]
