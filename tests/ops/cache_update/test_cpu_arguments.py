"""What the compiled kernel reads, and what does not fit it."""

import dataclasses

import pytest
import torch

from headq_ao.ops.cache_update import cpu_kernel
from headq_ao.ops.cache_update.cpu_arguments import arguments, supported
from headq_ao.ops.cache_update.op import plan_update
from tests.ops.cache_update.streams import MIXED, RING, Stream, with_kernel
from tests.ops.frames import some_frame

pytestmark = pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")


def test_errors():
    s = Stream(MIXED)
    k, v = s.tokens(3, 0)
    for bad, message in (((k[:, :2], v), "k must"), ((k, v[..., :16]), "v must"), ((k, v[:, :, :2]), "v must")):
        with pytest.raises(ValueError, match=message):
            with_kernel(s, *bad, 0)
    with pytest.raises(ValueError, match="needs an encoder, got None"):
        plan_update(s.kv, s.packed, [None, None], s.encoders[1])
    with pytest.raises(
        ValueError, match=r"an encoder of \(3,\) and scales of 8 bits does not fit pages of 1\*32,0,1,8"
    ):
        plan_update(s.kv, s.packed, s.encoders[0][:1] * 2, s.encoders[1])
    with pytest.raises(ValueError, match=r"tensors must be \[2 or 1, 1 or 1, ..\], got \(1, 2, 32, 32\)"):
        plan_update(s.kv, s.packed, s.encoders[0][1:] * 2, s.encoders[1])


def test_what_the_kernel_reads_and_writes_where_it_lies():
    """Strides and dtypes of its kind; one thing of another kind, and it does not serve."""
    s = Stream(MIXED)
    encoders = [e for side in s.encoders for e in side]
    assert supported(s.kv, s.packed, *encoders)
    kv, wide = s.kv, s.kv.window_k.transpose(2, 3).contiguous().transpose(2, 3)
    changes = {
        "another dtype of values": {"window_v": kv.window_v.half()},
        "fp64": {"window_k": kv.window_k.double(), "window_v": kv.window_v.double()},
        "coordinates apart": {"window_k": wide},
        "columns apart": {"table": kv.table.T.contiguous().T},
        "lengths apart": {"held": torch.zeros(2, 2, dtype=torch.int64)[:, 0]},
        "int32 lengths": {"total": kv.total.int()},
        "sinks of another dtype": {"sink_k": kv.window_k.half()},
    }
    for name, change in changes.items():
        assert not supported(dataclasses.replace(kv, **change), s.packed, *encoders), name
    pages = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in kv.pages]
    assert not supported(dataclasses.replace(kv, pages=pages), s.packed, *encoders)
    assert not supported(kv, s.packed, dataclasses.replace(encoders[0], encode=encoders[0].encode.double()))


def test_arguments_point_to_the_tensors_of_the_cache():
    s = Stream(MIXED, frame=some_frame(32, 64, 2))
    args, groups, kept = arguments(s.kv, s.packed, 3, *s.encoders, False)
    kv = s.kv
    assert (args.batch, args.kv_heads, args.page_tokens, args.columns) == (2, 3, 32, kv.table.shape[1])
    assert (args.n_sink, args.body, args.ring, args.most, args.frame_tokens, args.frames) == (4, 4, RING, 3, 64, 2)
    assert args.table == kv.table.data_ptr() and args.after == s.packed.data_ptr() and args.total == kv.total.data_ptr()
    for group, held in zip(groups, s.layout.split(kv.pages), strict=True):
        assert (group.first, group.heads) == (held.layout.first, held.layout.heads)
        for side, of in zip(group.side, (held.keys, held.values), strict=True):
            planes = [side.plane[i].data for i in range(side.planes)]
            assert planes == [x.data_ptr() for x in of.planes] and side.scale.data == of.scale.data_ptr()
            assert [(side.plane[i].page, side.plane[i].head) for i in range(side.planes)] == [
                x.stride()[:2] for x in of.planes
            ]
    assert kept[0] == (list(kv.pages), kv.table)
