"""The Triton kernels compiled for GPUs that are not here: no spills, and room for enough warps."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headq_ao.evals.benchmarks import triton_table as table
from headq_ao.ops.layout import PIECES

pytest.importorskip("triton")
from headq_ao.ops.cache_update import triton_kernel as update
from headq_ao.ops.paged_attention import triton_kernel as attention

spec = importlib.util.spec_from_file_location("paged_interpreted", Path(__file__).with_name("paged_interpreted.py"))
interpreted = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = interpreted
spec.loader.exec_module(interpreted)
pytestmark = pytest.mark.slow
SOFTCAPPED = [table.Case(8, 4, 256, 2, 2), table.Case(32, 16, 128, 4, 4)]  # Gemma 2: 2B, 27B
LEAST_WARPS = 8  # on a processor: two for each of its schedulers


def budget(found):
    assert found["spills"] == 0
    assert found["shared_bytes"] <= 32 << 10
    assert found["warps_per_processor"] >= LEAST_WARPS
    assert found["binary_bytes"] > 1000


@pytest.mark.parametrize(("case", "page"), [(case, 32) for case in table.CASES] + [(table.CASES[0], 64)], ids=str)
@pytest.mark.parametrize("target", table.CHIPS)
def test_paged_attention(target, case, page):
    """The loop's instructions per token stay near what the result file reports (measured 9 to 39)."""
    chip = table.CHIPS[target]
    mapping, kernel, join = table.decode_kernels(case, target, page)
    for each in (mapping, kernel, join):
        budget(table.resources(each, chip))
    parts = 8 // min(PIECES[case.v_bits])
    per_token = table.loop_instructions(kernel, chip) * kernel.metadata.num_warps / (16 * parts)
    assert 6 < per_token < 6 + 0.06 * case.head_dim * (case.k_bits + case.v_bits)
    roof = table.roofline(case, per_token, chip)
    assert 1.49 < roof["over_bf16"] <= roof["byte_ratio"]


@pytest.mark.parametrize("case", table.PREFILLED, ids=str)
@pytest.mark.parametrize("target", table.CHIPS)
def test_a_chunk(target, case):
    """Products of operands in half precision alone; nothing is spilled where it is read again and again, and of heads
    of up to 128 next to nothing at all; a processor holds eight warps, two for each of its schedulers."""
    chip = table.CHIPS[target]
    for framed in (False, True):
        unpacking, reading, closing = table.prefill_kernels(case, target, framed=framed)
        names = [kernel.name for kernel in (unpacking, reading, closing)]
        assert names == ["unpack_kernel", "flash_kernel", "flash_kernel"]
        of_unpacking = table.resources(unpacking, chip)
        assert of_unpacking["spills"] == 0 and of_unpacking["shared_bytes"] <= 48 << 10
        assert of_unpacking["warps_per_processor"] >= LEAST_WARPS
    for kernel in (reading, closing):
        found = table.resources(kernel, chip)
        assert found["warps_per_processor"] >= LEAST_WARPS and found["shared_bytes"] <= chip.shared
        assert found["spills"] <= (20 if case.head_dim <= 128 else 128)
        spilled, products = table.loop_spills(kernel, chip)
        assert spilled == 0 and products > 0
        code = (
            kernel.asm["amdgcn"] if chip.backend == "hip" else table.disassembled(kernel.asm["cubin"], "nvdisasm", "-c")
        )
        assert "TF32" not in code and not re.search(r"v_mfma_f32_\w+_f32", code)
    row = table.prefill_row(case, target)
    assert 0 < row["issue_over_products"] < (2 if case.head_dim >= 128 else 4)


@pytest.mark.parametrize("options", [{"dtype": torch.float16, "softcap": 30.0}, {"dtype": torch.float32}, {"new": 34}])
@pytest.mark.parametrize("target", table.CHIPS)
def test_other_chunks(target, options):
    """A softcap, fp32 models and few queries of small heads spill nothing where it counts."""
    chip = table.CHIPS[target]
    for kernel in table.prefill_kernels(table.CASES[1], target, **options):
        found = table.resources(kernel, chip)
        assert found["spills"] <= 40 and found["warps_per_processor"] >= LEAST_WARPS
        assert kernel.name == "unpack_kernel" or table.loop_spills(kernel, chip)[0] == 0


@pytest.mark.parametrize("case", SOFTCAPPED, ids=str)
@pytest.mark.parametrize("target", table.CHIPS)
def test_a_softcap_spills_nothing(target, case):
    """Its hyperbolic tangent is a dozen instructions a score."""
    chip = table.CHIPS[target]
    plain, kernel = (table.decode_kernels(case, target, 32, cap)[1] for cap in (None, 50.0))
    budget(table.resources(kernel, chip))
    assert 1 < table.loop_instructions(kernel, chip) / table.loop_instructions(plain, chip) < 2


@pytest.mark.parametrize("case", [table.CASES[0], table.CASES[3]], ids=str)
@pytest.mark.parametrize("target", table.CHIPS)
def test_cache_update(target, case):
    kernels = table.update_kernels(case, target)
    assert len(kernels) == 4
    for kernel in kernels:
        budget(table.resources(kernel, table.CHIPS[target]))


@pytest.mark.parametrize("target", table.CHIPS)
def test_a_step_of_cache_update(target):
    """Two launches; the recursion's sums and the next block's matrices stay in registers. How many programs a processor
    holds does not count: there is about one for each."""
    kernels = table.step_kernels(table.CASES[0], target)
    assert [kernel.name for kernel in kernels] == ["code_kernel", "finish_kernel"]
    for kernel in kernels:
        found = table.resources(kernel, table.CHIPS[target])
        assert found["spills"] == 0 and found["shared_bytes"] <= 1 << 10


@pytest.mark.parametrize(("case", "few"), [(table.CASES[0], 1), (table.CASES[1], 5), (table.CASES[4], 1)], ids=str)
@pytest.mark.parametrize("target", table.CHIPS)
def test_a_step_over_an_engines_pages(target, case, few):
    """The loop over tiles as over a cache of its own, up to scheduling, as many warps on a processor, and no spills."""
    kernels, chip = table.engine_kernels(case, target, few=few), table.CHIPS[target]
    names = ["code_kernel", "finish_kernel", "map_kernel", "split_kernel", "join_kernel"]
    assert [kernel.name for kernel in kernels] == names
    found = {kernel.name: table.resources(kernel, chip) for kernel in kernels}
    several = few > 1  # with 16 rows the splits spill, as they do over a cache of its own
    assert all(each["spills"] == 0 for name, each in found.items() if not (several and name == "split_kernel"))
    if not several:
        for each in kernels[2:]:
            budget(found[each.name])
        own = table.decode_kernels(case, target, 256)[1]
        assert table.loop_instructions(kernels[3], chip) <= 1.02 * table.loop_instructions(own, chip)
        assert found["split_kernel"]["warps_per_processor"] >= table.resources(own, chip)["warps_per_processor"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_keys_in_the_frame_of_their_segment_in_an_engines_pages(target):
    """The same kernels compile, and none but the one with a loop over segments spills."""
    kernels, chip = table.engine_kernels(table.CASES[0], target, framed=True), table.CHIPS[target]
    found = {kernel.name: table.resources(kernel, chip) for kernel in kernels}
    assert len(found) == 5 and all(each["binary_bytes"] > 1000 for each in found.values())
    assert all(each["spills"] == 0 for name, each in found.items() if name != "split_kernel")
    least = 6 if target == "gfx942" else LEAST_WARPS  # as a scale in a byte leaves registers there
    assert found["split_kernel"]["warps_per_processor"] >= least


def test_the_dense_baseline_compiles(monkeypatch):
    """The kernel over bf16 rows that decoding is timed against."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    q, k = (torch.zeros(1, heads, n, 128, dtype=torch.bfloat16) for heads, n in ((8, 1), (2, 1000)))
    with table.compiling("sm_90") as kernels:
        from headq_ao.evals.gpu.dense import bf16_attention

        bf16_attention(q, k, k)
    assert len(kernels) == 2 and all(table.resources(k, table.CHIPS["sm_90"])["spills"] == 0 for k in kernels)


@pytest.mark.parametrize("page", [32, 64])
def test_loads_of_planes_are_pipelined(page):
    """Pages are looked up a tile ahead, so that loads that depend on them can be: two tiles wait beside this one."""
    _, kernel, _ = table.decode_kernels(table.CASES[0], "sm_90", page)
    tile = 64 * (32 + 32)  # bytes of keys and of values
    assert kernel.metadata.shared >= 2 * tile


@pytest.mark.parametrize(
    "name", ["segments, whole pages", "groups of values, zeros", "given", "padding", "frames, few rows"]
)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_other_forms_compile(target, name):
    """What the interpreter runs, a compiler may refuse."""
    case, device = interpreted.CASES[name], torch.device("cpu")
    q, kv, readers, visible = interpreted.make(case, device)
    k = torch.zeros(len(case.packed), kv.window_k.shape[1], case.new, case.dim)
    reads = torch.zeros(2, dtype=torch.int64)
    with table.compiling(target) as kernels:
        attention.launch(q, 0.7, kv, readers, visible, case.sliding, reads, splits=2)
        update.update(kv, k, k, kv.packed + 1, 1, *interpreted.encoders(case))
    assert len(kernels) == 3 + 2 + 2 * len(case.heads)
    assert all(table.resources(kernel, table.CHIPS[target])["binary_bytes"] > 1000 for kernel in kernels)


@pytest.mark.parametrize("width", table.WIDTHS)
@pytest.mark.parametrize("target", table.CHIPS)
def test_feedback_codes(target, width):
    budget(table.resources(table.feedback_kernel(width, target), table.CHIPS[target]))


def test_the_stored_result_is_whole():
    result = json.loads(table.RESULT.read_text(encoding="utf-8"))
    assert len(result["decode_attention"]) == len(table.CASES) * len(table.CHIPS)
    assert all(row["spills"] == 0 for row in result["decode_attention"] + result["feedback_codes"])
    assert len(result["prefill_attention"]) == len(table.PREFILLED) * len(table.CHIPS)
    assert table.result_table(result).count("| prefill ") == len(result["prefill_attention"])
    assert table.result_table(result).count("| decode ") == len(result["decode_attention"])
