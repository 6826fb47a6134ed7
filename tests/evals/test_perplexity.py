"""The perplexity command: a whole run on a tiny model, and what it refuses before it starts."""

import json

import pytest

from headq_ao import Calibration
from headq_ao.evals import perplexity
from headq_ao.evals.harness import inputs
from headq_ao.evals.harness.scoring import exact_logprobs
from headq_ao.evals.harness.subjects import Subject
from headq_ao.evals.harness.texts import WIKITEXT_VARIABLE

SMALL = ["--row-length", "160", "--prefill", "64", "--chunk", "32", "--no-progress", "--set", "warmup_tokens=32"]
PACKED = [*SMALL, "--set", "residual_length=16", "--set", "block_size=16"]


def test_run(tiny_folder, text_file, tmp_path, capsys):
    out = tmp_path / "new" / "out.json"
    text, calibration = text_file(), text_file("calibration.txt", seed=1)
    arguments = ["--model", str(tiny_folder), "--text", str(text), "--calibration", str(calibration)]
    arguments += ["--calibration-tokens", "300", "--rows", "2", "--set", "k_bits=3", "--set", "v_bits=none"]
    assert perplexity.main([*arguments, *PACKED, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "tiny in float32: 2 rows of 160 tokens of text.txt" in shown
    assert "3.25 / exact" in shown  # per 32 coordinates: 3 bits each, 8 of scale
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["config"]["k_bits"] == 3 and result["config"]["v_bits"] is None
    assert result["config"]["calibration"]["tokens"] == 300
    assert result["score"]["packed_fraction"] > 0.3 and result["score"]["mean_kl"] > 0
    assert 3.25 <= result["bits"]["at"]["4096"] < 3.35
    assert result["protocol"] == {
        "text": "text.txt", "calibration": "calibration.txt", "rows": 2, "row_length": 160, "prefill": 64, "chunk": 32,
        "dtype": "float32",
    }  # fmt: skip
    assert result["environment"]["versions"]["headq_ao"]
    assert str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "environment"})


def test_saved_calibration(tiny_folder, text_file, tmp_path, capsys):
    model, tokenizer = inputs.load(str(tiny_folder), None, inputs.DTYPES["float32"])
    inputs.calibrate_on(model, tokenizer, text_file(), 300, progress=False).save(tmp_path / "c.safetensors")
    arguments = ["--model", str(tiny_folder), "--text", str(text_file()), "--calibration"]
    assert perplexity.main([*arguments, str(tmp_path / "c.safetensors"), *SMALL]) == 0
    Calibration([], {"model_type": "other"}).save(tmp_path / "other.safetensors")
    assert perplexity.main([*arguments, str(tmp_path / "other.safetensors"), *SMALL]) == 1
    assert "made on another model" in capsys.readouterr().err


def test_fails_when_nothing_was_packed(tiny_folder, text_file, capsys):
    arguments = ["--model", str(tiny_folder), "--text", str(text_file()), *SMALL, "--set", "residual_length=500"]
    assert perplexity.main(arguments) == 1
    captured = capsys.readouterr()
    assert "no packed token was read" in captured.err
    assert captured.out == ""


def test_short_text(tiny_folder, text_file, capsys):
    assert perplexity.main(["--model", str(tiny_folder), "--text", str(text_file(tokens=100)), *SMALL]) == 1
    assert "text.txt has 100 tokens, fewer than 1 rows of 160" in capsys.readouterr().err


def test_no_such_model(tmp_path, capsys):
    assert perplexity.main(["--model", str(tmp_path), *SMALL]) == 1
    assert "transformers cannot load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "no text file 'nowhere.txt'"),
        (["--text", "wikitext"], "set HEADQ_WIKITEXT=FOLDER"),
        (["--calibration", "nowhere.txt"], "no text file 'nowhere.txt'"),
        (["--calibration", "nowhere.safetensors"], "no calibration file at 'nowhere.safetensors'"),
        (["--row-length", "256"], "--row-length must be larger than --prefill 256, got 256"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--set", "bits=3"], "unknown option bits; valid options are k_bits"),
        (["--set", "k_bits=7"], "k_bits must be 1, 2, 3, 4, 5, 6 or 8"),
        (["--set", "k_bits"], "--set takes NAME=VALUE"),
        (["--set", "rank=1", "--set", "rank=2"], "--set rank is given twice"),
        (["--set", "calibration=x"], "give the calibration with --calibration"),
        (["--preset", "other"], "invalid choice: 'other'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_refuses_before_it_loads(arguments, message, monkeypatch, capsys):
    monkeypatch.delenv(WIKITEXT_VARIABLE, raising=False)
    monkeypatch.setattr(inputs, "load", None)
    with pytest.raises(SystemExit) as caught:
        perplexity.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_same_text_for_both(text_file, capsys):
    with pytest.raises(SystemExit):
        perplexity.main(["--text", str(text_file()), "--calibration", str(text_file())])
    assert "report on a text unseen" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        perplexity.main(["--help"])
    assert "examples:" in capsys.readouterr().out


def test_parse_value():
    texts = ["3", "none", "True", "false", "0.5", "off", "query_pca"]
    assert [perplexity.parse_value(t) for t in texts] == [3, None, True, False, 0.5, "off", "query_pca"]


def test_evaluate_leaves_the_model_as_it_was(tiny, token_ids):
    model, rows = tiny(), token_ids(1, 160)
    exact = exact_logprobs(model, rows, 64, progress=False)
    subject = Subject("headq", {"warmup_tokens": 32})
    perplexity.evaluate(model, rows, exact, subject, prefill=64, chunk=32, progress=False)
    again = exact_logprobs(model, rows, 64, progress=False)
    assert (exact[0] == again[0]).all()
    assert not hasattr(model, "_headq")
