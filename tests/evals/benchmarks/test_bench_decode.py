"""The decode benchmark: its bf16 kernel, its inputs and their check, and the command from start to table."""

import json

import pytest
import torch

from headq_ao.evals.benchmarks import bench_decode, bench_kernels, bench_rows
from headq_ao.evals.benchmarks.bench_real import layer_errors
from headq_ao.evals.benchmarks.bench_rows import CheckFailedError, Shape, exact_attention, random_packed, relative_error
from headq_ao.evals.benchmarks.bench_timing import bursts, cache_bytes, cold_copies
from headq_ao.ops import cpu_build
from headq_ao.ops.paged_attention import reference

compiler = pytest.mark.skipif(cpu_build.load(bench_kernels.SOURCE) is None, reason="no C++ compiler")
SMALL = [
    "--shapes", "4/2/32", "--contexts", "64", "--threads", "1", "--baselines", "bf16", "folded", "gqa",
    "--repeats", "2", "--budget", "0", "--real", "none", "--mix", "2/2:1", "3/1:1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Little memory to read and few copies: nothing here is a measurement."""
    monkeypatch.setattr(bench_kernels, "READ_BYTES", 2**20)
    monkeypatch.setattr(bench_kernels, "INT8_ROUNDS", 100)
    monkeypatch.setattr(bench_decode, "cold_copies", lambda n_bytes: 2)
    monkeypatch.setattr(bench_decode, "load_average", lambda: 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("heads", "group", "dim", "tokens"),
    [
        (3, 3, 64, 1),
        (2, 4, 128, 77),
        (1, 8, 256, 333),
        (2, 5, 80, 130),
        (1, 1, 16, 50),
        (3, 3, 96, 4099),
        (1, 9, 48, 17),
    ],
)
def test_bf16_kernel_is_exact_attention(heads, group, dim, tokens, portable, rounded, threads):
    """Odd lengths, groups and head_dims; queries that are bf16 already take another path."""
    g = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(heads, group, dim, generator=g)
    q = q.bfloat16().float() if rounded else q
    k, v = torch.randn(2, heads, tokens, dim, generator=g).bfloat16()
    torch.set_num_threads(threads)
    out = bench_kernels.bf16_decode(q, k, v, dim**-0.5, portable)
    assert relative_error(out, exact_attention(q, k, v, dim**-0.5)) < 1e-5


@compiler
def test_bf16_kernel_with_large_scores():
    q, k, v = torch.full((1, 1, 64), 40.0), torch.randn(1, 300, 64).bfloat16(), torch.randn(1, 300, 64).bfloat16()
    out = bench_kernels.bf16_decode(q, k, v, 1.0)
    assert relative_error(out, exact_attention(q, k, v, 1.0)) < 1e-4


@compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "q, k, v must be"),
        (lambda q, k, v: (q, k, v[:, :3]), "q, k, v must be"),
        (lambda q, k, v: (q.bfloat16(), k, v), "q must be float32"),
        (lambda q, k, v: (q, k.float(), v), "k and v bfloat16"),
        (lambda q, k, v: (q, k.expand(2, -1, -1)[:1, ::2], v[:, ::2]), "contiguous"),
    ],
)
def test_bf16_kernel_refuses(change, message):
    q, (k, v) = torch.randn(1, 2, 32), torch.randn(2, 1, 8, 32).bfloat16()
    with pytest.raises(ValueError, match=message):
        bench_kernels.bf16_decode(*change(q, k, v), 1.0)


@compiler
def test_probes_do_their_work():
    lib, data = bench_kernels.library(), torch.ones(2**15, dtype=torch.int64)
    start = -(-data.data_ptr() // 64) * 64
    for threads in (1, 2):
        for streams in bench_kernels.STREAMS:
            assert lib.bench_read(start, 2**12 - 64, streams, threads) == pytest.approx(8 * (2**12 - 64), rel=0.1)
    assert bench_kernels.int8_products(2) == 2 * bench_kernels.int8_products(1) > 0


@pytest.mark.parametrize(("k_bits", "v_bits"), [(2, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("shape", ["4/2/32", "3/1/64", "2/2/128"])
def test_packed_tokens_stand_for_what_is_checked(shape, k_bits, v_bits):
    packed = random_packed(Shape.parse(shape), 96, k_bits, v_bits)
    exact = exact_attention(packed.q, *packed.dequantize(), packed.shape.scaling)
    for kv in [packed.kv, *packed.copies(2)]:
        for attend in (packed.attend(kv), packed.attend_compiled(reference.paged_attention, kv)):
            assert relative_error(attend().reshape(exact.shape), exact) < 1e-3
    elements = 2 * packed.shape.kv_heads * 96 * packed.shape.head_dim
    assert packed.n_bytes * 8 / elements == (k_bits + v_bits) / 2 + 8 / packed.shape.head_dim


def test_tokens_repeat_beyond_what_is_encoded(monkeypatch):
    monkeypatch.setattr(bench_rows, "ENCODED", 64)
    packed = random_packed(Shape(2, 1, 32), 160, 3, 3)
    k, v = packed.dequantize()
    assert k.shape == v.shape == (1, 160, 32)
    for rows in (k, v):
        assert torch.equal(rows[:, :64], rows[:, 64:128])
        assert torch.equal(rows[:, :32], rows[:, 128:])
    exact = exact_attention(packed.q, k, v, packed.shape.scaling)
    assert relative_error(packed.attend()().reshape(exact.shape), exact) < 1e-3


def test_methods_take_turns_over_their_copies():
    calls = []
    methods = {name: [lambda n=n, name=name: calls.append((name, n)) for n in range(2)] for name in "ab"}
    times = bursts(methods, threads=2, repeats=3, budget=0.0)
    assert {name: len(x) for name, x in times.items()} == {"a": 3, "b": 3}
    assert calls[4:] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert cold_copies(1) > cold_copies(cache_bytes()) > cold_copies(10 * cache_bytes()) == 1


@compiler
def test_command_from_start_to_table(tmp_path, capsys):
    json_path, plot = tmp_path / "out" / "bench.json", tmp_path / "bench.png"
    assert bench_decode.main([*SMALL, "--json", str(json_path)]) == 0
    assert "4/2/32, 64 tokens, 1 threads" in capsys.readouterr().out
    result = json.loads(json_path.read_text(encoding="utf-8"))
    assert result["complete"] and result["settings"] == {"k2v2": ["2/2:1"], "default": ["2/2:1", "3/1:1"]}
    (cell,) = result["cells"]
    assert set(cell["methods"]) == {"k2v2", "default", "bf16", "folded", "gqa"}
    assert set(cell["speedup"]["default"]) == {"bf16", "folded", "gqa"}
    method = cell["methods"]["k2v2"]
    assert method["bytes"] == 2 * 2 * 64 * (32 * 2 / 8 + 1)
    assert method["gbs"] == pytest.approx(method["bytes"] / method["ms"] / 1e6)
    assert method["error"] < 1e-3 < cell["methods"]["folded"]["error"] < 1e-2

    text = bench_decode.result_table(result)
    assert "| 4/2/32 | 64 | 2 / 2 |" in text and "| 4/2/32 | 64 | mix of the default |" in text

    pytest.importorskip("matplotlib")
    from headq_ao.evals.benchmarks.bench_plot import plot_decode

    plot_decode(result, plot)
    assert plot.stat().st_size > 10_000


@compiler
@pytest.mark.parametrize("what", ["packed", "bf16"])
def test_a_wrong_kernel_is_not_reported(tmp_path, capsys, monkeypatch, what):
    """A fault of a few percent in one kernel: exit status 1, no time of the cell in the file, no table."""
    if what == "packed":
        plan = bench_rows.plan_attention

        def wrong(*args):
            step = plan(*args)
            return lambda *call: 1.01 * step(*call)

        monkeypatch.setattr(bench_rows, "plan_attention", wrong)
    else:
        call = bench_kernels.bf16_call
        monkeypatch.setattr(bench_kernels, "bf16_call", lambda q, k, v, scaling: call(q, k, v, 1.1 * scaling))
    json_path = tmp_path / "bench.json"
    assert bench_decode.main([*SMALL, "--json", str(json_path)]) == 1
    assert "differs from exact attention over the same tokens" in capsys.readouterr().err
    result = json.loads(json_path.read_text(encoding="utf-8"))
    assert result["cells"] == [] and not result["complete"] and what in result["refused"]
    with pytest.raises(ValueError, match="not whole"):
        bench_decode.result_table(result)


def test_nan_is_no_agreement():
    with pytest.raises(CheckFailedError):
        bench_rows.check("it", torch.tensor([float("nan")]), torch.ones(1), 1e-3, "here")


@compiler
def test_external_source(tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text(
        'extern "C" void dbf_32_2(const void*, const void*, const float*, float* out, int heads, int tokens, int n)'
        "{ for (int i = 0; i < heads * 64; i++) out[i] = tokens + n; }",
        encoding="utf-8",
    )
    make = bench_kernels.external(source, 32, 2)
    k = torch.zeros(3, 5, 32).bfloat16()
    assert torch.equal(make(torch.zeros(3, 2, 32), k, k)(), torch.full((3, 2, 32), 5.0 + torch.get_num_threads()))
    assert bench_kernels.external(source, 64, 2) is None
    with pytest.raises(FileNotFoundError):
        bench_kernels.external(tmp_path / "none.cpp", 32, 2)
    assert bench_decode.main([*SMALL, "--external", str(source)]) == 1  # it computes something else


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "9/4/64"], "multiple of KV heads"),
        (["--shapes", "9"], "HEADS/KV_HEADS/HEAD_DIM"),
        (["--contexts", "100"], "multiples of 32"),
        (["--k-bits", "2", "3"], "equally many"),
        (["--k-bits", "7"], "1 to 6 or 8"),
        (["--mix", "2:3"], "K_BITS/V_BITS:HEADS"),
        (["--threads", "0"], "at least 1"),
        (["--external", "nowhere.cpp"], "no file 'nowhere.cpp'"),
    ],
)
def test_bad_arguments_end_before_work(arguments, message, capsys):
    assert bench_decode.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_decode.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "exact attention over the dequantized tokens" in " ".join(text.split())


@pytest.mark.parametrize("calibrated", [False, True])
def test_error_on_a_models_own_states(tiny, token_ids, calibrated):
    from headq_ao import calibrate, headq_config, quantize_

    model = tiny(head_dim=64)
    calibration = calibrate(model, [token_ids(3, 200)], progress=False) if calibrated else None
    quantize_(model, headq_config(calibration=calibration, warmup_tokens=64))
    errors = layer_errors(model, token_ids(1, 300, seed=1))
    assert len(errors) == 2 and max(errors) < 1e-3
