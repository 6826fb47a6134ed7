"""How a chunk over packed tokens is cut; what its kernels compute is in ../paged_interpreted.py."""

import doctest

import pytest

pytest.importorskip("triton")
from headq_ao.ops.paged_attention import triton_prefill
from headq_ao.ops.paged_attention.triton_prefill import GRANULE, ROWS_BYTES, specialization, tiling


@pytest.mark.parametrize("length", [32, 128, 4096, 28672, 131072])
@pytest.mark.parametrize("token_bytes", [64, 4096, 16 * 4096, ROWS_BYTES])
def test_tiles_hold_all_tokens_within_bounds(length, token_bytes):
    """Whole granules, as few tiles as fit, all of about the same size."""
    tile, count = tiling(length, token_bytes)
    assert tile % GRANULE == 0 and tile * count >= length and (count == 1 or tile * (count - 1) < length)
    assert tile * token_bytes <= max(ROWS_BYTES, GRANULE * token_bytes)
    assert tile <= length + GRANULE


def test_examples():
    assert doctest.testmod(triton_prefill).failed == 0


@pytest.mark.parametrize("backend", ["cuda", "hip", "interpreter"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 128), (192, 128), (256, 256)])
def test_what_a_kernel_is_compiled_for(key_dim, value_dim, itemsize, backend):
    """Whole powers of two; on CUDA the operands of all stages fit the shared memory of an A100's processor."""
    constants, options, held = specialization(key_dim, value_dim, itemsize, 4096, backend)
    assert constants["KEY_PADDED"] >= key_dim and constants["D_PADDED"] >= value_dim
    powers = [constants[name] for name in ("KEY_PADDED", "D_PADDED", "ROWS", "TILE")]
    assert all(n & (n - 1) == 0 and n >= 16 for n in powers) and held == 1
    rows = constants["ROWS"] * constants["KEY_PADDED"]
    tile = constants["TILE"] * (constants["KEY_PADDED"] + constants["D_PADDED"])
    assert backend != "cuda" or (rows + tile * options["num_stages"]) * itemsize <= 163 << 10
    assert backend == "cuda" or options["num_stages"] == 1
    assert specialization(key_dim, value_dim, itemsize, 40, backend)[0]["ROWS"] <= 64
