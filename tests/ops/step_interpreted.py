"""The Triton kernels of a decoding step's cache_update against the reference: in Triton's interpreter by
test_triton_interpreter.py, and on a GPU.

The interpreter is chosen when Triton is imported, so these run in a process of their own, with TRITON_INTERPRET=1;
``python -m pytest tests/ops/step_interpreted.py`` without it runs them on the GPU.
"""

import os
from dataclasses import replace

import pytest
import torch

from headq_ao.ops.cache_update import op, triton_kernel
from headq_ao.ops.cache_update.encoders import flatten
from headq_ao.ops.encode import reference
from headq_ao.ops.encode.types import Encoder
from headq_ao.ops.layout import unpack_keys, unpack_values
from headq_ao.ops.page_layout import GroupLayout, PageLayout, Side
from headq_ao.ops.types import PagedKV
from tests.ops.frames import some_frame

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU, no interpreter")
SINKS, RING, PAGE, COLUMNS = 4, 24, 32, 3
STEPS = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 8: 0.0308}
# of each head group: key bits, value bits, KV heads; negative: without error feedback
CASES = {
    "2 bits": (32, [(2, 2, 1)], torch.float32),
    "groups": (16, [(3, 1, 1), (1, 4, 2)], torch.bfloat16),
    "no feedback": (48, [(-4, -3, 1)], torch.float32),
    "values without": (16, [(5, -6, 1), (8, -2, 1)], torch.float32),
    "odd size": (48, [(6, 3, 1)], torch.float32),
}
FRAMES = {"2 bits": some_frame(32, 32), "groups": some_frame(16, 32, 2, rotary=8)}  # of some of them
LARGE = {
    "64": (64, [(2, 2, 3)], torch.bfloat16),
    "80": (80, [(2, 4, 2)], torch.bfloat16),
    "128": (128, [(2, 2, 2), (3, 2, 2), (1, 3, 4)], torch.bfloat16),
    "256": (256, [(4, 2, 2)], torch.bfloat16),
}


def scale_bits_of(bits, scale_bits):
    """With error feedback alone a scale is in a byte."""
    return scale_bits if bits > 0 else 16


def encoder(keys, bits, heads, dim, frame=None, scale_bits=8):
    """As calibrations make them."""
    scale_bits = scale_bits_of(bits, scale_bits)
    steps = keys or scale_bits == 8
    step = torch.full((1, 1, dim), STEPS[abs(bits)]) if steps else STEPS[abs(bits)]
    seen = torch.randn(1, heads, dim, max(dim // 4, 1))
    return Encoder(
        torch.linalg.qr(torch.randn(1, heads, dim, dim))[0].to(DEVICE), (abs(bits),),
        step.to(DEVICE) if steps else step, mean=torch.randn(1, heads, dim).to(DEVICE),
        hessian=(seen @ seen.mT + 0.2 * torch.eye(dim)).to(DEVICE) if bits > 0 else None, unbiased=bits != 5,
        scale_bits=scale_bits, frame=frame,
    )  # fmt: skip


def cache(dim, heads, dtype, packed, held, frame=None, scale_bits=8):
    """Random pages, a random ring, and the encoders."""
    torch.manual_seed(0)
    groups, encoders, first = [], ([], []), 0
    for k, v, n in heads:
        of_keys, of_values = (scale_bits_of(bits, scale_bits) for bits in (k, v))
        sides = Side((abs(k),) * dim, scale_bits=of_keys), Side((abs(v),), scale_bits=of_values)
        groups.append(GroupLayout(first, n, *sides))
        encoders[0].append(encoder(True, k, n, dim, frame, scale_bits))
        encoders[1].append(encoder(False, v, n, dim, scale_bits=scale_bits))
        first += n
    layout, batch = PageLayout(PAGE, dim, dim, tuple(groups)), len(packed)
    pages = layout.allocate(1 + batch * COLUMNS, dtype, DEVICE)
    for t in pages:
        t.copy_(torch.randint(0, 256, t.shape)) if t.dtype == torch.uint8 else t.copy_(torch.rand(t.shape))
    table = (torch.randperm(batch * COLUMNS) + 1).view(batch, COLUMNS).int()
    lengths = [torch.tensor(x) for x in (packed, held)]
    windows = [(2 * torch.randn(batch, first, SINKS + RING, dim) + 0.5).to(dtype) for _ in range(2)]
    table, *rest = (x.to(DEVICE) for x in (table, *lengths, *windows))
    kv = PagedKV(pages, layout.spec, table, None, rest[0], rest[1], rest[1], rest[2], rest[3], SINKS)
    return kv, layout, encoders


def stored(kv, layout):
    """Codes ``[N, h, P, ..]`` and scales of each side."""
    for group in layout.split(kv.pages):
        yield unpack_keys(group.keys.planes, group.keys.bits), group.keys.scale
        yield unpack_values(group.values.planes, group.values.bits[0]), group.values.scale[..., 0]


def compare(case, packed, held, new, leaving, start=None, frame=None, scale_bits=8):
    dim, heads, dtype = case
    if frame is not None:
        frame = replace(frame, table=frame.table.to(DEVICE), partner=frame.partner.to(DEVICE))
    kv, layout, encoders = cache(dim, heads, dtype, packed, held, frame, scale_bits)
    k, v = ((2 * torch.randn(len(packed), new, kv.window_k.shape[1], dim)).transpose(1, 2) for _ in range(2))
    k, v = (x.to(DEVICE, dtype) for x in (k, v))
    after = kv.packed + torch.tensor(leaving, device=DEVICE)
    start = None if start is None else torch.tensor(start, device=DEVICE)
    total = kv.held + new - (0 if start is None else start)
    found, expected = (
        replace(kv, total=total, new_start=start, pages=[p.clone() for p in kv.pages], window_k=kv.window_k.clone(),
                window_v=kv.window_v.clone())
        for _ in range(2)
    )  # fmt: skip
    most = max(leaving)
    assert triton_kernel.launch(found, k, v, after, most, *flatten(*encoders), False)
    op.by_quantize(expected, k, v, after, most, *encoders, False, reference.quantize)
    for a, b in ((found.window_k, expected.window_k), (found.window_v, expected.window_v)):
        assert torch.equal(a, b)
    rows = same = 0
    written = torch.zeros(len(kv.pages[0]), PAGE, dtype=torch.bool, device=DEVICE)
    for b, n in enumerate(leaving):
        j = torch.arange(n, device=DEVICE) + packed[b]
        written[kv.table[b, j // PAGE % COLUMNS].long(), j % PAGE] = True
    before = stored(kv, layout)
    for (codes, scale), (want, want_scale), (old, old_scale) in zip(
        stored(found, layout), stored(expected, layout), before, strict=True
    ):
        equal = ((codes == want).all(-1) & (scale == want_scale)).transpose(1, 2)  # [N, P, h]
        kept = ((codes == old).all(-1) & (scale == old_scale)).transpose(1, 2)
        assert kept[1:][~written[1:]].all()
        rows, same = rows + equal[written].numel(), same + int(equal[written].sum())
    assert rows == sum(leaving) * 2 * kv.window_k.shape[1]
    assert same >= 0.98 * rows


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("name", CASES)
def test_a_token_that_leaves(name, scale_bits):
    """Codes, scales and window as the reference's; nothing else is written."""
    compare(CASES[name], (40,), (60,), 1, (1,), scale_bits=scale_bits)


@pytest.mark.parametrize("name", FRAMES)
def test_a_key_in_the_frame_of_its_segment(name):
    compare(CASES[name], (40,), (60,), 1, (1,), frame=FRAMES[name])


def test_several_sequences():
    """Of unequal lengths, padded on the left; one has nothing to pack, another several tokens."""
    compare((16, [(2, 3, 1)], torch.float32), (31, 70, 0), (47, 90, 3), 3, (2, 3, 0), start=(0, 1, 2))


@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", LARGE)
def test_sizes_of_models(name, batch):
    packed = tuple(30 + 7 * b for b in range(batch))
    compare(LARGE[name], packed, tuple(p + 20 for p in packed), 1, (1,) * batch)
