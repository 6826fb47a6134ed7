"""What the compiled kernel reads, and what does not fit it."""

import pytest

from headq_ao.ops.cache_update import cpu_kernel
from headq_ao.ops.cache_update.op import plan_update
from tests.ops.cache_update.streams import MIXED, Stream, with_kernel

pytestmark = pytest.mark.skipif(cpu_kernel.library() is None, reason="no compiler")


def test_errors():
    s = Stream(MIXED)
    k, v = s.tokens(3, 0)
    for bad, message in (((k[:, :2], v), "k must"), ((k, v[..., :16]), "v must"), ((k, v[:, :, :2]), "v must")):
        with pytest.raises(ValueError, match=message):
            with_kernel(s, *bad, 0)
    with pytest.raises(ValueError, match="needs an encoder, got None"):
        plan_update(s.kv, s.packed, [None, None], s.encoders[1])
    with pytest.raises(ValueError, match=r"an encoder of \(3,\) does not fit pages of 1\*32"):
        plan_update(s.kv, s.packed, s.encoders[0][:1] * 2, s.encoders[1])
    with pytest.raises(ValueError, match=r"tensors must be \[2 or 1, 1 or 1, ..\], got \(1, 2, 32, 32\)"):
        plan_update(s.kv, s.packed, s.encoders[0][1:] * 2, s.encoders[1])
