"""What a page holds: its form as a text, its tensors, and pages in one piece."""

import math

import pytest
import torch

from headq_ao.ops.layout import pack_keys, pack_values
from headq_ao.ops.page_layout import ALIGNED, SHARED, GroupLayout, PageLayout, Side, value_granule, values_are_keys

CPU = torch.device("cpu")
LAYOUTS = {
    "one group": PageLayout(32, 64, 64, (GroupLayout(0, 2, Side((2,) * 64), Side((2,))),)),
    "groups": PageLayout(
        32, 32, 32,
        (GroupLayout(0, 1, Side((3,) * 32), Side((4,), True, 2)), GroupLayout(1, 2, Side((1,) * 32, True), Side((3,)))),
    ),
    "side code": PageLayout(64, 16, 32, (GroupLayout(0, 3, Side((2,) * 16 + (4,) * 4 + (2,) * 3), Side((8,))),)),
    "exact keys": PageLayout(16, 48, 16, (GroupLayout(0, 2, Side(), Side((2,))),)),
    "exact": PageLayout(16, 16, 48, (GroupLayout(0, 2, Side(), Side()),)),
    "values are keys": PageLayout(16, 48, 48, (GroupLayout(0, 1, Side((2,) * 48), SHARED),)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_text_says_it_all(name):
    layout = LAYOUTS[name]
    assert PageLayout.parse(layout.spec) == layout and PageLayout.parse(layout.spec).spec == layout.spec
    assert values_are_keys(layout.spec) == layout.groups[0].values.shared == (name == "values are keys")
    for group in layout.groups:
        assert Side.parse(group.keys.spec) == group.keys and Side.parse(group.values.spec) == group.values


def test_texts_of_sides():
    assert Side((2, 2, 4), True).spec == "2*2+4*1,1,1" and Side().spec == ",0,1"
    assert Side.parse("3*2+1*1,0,4") == Side((3, 3, 1), False, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_are_dealt_out_by_group_and_side(name):
    """All of them, each once; codes as they are packed, a scale and a zero of each token."""
    layout = LAYOUTS[name]
    pages = layout.allocate(5, torch.bfloat16, CPU)
    assert not any(bool(x.any()) for x in pages)
    dealt = [t for g in layout.split(pages) for side in (g.keys, g.values) for t in side.tensors]
    assert len(dealt) == len(pages) and all(any(t is x for x in pages) for t in dealt)
    assert [((x.shape[1:]), x.dtype) for x in pages] == [
        (shape, dtype or torch.bfloat16) for shape, dtype in layout.page_shapes()
    ]
    p = layout.page_tokens
    for group in layout.split(pages):
        heads = group.layout.heads
        for side, form, dim in (
            (group.keys, group.layout.keys, layout.key_dim), (group.values, group.layout.values, layout.value_dim)
        ):  # fmt: skip
            if form.shared:
                assert side.tensors == []
                continue
            if not form.bits:
                assert side.exact.shape == (5, heads, p, dim) and side.exact.dtype == torch.bfloat16
                continue
            if side is group.keys:
                packed = pack_keys(torch.zeros(5, heads, p, len(form.bits), dtype=torch.uint8), form.bits)
            else:
                packed = pack_values(torch.zeros(5, heads, p, dim, dtype=torch.uint8), form.bits[0])
            assert [x.shape for x in side.planes] == [x.shape for x in packed]
            assert side.scale.dtype == torch.float16 and (side.zero is None) is not form.zero
            assert side.scale.shape == ((5, heads, p) if side is group.keys else (5, heads, p, form.groups))
    assert layout.kv_heads == sum(x.layout.heads for x in layout.split(pages))


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pages_in_one_piece(name, sinks):
    """The same tensors over an engine's bytes: none shares a byte with another, and each begins where it may."""
    layout, dtype = LAYOUTS[name], torch.bfloat16
    size = layout.bytes_of_page(sinks, dtype)
    raw = torch.zeros(3, size + 6, dtype=torch.uint8)
    pages, *of_sinks = layout.views(raw, sinks, dtype)
    assert [x.shape for x in pages] == [x.shape for x in layout.allocate(3, dtype, CPU)]
    for x, dim in zip(of_sinks, (layout.key_dim, layout.value_dim), strict=True):
        assert x.shape == (3, layout.kv_heads, sinks, dim) and x.dtype == dtype
    held = 0
    for x in (*pages, *(s for s in of_sinks if sinks)):
        assert (x.data_ptr() - raw.data_ptr()) % ALIGNED == 0
        before = raw.count_nonzero()
        x.view(torch.uint8).fill_(255)
        written = math.prod(x.shape) * x.element_size()
        assert int(raw.count_nonzero() - before) == written
        held += written
    assert int(raw[:, size:].count_nonzero()) == 0 and held <= 3 * size < held + 3 * ALIGNED * (len(pages) + 2)


def test_bytes_that_do_not_fit():
    layout = LAYOUTS["one group"]
    size = layout.bytes_of_page(4, torch.float32)
    for raw in (torch.zeros(3, size - 1, dtype=torch.uint8), torch.zeros(3, size, dtype=torch.int8)):
        with pytest.raises(ValueError, match=rf"raw must be uint8 \[N, {size} or more\]"):
            layout.views(raw, 4, torch.float32)
    odd = torch.zeros(3, size + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pages must begin on multiples of 4 bytes"):
        layout.views(odd, 4, torch.float32)


def test_forms_are_known_from_their_first_allocation_on():
    """Of pages of one size, in the order in which they came: a kernel for all of them serves each."""

    def layout(bits):
        return PageLayout(32, 48, 144, (GroupLayout(0, 1, Side((bits,) * 48), Side((bits,))),))

    layout(2).allocate(1, torch.float32, CPU)
    layout(4).allocate(1, torch.float32, CPU)
    wanted = ((Side((2,) * 48), Side((2,))), (Side((4,) * 48), Side((4,))))
    assert layout(2).known_forms == layout(4).known_forms == wanted
    assert PageLayout(64, 48, 144, layout(8).groups).known_forms == ((Side((8,) * 48), Side((8,))),)


@pytest.mark.parametrize(("bits", "tokens"), [(1, 32), (2, 16), (3, 32), (4, 8), (5, 32), (6, 16), (8, 8)])
def test_tokens_that_share_the_bytes_of_values(bits, tokens):
    assert value_granule(bits) == tokens
