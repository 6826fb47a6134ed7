"""The table of heads: where each head's tensors lie, and which kind of codes it has."""

import pytest
import torch

pytest.importorskip("triton")
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.paged_attention.triton_codes import query_columns
from headq_ao.ops.paged_attention.triton_heads import (
    FIELDS,
    KEY_PLANES,
    VALUE_PLANES,
    all_query_columns,
    head_table,
    kinds,
)

CPU = torch.device("cpu")
TWO, THREE = (Side((2,) * 64, scale_bits=8), Side((2,))), (Side((3,) * 64, True), Side((8,), True, 4))
LAYOUT = PageLayout(32, 64, 64, (GroupLayout(0, 1, *THREE), GroupLayout(1, 2, *TWO)))


def test_kinds_follow_each_other_in_the_columns():
    (chunks, first, zero, bits, widths, parts, value_zero, groups, *byte_scales), second = kinds((TWO, THREE))
    assert (first, zero, bits, widths, parts, value_zero, groups) == (0, False, 2, (2,), 4, False, 1)
    assert chunks[0][1] == 2 and byte_scales == [True, False]
    assert (second[2], second[3], second[4], second[5], second[6], second[7]) == (True, 8, (4, 4), 2, True, 4)
    columns = all_query_columns((TWO, THREE), CPU)
    assert second[1] == len(query_columns(TWO[0].bits, CPU))
    assert torch.equal(columns[second[1] :], query_columns(THREE[0].bits, CPU))


@pytest.mark.parametrize("interleaved", [False, True], ids=["heads apart", "heads side by side"])
def test_each_row_has_the_addresses_of_its_head(interleaved):
    pages = LAYOUT.allocate(5, torch.float32, CPU)
    if interleaved:
        pages = [x.contiguous() for x in pages]
    table = head_table(LAYOUT, pages)
    assert table.shape == (3, FIELDS) and table.dtype == torch.int64
    rows = iter(table.tolist())
    for group in LAYOUT.split(pages):
        for head in range(group.layout.heads):
            kind, *found = next(rows)
            assert LAYOUT.known_forms[kind] == (group.layout.keys, group.layout.values)
            wanted = []
            for side, most in ((group.keys, KEY_PLANES), (group.values, VALUE_PLANES)):
                tensors = [*side.planes, *[None] * (most - len(side.planes)), side.scale, side.zero]
                wanted += [(0, 0) if t is None else (t[:, head].data_ptr(), t.stride(0)) for t in tensors]
            assert found == [x for pair in wanted for x in pair]
    assert head_table(LAYOUT, pages) is table, "kept for as long as they lie there"
    assert head_table(LAYOUT, LAYOUT.allocate(5, torch.float32, CPU)) is not table


def test_pages_that_lie_askew_are_refused():
    pages = LAYOUT.allocate(5, torch.float32, CPU)
    room = torch.zeros(pages[0].numel() + 8, dtype=torch.uint8)
    odd = room[8:].view(pages[0].shape)
    assert odd.data_ptr() % 16 == 8
    with pytest.raises(ValueError, match="pages must lie at multiples of 16 bytes"):
        head_table(LAYOUT, [odd, *pages[1:]])
