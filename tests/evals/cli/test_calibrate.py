"""``headq calibrate``: a file that quantize_ takes, and what is refused before a model is loaded."""

import pytest
import transformers

from headq_ao import Calibration, HeadQCache, headq_config, quantize_
from headq_ao.evals.cli import calibrate as calibrate_command
from headq_ao.evals.cli import loading
from headq_ao.evals.cli.__main__ import main


def test_the_file_is_what_a_model_is_quantized_with(tiny_folder, text_file, tmp_path, capsys):
    out = tmp_path / "new" / "c.safetensors"
    assert main(["calibrate", str(tiny_folder), "--text", str(text_file()), "--tokens", "600", "-o", str(out)]) == 0
    assert 'headq_config(calibration="' in capsys.readouterr().out
    made = Calibration.load(out)
    assert made.meta["tokens"] == 600 and made.meta["source"] == "text.txt" and made.suffices
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    quantize_(model, headq_config(calibration=str(out)))
    assert HeadQCache(model).config.calibration is not None


def test_a_dataset(tiny_folder, text_file, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder, words = tmp_path / "data", text_file(tokens=900).read_text(encoding="utf-8").split()
    folder.mkdir()
    rows = [" ".join(words[i : i + 100]) for i in range(0, 900, 100)]
    datasets.Dataset.from_dict({"body": rows}).to_json(folder / "train.jsonl")
    arguments = ["calibrate", str(tiny_folder), "--text", f"dataset:{folder}", "--tokens", "600", "--no-progress"]
    arguments += ["-o", str(tmp_path / "c.safetensors")]
    assert main(arguments) == 1  # no column "text"
    assert main([*arguments, "--column", "body"]) == 0
    assert Calibration.load(tmp_path / "c.safetensors").meta["source"] == "data"


@pytest.mark.parametrize(("tokens", "lengths"), [(1500, [750, 750]), (3000, [1000, 1000])])
def test_all_tokens_asked_for_are_taken(tokens, lengths, tiny_folder, text_file, capsys):
    """Rows that do not divide the tokens get shorter; a text that is too short is taken whole, and that is said."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    text = text_file(tokens=2000).read_text(encoding="utf-8")
    rows = calibrate_command.sequences(tokenizer, text, "t.txt", tokens, 1024)
    assert list(map(len, rows)) == lengths
    assert ("t.txt has 2000 tokens, fewer than --tokens 3000" in capsys.readouterr().err) == (tokens == 3000)


def test_progress_of_both_passes(tiny_folder, text_file, tmp_path, capsys):
    out = str(tmp_path / "c.safetensors")
    assert main(["calibrate", str(tiny_folder), "--text", str(text_file()), "--tokens", "600", "-o", out]) == 0
    shown = capsys.readouterr().err
    assert "calibrate: 100%" in shown and "sensitivity: 100%" in shown and "2/2" in shown


def test_too_little_text_writes_nothing(tiny_folder, text_file, tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    arguments = ["calibrate", str(tiny_folder), "--text", str(text_file()), "--tokens", "60", "-o", str(out)]
    assert main(arguments) == 1
    assert "nothing was written" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "c.txt"], "-o must name a .safetensors file, got 'c.txt'"),
        (["-o", "there.safetensors/c.safetensors"], "nothing can be written in"),
        (["-o", "there.safetensors"], "there.safetensors is there already; --force writes over it"),
        (["-o", "c.safetensors", "--text", "nowhere.txt"], "no text file 'nowhere.txt'"),
        (["-o", "c.safetensors"], "transformers finds no model 'nowhere'"),
    ],
)
def test_refused_before_weights_are_read(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "there.safetensors").touch()
    monkeypatch.setattr(loading, "load_model", None)
    assert main(["calibrate", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_context_beyond_the_model(tiny_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", None)
    arguments = ["--text", str(text_file()), "-o", str(tmp_path / "c.safetensors"), "--context-length", "5000"]
    assert main(["calibrate", str(tiny_folder), *arguments]) == 2
    assert "--context-length must be at most 4096, the model's positions, got 5000" in capsys.readouterr().err


def test_wrong_numbers(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "m", "-o", "c.safetensors", "--tokens", "none"])
    assert caught.value.code == 2
    assert "must be a whole number, got 'none'" in capsys.readouterr().err
