"""The C++ side of the decode benchmark: bf16 attention, the machine's read bandwidth and int8 peak, another source."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from headq_ao.evals.benchmarks.bench_timing import median_ms
from headq_ao.ops import cpu_build

SOURCE = Path(__file__).with_name("bench_kernels.cpp")
READ_BYTES = 512 * 2**20
STREAMS = (1, 2, 4, 8)
INT8_ROUNDS = 1_000_000
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("k", "v", "q", "out")),
        *((name, _I32) for name in ("heads", "group", "dim", "threads", "portable")),
        ("tokens", _I64),
        ("scale", ctypes.c_float),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: where there is no compiler.
    """
    lib = cpu_build.load(SOURCE)
    if lib is None:
        raise RuntimeError("the benchmark compiles its baselines: it needs a C++ compiler (set CXX)")
    lib.bench_read.restype, lib.bench_read.argtypes = ctypes.c_uint64, (_P, _I64, _I32, _I32)
    lib.bench_int8.restype, lib.bench_int8.argtypes = _I64, (_I64, _I32, _P)
    lib.bench_code_path.restype = ctypes.c_char_p
    lib.bench_bf16_decode.restype = None
    return lib


def code_path() -> str:
    """The instruction set that the bf16 kernel was compiled for."""
    path: bytes = library().bench_code_path()
    return path.decode()


def bf16_decode(q: Tensor, k: Tensor, v: Tensor, scaling: float, portable: bool = False) -> Tensor:
    """Attention of one token over bf16 tokens: each KV head is read once for all its query heads, fp32 sums.

    ``o = Σ_j softmax_j(scaling · q·k_j) v_j``, by ``torch.get_num_threads()`` threads over heads and token ranges that
    log-sum-exp joins.

    Args:
        q: ``[Hkv, G, D]`` fp32.
        k, v: ``[Hkv, T, D]`` bf16, contiguous; ``D`` a multiple of 16 up to 256, ``T`` at least 1.
        scaling: of the scores.
        portable: leave out the code that is written by hand for AVX-512-BF16.

    Returns:
        ``[Hkv, G, D]`` fp32.

    Raises:
        ValueError: when shapes, dtypes or layout do not fit.

    Example:
        >>> import torch
        >>> from headq_ao.evals.benchmarks.bench_kernels import bf16_decode
        >>> q, k, v = torch.randn(2, 3, 32), *torch.randn(2, 2, 7, 32).bfloat16()
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k.float(), v.float(), scale=0.25)
        >>> torch.testing.assert_close(bf16_decode(q, k, v, 0.25), exact, rtol=1e-3, atol=1e-3)
    """
    return bf16_call(q, k, v, scaling, portable)()


def bf16_call(q: Tensor, k: Tensor, v: Tensor, scaling: float, portable: bool = False) -> Callable[[], Tensor]:
    """:func:`bf16_decode` with its arguments checked and packed once: a call costs what the kernel does.

    It uses as many threads as torch does now, and writes into the same output each time.
    """
    heads, group, dim = q.shape
    if k.shape != (heads, k.shape[1], dim) or v.shape != k.shape or not k.shape[1] or dim % 16 or dim > 256:
        raise ValueError(f"q, k, v must be [Hkv, G, D], [Hkv, T, D] twice, got {[tuple(x.shape) for x in (q, k, v)]}")
    if q.dtype != torch.float32 or k.dtype != torch.bfloat16 or v.dtype != torch.bfloat16:
        raise ValueError(f"q must be float32, k and v bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError("k and v must be contiguous")
    q, out, function = q.contiguous(), torch.empty_like(q), library().bench_bf16_decode
    rows = (k, v, q, out)
    job = _Job(*(x.data_ptr() for x in rows), heads, group, dim, torch.get_num_threads(), portable, k.shape[1], scaling)
    address = ctypes.byref(job)

    def call() -> Tensor:
        function(address)
        return rows[-1]  # rows: kept as long as the call is

    return call


def reader(threads: int) -> Callable[[], int]:
    """A call that reads :data:`READ_BYTES` of memory by that many threads, in as many streams as are fastest here."""
    data = torch.ones(READ_BYTES // 4 + 16, dtype=torch.int32)  # written, so that its pages are there
    start, lib = -(-data.data_ptr() // 64) * 64, library()

    def call(streams: int) -> Callable[[], int]:
        return lambda: lib.bench_read(start, READ_BYTES // 64, streams, threads) + 0 * len(data)  # which keeps it

    calls = {streams: call(streams) for streams in STREAMS}
    times = {streams: median_ms([run], threads, repeats=3, budget=0.0) for streams, run in calls.items()}
    return calls[min(times, key=times.__getitem__)]


def int8_products(threads: int) -> int:
    """Multiply-adds of ``bench_int8(INT8_ROUNDS, threads, …)``."""
    sink = torch.tensor([1, 1, 0], dtype=torch.int32)
    return int(library().bench_int8(1, threads, sink.data_ptr())) * INT8_ROUNDS


def external(source: Path, dim: int, group: int) -> Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]] | None:
    """Somebody else's bf16 decode: ``dbf_{D}_{G}(k, v, q, out, heads, tokens, threads)`` with scores over √D.

    Args:
        source: C++ file.
        dim, group: head_dim and query heads per KV head.

    Returns:
        ``(q, k, v) → call`` as :func:`bf16_call`, or None where the file has no function for that shape.

    Raises:
        FileNotFoundError: when there is no such file.
        RuntimeError: when it cannot be compiled.
    """
    if not source.is_file():
        raise FileNotFoundError(f"no file {source.name!r} to take the external baseline from")
    lib = cpu_build.load(source.resolve())
    if lib is None:
        raise RuntimeError(f"{source.name} could not be compiled")
    function = getattr(lib, f"dbf_{dim}_{group}", None)
    if function is None:
        return None
    function.restype, function.argtypes = None, (_P, _P, _P, _P, _I32, _I32, _I32)

    def make(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        rows = (k, v, q, torch.empty_like(q))
        arguments = (*(x.data_ptr() for x in rows), k.shape[0], k.shape[1], torch.get_num_threads())

        def call() -> Tensor:
            function(*arguments)
            return rows[-1]

        return call

    return make
