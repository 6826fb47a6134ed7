"""The bound against known cases, and the command on a small model."""

import json
import math

import pytest
import torch

from headq_ao import calibrate, headq_config
from headq_ao.evals import rate_distortion
from headq_ao.evals.rate_distortion import bound, distances, measure, states, table_rows
from headq_ao.integrations.transformers.serving import serving_of


@pytest.mark.parametrize("bits", [0.5, 1.0, 3.0])
def test_the_bound_of_equal_variances(bits):
    assert bound(torch.full((16,), 2.0), 16 * 2.0 * 4**-bits) == pytest.approx(bits)


def test_the_bound_by_search():
    """Reverse water-filling, with the level found by bisection."""
    torch.manual_seed(0)
    values = torch.rand(32, dtype=torch.float64) ** 6
    for share in (0.9, 0.3, 0.01, 1e-4):
        want, low, high = share * values.sum(), 0.0, 1.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if values.clamp(max=middle).sum() < want else (low, middle)
        rate = (values / low).log2().clamp(min=0).sum() / 2 / 32
        assert bound(values, float(want)) == pytest.approx(float(rate), abs=1e-9)
    assert bound(values, float(values.sum()) * 1.1) == 0.0


def test_no_code_is_nearer_than_the_bound(tiny, token_ids):
    """On Gaussian-like rows scalar codes are 0 to 0.7 bits away, and a scale adds its bits."""
    model = tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2)
    calibration = calibrate(model, token_ids(4, 512), progress=False)
    config, seen = headq_config(), states(model, token_ids(2, 512, seed=1), 4)
    found = measure(serving_of(model).shapes, seen, config, calibration)
    assert len(found) == 2 * 2 * 2
    for entry in found:
        assert entry["with_scale"] - entry["bits"] in (8 / 32, 16 / 32)
        assert -0.02 < entry["bits"] - entry["bound"] < 0.7, entry
    assert len(distances(found, "keys")) == 2


def test_the_command(tiny, token_ids, tmp_path, monkeypatch, capsys):
    model = tiny("llama", head_dim=32, heads=4, kv_heads=2, layers=2)
    monkeypatch.setattr(rate_distortion.inputs, "load", lambda *args: (model, None))
    monkeypatch.setattr(rate_distortion.inputs, "token_rows", lambda tokenizer, path, n, length: token_ids(n, 512))
    path = tmp_path / "rates.json"
    assert rate_distortion.main(["--text", "bundled", "--rows", "1", "--json", str(path), "--no-progress"]) == 0
    result = json.loads(path.read_text())
    shown = capsys.readouterr().out
    assert all(cell in shown for row in table_rows(result) for cell in row) and len(table_rows(result)) == 6
    assert set(result["presets"]) == {"balanced", "quality", "near_lossless"}
    assert all(math.isfinite(e["bound"]) for found in result["presets"].values() for e in found)
    with pytest.raises(SystemExit):
        rate_distortion.main(["--rows", "0"])
    assert "--rows must be at least 1" in capsys.readouterr().err
    own = tmp_path / "own.txt"
    own.write_text("one text")
    with pytest.raises(SystemExit):
        rate_distortion.main(["--text", str(own)])
    assert "has no part of its own to calibrate on" in capsys.readouterr().err
