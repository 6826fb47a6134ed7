"""``headq estimate``, ``doctor``, ``eval``, ``compare`` and ``chat`` on tiny models."""

import io
import json
import subprocess
import sys

import pytest
import torch
import transformers

from headq_ao import calibrate
from headq_ao.evals.cli import chat, doctor, loading
from headq_ao.evals.cli.__main__ import main
from headq_ao.evals.models.tiny import tiny_model

SHORT = ["--row-length", "160", "--prefill", "64", "--chunk", "32", "--rows", "1", "--no-progress"]
SMALL = [*SHORT, "--set", "residual_length=16", "--set", "block_size=16"]


def texts(text_file):
    return ["--text", str(text_file()), "--calibration", str(text_file("c.txt", seed=1)), "--calibration-tokens", "600"]


def test_estimate_reads_no_weights(tiny_folder, monkeypatch, capsys):
    (tiny_folder / "model.safetensors").unlink()
    arguments = ["estimate", str(tiny_folder), "--context", "1,024", "--batch", "2", "--set", "k_bits=3"]
    assert main([*arguments, "--budget", "1MiB"]) == 0
    captured = capsys.readouterr()
    rows = {line.split("  ")[0]: line.split() for line in captured.out.splitlines()}
    assert list(rows)[2:] == [
        "exact",
        "minimal",
        "compact",
        "balanced",
        "quality",
        "near_lossless",
        "headq_paper",
        "balanced, no calibration",
        "--set",
        next(name for name in rows if name.endswith(", the most that fit")),
    ]
    assert "2 sequences of 1,024 tokens" in captured.err
    exact, balanced = rows["exact"], rows["balanced"]
    assert exact[1:4] == ["16.00", "1.0", "MiB"]  # 2 layers, 2 heads of 32, keys and values, 2 bytes, 2 · 1024 tokens
    assert balanced[1] == "2.62" and float(balanced[4]) > 2  # 2.375 and 8 bits of scale for 32 coordinates
    assert int(exact[-1].replace(",", "")) == 1024 < int(balanced[-1].replace(",", ""))


def test_estimate_imports_no_modelling_code(tiny_folder):
    """Nor torchao: they take longer than all that it does."""
    code = "import sys\nfrom headq_ao.evals.cli.__main__ import main\nmain(['estimate', sys.argv[1]])\n"
    code += "print({'torchao', 'transformers.modeling_utils'} & {*sys.modules})"
    command = [sys.executable, "-c", code, str(tiny_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("\nset()\n")


def test_estimate_of_latents_from_a_config_alone(tmp_path, capsys):
    transformers.DeepseekV3Config(num_hidden_layers=4).save_pretrained(tmp_path)
    assert main(["estimate", str(tmp_path)]) == 0
    rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["exact"][1:4] == ["16.00", "18.0", "MiB"]  # 4 layers, 576 numbers of 2 bytes, 4096 tokens
    assert rows["balanced"][1] == "2.26" and rows["balanced, no calibration"][3] == "2.01"  # and 8 / 576


def test_estimate_says_what_the_least_is(tiny_folder, capsys):
    assert main(["estimate", str(tiny_folder), "--budget", "9kB", "--batch", "2"]) == 0
    captured = capsys.readouterr()
    assert "no room for 2 sequences of 4,096 tokens" in captured.err and "the most that fit" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "bits=3"], "unknown option bits"),
        (["--set", "k_bits"], "--set takes NAME=VALUE"),
        (["--calibration", "nowhere.safetensors"], "no calibration file at"),
    ],
)
def test_estimate_refuses(arguments, message, tiny_folder, capsys):
    assert main(["estimate", str(tiny_folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_doctor_finds_nothing_wrong_here(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "tiny model on cpu" in shown and "CPU kernel paged_attention" in shown and "wrong" not in shown


def test_doctor_tells_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["torch>=99", "no-such-package>=1"])
    monkeypatch.setenv("HEADQ_CPU_KERNEL", "0")
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (99.0, 0, 0))
    monkeypatch.setattr(doctor, "trial", lambda device: doctor.Finding("tiny model", "not run"))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "pip install 'torch>=99'" in shown and "pip install 'no-such-package>=1'" in shown
    assert "unset HEADQ_CPU_KERNEL" in shown and "2 wrong, 2 slow" in shown and "take fewer threads" in shown


def test_eval(tiny_folder, text_file, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert main(["eval", str(tiny_folder), *texts(text_file), *SMALL, "--json", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["score"]["packed_fraction"] > 0.3 and result["protocol"]["dtype"] == "float32"


def test_eval_fails_where_nothing_was_packed(tiny_folder, text_file, capsys):
    assert main(["eval", str(tiny_folder), *texts(text_file), *SHORT, "--set", "residual_length=500"]) == 1
    assert "no packed token was read" in capsys.readouterr().err


def test_eval_refuses_before_it_loads(tiny_folder, text_file, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    assert main(["eval", str(tiny_folder), *texts(text_file), "--preset", "other"]) == 2
    assert "preset must be one of" in capsys.readouterr().err


def test_compare(tiny_folder, text_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    methods = ["headq residual_length=16 block_size=16", "kivi k_bits=2 v_bits=2 residual_length=16 block_size=32"]
    methods.append("hadamard k_bits=2 v_bits=2 group=48")  # 48 does not divide 32
    methods += ["trellis k_bits=2 v_bits=2 residual_length=16", "residual_vq codebooks=nowhere.safetensors"]
    arguments = ["compare", str(tiny_folder), *texts(text_file), *SHORT, "--plot", str(tmp_path / "plots" / "c.png")]
    assert main(arguments + [word for method in methods for word in ("--method", method)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("headq residual") == captured.out.count("kivi k_bits") == 1
    assert captured.out.count("trellis k_bits") == 1
    assert "left out: hadamard" in captured.err
    assert "left out: residual_vq" in captured.err and "residual_vq train MODEL" in captured.err
    assert (tmp_path / "plots" / "c.png").stat().st_size > 5000


@pytest.mark.parametrize(("method", "message"), [("other", "no method 'other'"), ("kivi k_bits=2 bits=1", "bits")])
def test_compare_refuses_before_it_loads(method, message, tiny_folder, text_file, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    assert main(["compare", str(tiny_folder), *texts(text_file), "--method", "headq", "--method", method]) == 2
    assert message in capsys.readouterr().err


def test_chat_keeps_its_cache_between_turns(tiny_folder, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(chat.Conversation, "new_cache", lambda self: made.append(1) or original(self))
    words = " ".join(f"w{i % 90}" for i in range(300))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{words}\n\nw1 w2 w3\n/clear\nw4 w5\n/bye\nw6\n"))
    assert main(["chat", str(tiny_folder), "--max-new-tokens", "20"]) == 0
    captured = capsys.readouterr()
    statuses = [line for line in captured.err.splitlines() if line.startswith("[") and "tokens" in line]
    assert len(statuses) == 3 and len(made) == 2  # one more for /clear
    assert statuses[0].startswith("[319 tokens") and statuses[1].startswith("[342 tokens")
    assert "0 packed" not in statuses[1] and "exact" in statuses[1]


original = chat.Conversation.new_cache


def test_chat_exact(tiny_folder, capsys):
    assert main(["chat", str(tiny_folder), "--exact", "--prompt", "w1 w2", "--max-new-tokens", "4"]) == 0
    assert "[5 tokens, cache" in capsys.readouterr().err
    assert main(["chat", str(tiny_folder), "--exact", "--preset", "quality"]) == 2
    assert main(["chat", str(tiny_folder), "--calibration", "nowhere.safetensors"]) == 2
    assert "make one with: headq calibrate" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_not_the_conversation(tiny_folder, monkeypatch, capsys):
    own, calls = chat.Conversation.answer, []

    def answer(self, text):
        calls.append(text)
        if len(calls) == 1:
            self.encode(text)
            raise KeyboardInterrupt
        return own(self, text)

    monkeypatch.setattr(chat.Conversation, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\nw3 w4 w5\n"))
    assert main(["chat", str(tiny_folder), "--max-new-tokens", "4"]) == 0
    told = capsys.readouterr().err
    assert "[stopped" in told and "[6 tokens" in told  # three and four, less the last, which is not in the cache yet
    assert main(["chat", str(tiny_folder), "--prompt", " "]) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "--json", "file/e.json"], "--json 'file/e.json': nothing can be written in"),
        (["compare", "--json", "."], "--json must name a file, got the folder '.'"),
        (["compare", "--plot", "plot.txt"], "--plot must name a .png or .svg or .pdf file, got 'plot.txt'"),
    ],
)
def test_places_of_results_are_looked_at_before_any_work(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "model_config", None)
    (tmp_path / "file").touch()
    assert main([command[0], "m", *command[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "told"),
    [("file.bin", "got the file 'file.bin'"), ("smollm", "Was 'smollm2' meant?"), ("some/model", "HF_HUB_OFFLINE=1")],
)
def test_a_model_that_is_not_found(name, told, tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect\nand more")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.bin").touch()
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["estimate", name]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("headq: ") and told in last


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert main(["calibrate", "smollm2", "-o", "x.safetensors"]) == 1
    told = capsys.readouterr().err.strip()
    assert "pip install gguf" in told and "\n" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimate", "--context", "99,999,999,999"], "must be at most 67,108,864, got 99,999,999,999"),
        (["estimate", "--batch", "100000"], "must be at most 4,096, got 100,000"),
    ],
)
def test_more_than_can_be_counted(arguments, message, tiny_folder, capsys):
    """It took all memory, or minutes."""
    with pytest.raises(SystemExit) as caught:
        main([arguments[0], str(tiny_folder), *arguments[1:]])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "eval", "compare"])
@pytest.mark.parametrize(
    ("content", "message"), [(b"\xd5\x00\x10", "must be a UTF-8 text file"), (b" \n", "has no text")]
)
def test_texts_that_are_none(command, content, message, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    (tmp_path / "t.txt").write_bytes(content)
    out = ["-o", str(tmp_path / "c.safetensors")] if command == "calibrate" else []
    assert main([command, str(tiny_folder), "--text", str(tmp_path / "t.txt"), *out]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["estimate", "chat", "eval", "compare"])
def test_a_calibration_that_is_none(command, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    (tmp_path / "c.safetensors").write_text("no calibration at all", encoding="utf-8")
    assert main([command, str(tiny_folder), "--calibration", str(tmp_path / "c.safetensors")]) == 2
    assert "is not a usable headq_ao calibration" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["estimate", "chat", "eval", "compare"])
def test_a_calibration_of_another_model(command, tiny, tiny_folder, tmp_path, monkeypatch, capsys):
    """Told from its config, before weights are read."""
    other = tiny(num_key_value_heads=1)
    ids = torch.randint(5, 100, (4, 300), generator=torch.Generator().manual_seed(0))
    calibrate(other, ids, progress=False).save(tmp_path / "c.safetensors")
    monkeypatch.setattr(loading, "load_model", None)
    assert main([command, str(tiny_folder), "--calibration", str(tmp_path / "c.safetensors")]) == 2
    assert "was made on another model: kv_heads is 2 here and 1 there" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [("banana", "must be cpu, cuda"), ("cuda:99", "here; headq doctor")])
def test_a_device_that_is_not_here(name, message, tiny_folder, capsys):
    assert main(["chat", str(tiny_folder), "--device", name, "--prompt", "w1"]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_that_asks_no_hub_says_so(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["estimate", "some/model"]) == 2
    told = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set: looking among what was fetched" in told and "HF_HUB_OFFLINE=1" not in told


def test_chat_with_latents(tmp_path, tiny_folder, capsys):
    """The exact cache that it is compared with is that of rows."""
    tiny_model("deepseek_v3", "DeepseekV3ForCausalLM").save_pretrained(tmp_path / "mla")
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "mla")
    assert main(["chat", str(tmp_path / "mla"), "--prompt", "w1 w2", "--max-new-tokens", "4"]) == 0
    assert "exact" in capsys.readouterr().err
