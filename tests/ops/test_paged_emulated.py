"""The portable path of the CPU kernels built for aarch64, run by an emulator against the reference."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from headq_ao.ops.paged_attention import cpu_kernel
from tests.ops.paged_cases import make
from tests.ops.test_paged_attention import CASES, close, expected_of, queries

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = ("-O3", "-fopenmp", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-static", "-Wall", "-Werror")
pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}"),
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-aarch64"),
]
NAMES = [
    "plain", "shuffled", "batch", "page 16", "1 bit", "3 bits", "4 bits", "5 bits", "6 bits", "8 bits", "side code",
    "bits of coordinates", "head groups", "dim 80", "few tokens", "sliding", "segments, odd pages", "bf16", "fp16",
]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The kernel and what feeds it."""
    built = tmp_path_factory.mktemp("aarch64") / "paged"
    source = Path(cpu_kernel.__file__).with_name("cpu_kernel.cpp")
    driver = Path(__file__).with_name("paged_emulated.cpp")
    subprocess.run([COMPILER, *FLAGS, f'-DKERNEL="{source}"', str(driver), "-o", str(built)], check=True)
    return built


class Emulated:
    """In place of the library: its function, run elsewhere. ``tensors``: all that arguments may point to."""

    def __init__(self, program, folder, tensors):
        self.program, self.folder, self.tensors, self.ran = program, folder, tensors, 0

    def headq_paged_attention(self, reference):
        fields = reference._obj
        groups = (cpu_kernel._Group * fields.n_groups).from_address(fields.groups)
        regions = [(ctypes.addressof(x), ctypes.sizeof(x)) for x in (fields, groups)]
        for group in groups:
            for plane, column, factor in zip(group.k, group.q_column, group.q_factor, strict=True):
                regions += [(at, plane.columns * 4) for at in (column, factor) if at]
        regions += [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in self.tensors]
        rows = fields.batch * fields.kv_heads * fields.queries
        written = [(fields.out.data, rows * fields.value_dim * 4), (fields.lse, rows * 4)]
        given, taken = self.folder / "in", self.folder / "out"
        given.write_bytes(b"".join(struct.pack("qq", *r) + ctypes.string_at(*r) for r in regions + written))
        code = subprocess.run([EMULATOR, str(self.program), str(given), str(taken)], check=False).returncode
        result = taken.read_bytes()
        for at, size in written:
            ctypes.memmove(at, result[:size], size)
            result = result[size:]
        self.ran += 1
        return code


@pytest.mark.parametrize("name", NAMES)
def test_kernel_on_aarch64(name, program, tmp_path, monkeypatch):
    monkeypatch.delenv("HEADQ_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu_kernel, "MAPPED_QUERIES", 1000)  # by the kernel
    case, group, tokens, sliding = CASES[name]
    kv, readers = make(case)
    q = queries(kv, group, tokens)
    of_both = [*vars(kv).values(), *vars(readers).values(), q]
    tensors = [*kv.pages, *(x for x in of_both if torch.is_tensor(x))]
    library = Emulated(program, tmp_path, tensors)
    monkeypatch.setattr(cpu_kernel, "library", lambda: library)
    close(cpu_kernel.launch(q, 0.125, kv, readers, None, sliding, None), expected_of(q, kv, readers, None, sliding))
    assert library.ran == 1
