"""What the Triton kernels compile to for GPUs that are not here.

``python -m headq_ao.evals.benchmarks.triton_table --help``.

The launchers run on CPU tensors with a driver that compiles and does not launch, so the binaries are those that a
device would get. Registers, spills and shared memory are read from them, the instructions of the loop over cached
tokens are counted, and a roofline follows. Nothing here was timed.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from headq_ao.evals.harness.environment import environment, write_json
from headq_ao.ops.layout import (
    PIECES,
    key_bytes_per_token,
    plane_columns,
    plane_pieces,
    value_bytes_per_token,
)
from headq_ao.ops.page_layout import KNOWN_FORMS, PageLayout

RESULT = Path(__file__).resolve().parents[2] / "recipes" / "results" / "triton" / "aot.json"
COLUMNS, WINDOW, SINKS = 128, 100, 4  # a cache that is compiled for; the binary does not depend on them
QUERY_BLOCK = 256  # queries of a chunk that is compiled for
PAGE = 32  # tokens, as caches have them by default; it does depend on that


@dataclass(frozen=True)
class Chip:
    """A target and the vendor's numbers: bytes/s of memory, processors (SM or CU), clock in Hz, dense fp16 FLOP/s.

    ``issue`` is instructions of one warp or wave that a processor starts per clock; ``registers`` and ``shared`` are a
    processor's, in 4-byte registers and bytes, ``waves`` the most warps that it holds.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    bandwidth: float
    processors: int
    clock: float
    flops: float
    issue: int
    registers: int
    shared: int
    waves: int


CHIPS = {
    "sm_80": Chip("A100 SXM 80 GB", "cuda", 80, 32, 2.039e12, 108, 1.41e9, 312e12, 4, 65536, 164 << 10, 64),
    "sm_90": Chip("H100 SXM", "cuda", 90, 32, 3.35e12, 132, 1.83e9, 989e12, 4, 65536, 228 << 10, 64),
    "sm_100": Chip("B200", "cuda", 100, 32, 8.0e12, 148, 1.85e9, 2250e12, 4, 65536, 228 << 10, 64),
    "gfx942": Chip("MI300X", "hip", "gfx942", 64, 5.3e12, 304, 2.1e9, 1307e12, 1, 131072, 64 << 10, 32),
}


@dataclass(frozen=True)
class Case:
    """Decode attention of one token: query heads, KV heads, head size, bits of keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    k_bits: int
    v_bits: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one cached token of one KV head takes, its two scales included.

        Example:
            >>> Case(32, 8, 128, 2, 2).bytes_per_token
            66
        """
        codes = key_bytes_per_token([self.k_bits] * self.head_dim) + value_bytes_per_token(self.v_bits, self.head_dim)
        return codes + 2 * SCALE // 8


CASES = (
    Case(32, 8, 128, 2, 2),
    Case(9, 3, 64, 2, 2),
    Case(8, 1, 256, 2, 2),
    Case(32, 8, 128, 3, 3),
    Case(32, 8, 128, 4, 4),
)
PREFILLED = CASES[:3]  # one of each head size: what is unpacked does not depend on bits
SCALE = 8  # bits of a scale
# in a disassembled kernel: an instruction of CUDA, matrix instructions of CUDA and of AMD
INSTRUCTION, PRODUCT, MFMA = r"\s*/\*[0-9a-f]+\*/", r"\b(?:H\w*|UTC\w*)MMA\b", r"v_mfma"
WIDTHS = (64, 128, 256)  # of the rows that feedback_codes is compiled for


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Kernels launched inside are compiled for ``target`` and not run; the list receives them."""
    import triton
    from triton.backends.compiler import GPUTarget

    chip, kernels = CHIPS[target], []
    gpu, driver, jit = GPUTarget(chip.backend, chip.arch, chip.warp), triton.runtime.driver, triton.runtime.jit
    before, run = driver._active, jit.JITFunction.run
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: target, get_current_stream=lambda _: 0, get_current_target=lambda: gpu
        )
    )
    jit.JITFunction.run = lambda self, *args, **kwargs: kernels.append(run(self, *args, **kwargs | {"warmup": True}))
    try:
        yield kernels
    finally:
        jit.JITFunction.run = run
        driver._active = before


def paged_cache(case: Case, page_tokens: int) -> Any:
    """An empty cache of one sequence in bf16 whose binaries are those of any length."""
    from headq_ao.ops.page_layout import GroupLayout, Side
    from headq_ao.ops.types import PagedKV

    keys, values = Side((case.k_bits,) * case.head_dim, scale_bits=SCALE), Side((case.v_bits,), scale_bits=SCALE)
    layout = PageLayout(page_tokens, case.head_dim, case.head_dim, (GroupLayout(0, case.kv_heads, keys, values),))
    pages = layout.allocate(2, torch.bfloat16, torch.device("cpu"))
    table, length = torch.zeros(1, COLUMNS, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    window = torch.zeros(1, case.kv_heads, WINDOW, case.head_dim, dtype=torch.bfloat16)
    return PagedKV(pages, layout.spec, table, None, length, length, length, window, window, SINKS)


def decode_kernels(
    case: Case, target: str, page_tokens: int = PAGE, softcap: float | None = None
) -> tuple[Any, Any, Any]:
    """The compiled kernels of ``paged_attention``: the query mapped, the splits read, and all joined."""
    from headq_ao.ops.paged_attention import triton_kernel
    from headq_ao.ops.types import Readers

    d, hkv = case.head_dim, case.kv_heads
    readers = Readers(torch.zeros(1, 1, hkv, d, d + 3), torch.zeros(1, hkv, d, d), torch.zeros(1, hkv, d))
    q = torch.zeros(1, case.heads, 1, d, dtype=torch.bfloat16)
    KNOWN_FORMS.clear()  # what this case needs alone
    with compiling(target) as kernels:
        triton_kernel.launch(q, 1.0, replace(paged_cache(case, page_tokens), softcap=softcap), readers, splits=8)
    return kernels[0], kernels[1], kernels[2]


def prefill_kernels(
    case: Case, target: str, page_tokens: int = PAGE, softcap: float | None = None, framed: bool = False,
    dtype: torch.dtype = torch.bfloat16, new: int = QUERY_BLOCK,
) -> list[Any]:  # fmt: skip
    """The compiled kernels of ``paged_attention`` of ``new`` queries over packed tokens, the window and their own
    tokens: tokens unpacked, all read, splits joined."""
    from headq_ao.ops.paged_attention import triton_kernel
    from headq_ao.ops.types import Readers, SegmentFrame

    d, hkv = case.head_dim, case.kv_heads
    frame = SegmentFrame(torch.zeros(8, 2, d), torch.zeros(d, dtype=torch.int32), 512) if framed else None
    readers = Readers(torch.zeros(1, 1, hkv, d, d + 3), torch.zeros(1, hkv, d, d), torch.zeros(1, hkv, d), frame)
    q, k = (torch.zeros(1, heads, new, d, dtype=dtype) for heads in (case.heads, hkv))
    KNOWN_FORMS.clear()
    kv = paged_cache(case, page_tokens)
    kv = replace(kv, softcap=softcap, new_k=k, new_v=k, window_k=kv.window_k.to(dtype), window_v=kv.window_v.to(dtype))
    with compiling(target) as kernels:
        triton_kernel.launch(q, 1.0, kv, readers, splits=1)
    return kernels


def prefill_row(case: Case, target: str) -> dict[str, Any]:
    """What the kernels of a chunk in bf16 need; of the loop over whole tiles, warp instructions and what starting them
    takes of the time of the tile's products."""
    from headq_ao.ops.paged_attention.triton_prefill import specialization

    chip, of_group = CHIPS[target], case.heads // case.kv_heads
    unpacking, reading, closing = prefill_kernels(case, target, framed=True)
    constants, _, _ = specialization(case.head_dim, case.head_dim, 2, of_group * QUERY_BLOCK, chip.backend)
    rows, tokens = constants["ROWS"], constants["TILE"]
    instructions = loop_instructions(reading, chip) * reading.metadata.num_warps
    products = 4 * rows * tokens * case.head_dim / (chip.flops / chip.processors / chip.clock)  # clocks
    return {
        "target": target, "head_dim": case.head_dim, "bits": case.k_bits, "rows": rows, "tokens": tokens,
        **resources(reading, chip), "instructions": instructions,
        "issue_over_products": instructions / chip.issue / products,
        "unpack": resources(unpacking, chip), "closing": resources(closing, chip),
    }  # fmt: skip


def update_kernels(case: Case, target: str, page_tokens: int = PAGE) -> list[Any]:
    """The compiled kernels of ``cache_update``: leaving tokens, keys and values into pages, the window."""
    from headq_ao.ops.cache_update import triton_kernel

    k = torch.zeros(1, case.kv_heads, 1, case.head_dim, dtype=torch.bfloat16)
    codes, scale = torch.zeros(k.shape, dtype=torch.uint8), torch.zeros(k.shape[:3], dtype=torch.float16)
    kv = paged_cache(case, page_tokens)
    with compiling(target) as kernels:
        triton_kernel.update(
            kv, k, k, kv.packed, 1, lambda *_: (codes, scale, None), lambda *_: (codes, scale[..., None], None)
        )
    return kernels


def encoder(eye: torch.Tensor, bits: int, frame: Any = None) -> Any:
    """Of one side under a calibration."""
    from headq_ao.ops import Encoder

    step = torch.ones(1, 1, eye.shape[-1])
    return Encoder(eye, (bits,), step, hessian=eye, scale_bits=SCALE, frame=frame)


def step_kernels(case: Case, target: str, page_tokens: int = PAGE) -> list[Any]:
    """The compiled kernels of a decoding step's ``cache_update`` under a calibration: coding, and what puts codes and
    tokens where they belong."""
    from headq_ao.ops.cache_update import triton_kernel, triton_step

    d = case.head_dim
    eye = torch.eye(d).expand(1, case.kv_heads, d, d)
    keys, values = (encoder(eye, bits) for bits in (case.k_bits, case.v_bits))
    KNOWN_FORMS.clear()
    kv = paged_cache(case, page_tokens)
    k = torch.zeros(1, case.kv_heads, 1, d, dtype=torch.bfloat16)
    with compiling(target) as kernels:
        step = triton_kernel.plan(kv, kv.packed, [keys], [values], False)
        assert isinstance(step, triton_step.Step)
        step(k, k)
    return kernels


def engine_kernels(
    case: Case, target: str, page_tokens: int = 256, window_tokens: int = 32, few: int = 1, framed: bool = False
) -> list[Any]:
    """The compiled kernels of a step over an engine's pages of which each request has at most ``few`` tokens: coding,
    codes and tokens where they belong, the query mapped, the splits read, and all joined; ``framed``: with keys in the
    frame of their segment."""
    from headq_ao.ops.cache_update import triton_kernel as update
    from headq_ao.ops.paged_attention import triton_kernel as attention
    from headq_ao.ops.requests import Requests
    from headq_ao.ops.types import PagedKV, Readers, SegmentFrame

    d, hkv, cpu = case.head_dim, case.kv_heads, torch.device("cpu")
    KNOWN_FORMS.clear()
    kv, eye = paged_cache(case, page_tokens), torch.eye(d).expand(1, hkv, d, d)
    layout = PageLayout.parse(kv.layout)
    size = -(-layout.bytes_of_page(SINKS, torch.bfloat16) // page_tokens) * page_tokens
    pages, *sinks = layout.views(torch.zeros(2, size, dtype=torch.uint8, device=cpu), SINKS, torch.bfloat16)
    window = torch.zeros(2, hkv, window_tokens, 2 * d, dtype=torch.bfloat16, device=cpu)
    kv = PagedKV(
        pages, kv.layout, kv.table, None, kv.packed, kv.held, kv.total, window[..., :d], window[..., d:], SINKS,
        window_table=kv.table, sink_k=sinks[0], sink_v=sinks[1],
    )  # fmt: skip
    frame = SegmentFrame(torch.zeros(8, 2, d), torch.zeros(d, dtype=torch.int32), 512) if framed else None
    keys, values = encoder(eye, case.k_bits, frame), encoder(eye, case.v_bits)
    readers = Readers(torch.zeros(1, 1, hkv, d, d + 3), torch.zeros(1, hkv, d, d), torch.zeros(1, hkv, d), frame)
    start = torch.zeros(2, dtype=torch.int64, device=cpu)
    of = Requests(start, kv.held, kv.packed, kv.total, kv.table, kv.table, few, few, recent=63)
    q, k = (torch.zeros(few, heads, d, dtype=torch.bfloat16, device=cpu) for heads in (case.heads, hkv))
    with compiling(target) as kernels:
        coding = update.plan(kv, kv.packed, [keys], [values], False)
        reading = attention.plan(kv, readers, case.heads, 0, None)
        assert isinstance(coding, update.OwnedPlan) and isinstance(reading, attention.OwnedPlan)
        coding.requests(k, k, of)
        reading.requests(q, 1.0, q, of)
    return kernels


def feedback_kernel(width: int, target: str) -> Any:
    """The compiled kernel of ``feedback_codes`` for rows of ``width`` at 2 bits."""
    from headq_ao.ops.error_feedback import triton_kernel

    metric = torch.eye(width).expand(1, 2, width, width)
    with compiling(target) as kernels:
        triton_kernel.launch(torch.ones(1, 2, 64, width), metric, metric, torch.ones(1, 2, width), 2, True, SCALE)
    return kernels[0]


def resources(kernel: Any, chip: Chip) -> dict[str, int]:
    """Registers per thread, spilled registers or spill instructions, shared and binary bytes, warps on a processor."""
    if chip.backend == "hip":
        code = kernel.asm["amdgcn"]
        counts = {name: int(n) for name, n in re.findall(r"\.((?:vgpr|sgpr)\w*count):\s+(\d+)", code)}
        registers, spills, binary = counts["vgpr_count"], counts["vgpr_spill_count"], kernel.asm["hsaco"]
    else:
        binary = kernel.asm["cubin"]
        usage = disassembled(binary, "cuobjdump", "--dump-resource-usage")
        found = re.search(r"REG:(\d+)", usage)
        assert found is not None, usage
        registers, spills = int(found[1]), len(re.findall(r"\b(?:LDL|STL)\b", disassembled(binary, "nvdisasm", "-c")))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    block = -(-registers // 8) * 8 * chip.warp * warps
    kept = 1024 if chip.backend == "cuda" else 0  # of shared memory by the system, for each program
    most = min(chip.registers // block, chip.shared // max(shared + kept, 1), chip.waves // warps)
    return {
        "registers": registers,
        "spills": spills,
        "shared_bytes": shared,
        "binary_bytes": len(binary),
        "warps_per_processor": most * warps,
    }


def disassembled(binary: bytes, tool: str, option: str) -> str:
    """What one of the tools in Triton's package says about a cubin."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        command = [getattr(triton.knobs.nvidia, tool).path, option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop_instructions(kernel: Any, chip: Chip) -> int:
    """Instructions of the loop over whole tiles: the shortest backward branch's span that has matrix products. The
    other, over the tiles at the ends, has masks besides.

    On AMD vector and matrix instructions count; scalar and memory ones are issued beside them.
    """
    counted = r"\s+v_" if chip.backend == "hip" else INSTRUCTION
    return min((sum(bool(re.match(counted, x)) for x in body) for body in product_loops(kernel, chip)), default=0)


def loop_spills(kernel: Any, chip: Chip) -> tuple[int, int]:
    """Of the same loop: instructions that spill or read back what was spilled, and matrix instructions."""
    hip = chip.backend == "hip"
    counted, spill = (r"\s+v_", r"\bscratch_") if hip else (INSTRUCTION, r"\b(?:LDL|STL)\b")
    bodies = product_loops(kernel, chip)
    if not bodies:
        return 0, 0
    body = min(bodies, key=lambda lines: sum(bool(re.match(counted, x)) for x in lines))
    product = MFMA if hip else PRODUCT
    return sum(bool(re.search(spill, x)) for x in body), sum(bool(re.search(product, x)) for x in body)


def product_loops(kernel: Any, chip: Chip) -> list[list[str]]:
    """The lines of each loop that has matrix products."""
    if chip.backend == "hip":
        lines = kernel.asm["amdgcn"].splitlines()
        label, jump, product = r"(\.LBB\w+):", r"\s*s_c?branch\w*\s+(\.LBB\w+)", MFMA
    else:
        lines = disassembled(kernel.asm["cubin"], "nvdisasm", "-c").splitlines()
        label, jump, product = r"\s*(\.L\w+):", r".*\bBRA\b.*?(\.L\w+)", PRODUCT
    labels: dict[str, int] = {}
    found = []
    for i, line in enumerate(lines):
        if at := re.match(label, line):
            labels[at[1]] = i
        elif (to := re.match(jump, line)) and to[1] in labels:
            body = lines[labels[to[1]] : i + 1]
            if any(re.search(product, x) for x in body):
                found.append(body)
    return found


def roofline(case: Case, instructions: float, chip: Chip) -> dict[str, Any]:
    """Cached tokens of one KV head per second that each limit allows, the lowest of them, and bf16's at full bandwidth.

    ``memory``: bytes of packed tokens; ``issue``: warp instructions of the loop; ``matrix``: multiply-adds of the
    products, for the 8 query rows (16 on AMD) that they are padded to.
    """
    rows = 16 if chip.backend == "hip" else 8
    columns = sum(plane_columns(w, len(p)) for w, p in plane_pieces((case.k_bits,) * case.head_dim).items())
    columns += case.head_dim * len(PIECES[case.v_bits])
    limits = {
        "memory": chip.bandwidth / case.bytes_per_token,
        "issue": chip.processors * chip.issue * chip.clock / instructions,
        "matrix": chip.flops / (2 * rows * columns),
    }
    bound = min(limits, key=lambda name: limits[name])
    dense = chip.bandwidth / (4 * case.head_dim)
    return {**limits, "bound": bound, "over_bf16": limits[bound] / dense, "byte_ratio": limits["memory"] / dense}


def measure(targets: Sequence[str] = tuple(CHIPS)) -> dict[str, Any]:
    """Compile all cases for the targets: what becomes the result file, without the environment."""
    decode, prefill, feedback = [], [], []
    for target in targets:
        chip = CHIPS[target]
        for case in CASES:
            mapping, kernel, join = decode_kernels(case, target)
            parts = 8 // min(PIECES[case.v_bits])
            instructions = loop_instructions(kernel, chip) * kernel.metadata.num_warps / (16 * parts)
            row = {"target": target, **vars(case), **resources(kernel, chip)}
            row |= {"bytes_per_token": case.bytes_per_token, "instructions_per_token": instructions}
            decode.append(
                row
                | {"roofline": roofline(case, instructions, chip), "map": resources(mapping, chip)}
                | {"join": resources(join, chip)}
            )
        prefill += [prefill_row(case, target) for case in PREFILLED]
        feedback += [{"target": target, "width": w, **resources(feedback_kernel(w, target), chip)} for w in WIDTHS]
    chips = {t: vars(CHIPS[t]) for t in targets}
    return {
        "chips": chips, "page_tokens": PAGE, "decode_attention": decode, "prefill_attention": prefill,
        "feedback_codes": feedback,
    }  # fmt: skip


def result_table(result: dict[str, Any]) -> str:
    """The table of a result."""
    lines = [
        "| kernel | target | registers | spills | shared | warps per processor | bytes / token | "
        "instructions / token | bound by | roofline over bf16 | byte ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in result["decode_attention"]:
        name = f"{row['heads']}/{row['kv_heads']}/{row['head_dim']}, {row['k_bits']}/{row['v_bits']} bits"
        roof = row["roofline"]
        lines.append(
            f"| decode {name} {_resources(row)} | {row['bytes_per_token']} | {row['instructions_per_token']:.1f} | "
            f"{roof['bound']} | {roof['over_bf16']:.1f} | {roof['byte_ratio']:.1f} |"
        )
    for row in result["prefill_attention"]:
        name = f"heads of {row['head_dim']}, {row['rows']} rows × {row['tokens']} tokens"
        each = row["instructions"] / row["tokens"]
        lines.append(f"| prefill {name} {_resources(row)} | | {each:.0f} | {bound_of(row)} | | |")
        lines.append(f"| unpack {row['bits']} bits, heads of {row['head_dim']} {_resources(row, 'unpack')} | | | | | |")
    lines += [f"| encode, rows of {row['width']} {_resources(row)} | | | | | |" for row in result["feedback_codes"]]
    chips = "; ".join(
        f"{t} {c['name']} {c['bandwidth'] / 1e12:.2f} TB/s, {c['processors']} × {c['issue']} instructions × "
        f"{c['clock'] / 1e9:.2f} GHz"
        for t, c in result["chips"].items()
    )
    versions = result["environment"]["versions"]
    return "\n".join(lines) + (
        f"\n\nCompiled ahead of time with Triton {versions['triton']} for pages of {result['page_tokens']} tokens; "
        "nothing was timed. Registers are a thread's, shared memory is in bytes. Bytes and instructions (of a warp; on "
        "AMD vector instructions of a wave of 64) are "
        "those of one cached token of one KV head, in a chunk for a block of query rows; what unpacks has keys in the "
        "frame of their segment. Roofline over bf16: the lowest of memory, issue and matrix limits "
        "over bf16 keys and values read at full bandwidth, an upper bound. Peak numbers of the vendors: "
        f"{chips}; B200's clock is inferred from its dense rate. "
        "`python -m headq_ao.evals.benchmarks.triton_table`."
    )


def bound_of(row: dict[str, Any]) -> str:
    """What limits a chunk's loop: its products, or starting its instructions, and by how much."""
    ratio = row["issue_over_products"]
    return "matrix" if ratio <= 1 else f"issue, {ratio:.1f} × matrix"


def _resources(row: dict[str, Any], part: str | None = None) -> str:
    names = ("registers", "spills", "shared_bytes", "warps_per_processor")
    of = row if part is None else row[part]
    return "".join(f"| {x} " for x in (row["target"], *(of[name] for name in names))).rstrip()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description="Compile the Triton kernels for GPUs that are not here and report what the binaries need.",
    )
    p.add_argument("--json", type=Path, default=RESULT, help="the result (default: %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    args = parser().parse_args(argv)
    try:
        import triton
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure() | {"environment": environment()}
    result["environment"]["versions"]["triton"] = triton.__version__
    write_json(args.json, result)
    print(result_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
