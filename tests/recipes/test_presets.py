"""The presets recipe: prefill in turn with the exact cache, and the table."""

import json

import torch
from transformers import DynamicCache

from headq_ao import HeadQCache, calibrate, headq_config, quantize_
from headq_ao.evals.results import tables
from tests.conftest import load_recipe

presets = load_recipe("presets")


def test_measure_takes_turns_and_takes_the_cache_off(tiny, token_ids, monkeypatch):
    calls, model = [], tiny()
    monkeypatch.setattr(
        presets, "seconds_of_prefill", lambda model, ids, packed: (calls.append(packed), (2.0 + packed, 4.0))[1]
    )
    calibration = calibrate(model, token_ids(2, 200), progress=False)
    found = presets.measure(model, token_ids(1, 64), calibration, repeats=2, progress=False)
    assert calls == [False, *[True] * len(presets.ROWS)] * 2
    assert list(found) == [row[0] for row in presets.ROWS]
    assert all(x["ratio"] == 1.5 and x["cpu_ratio"] == 1.0 for x in found.values())
    assert not hasattr(model.model.layers[0].self_attn, "headq")


def test_prefill_fills_the_cache_it_times(tiny, token_ids, monkeypatch):
    caches, model = [], tiny()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *ids, **kw: caches.append(kw.get("cache")) or forward(*ids, **kw))
    wall, cpu = presets.seconds_of_prefill(model, token_ids(1, 140), packed=False)
    assert wall > 0 and cpu >= 0 and torch.is_grad_enabled()
    quantize_(model, headq_config(calibration=calibrate(model, token_ids(2, 200), progress=False), v_bits=2))
    presets.seconds_of_prefill(model, token_ids(1, 140), packed=True)
    assert isinstance(caches[0], DynamicCache) and isinstance(caches[-1], HeadQCache)
    assert caches[0].get_seq_length() == caches[-1].get_seq_length() == 140 and caches[-1].bits_report().bytes


def test_the_table_shows_each_preset_once(tmp_path):
    score = {"ppl_ratio": 1.01, "ppl_ratio_sem": 0.001, "mean_kl": 0.02, "mean_kl_sem": 0.001}
    bits = {"body": 2.5, "at": {"4096": 2.625}}
    names = [(name, file) for name, *_, file in presets.ROWS]
    assert names == list(tables.PRESETS)
    for order, (_, file) in enumerate(names):
        stored = {"name": file, "order": order, "score": score, "bits": bits}
        (tmp_path / f"{file}.json").write_text(json.dumps(stored))
    prefill = {name: {"cpu_ratio": 1.08} for name, _ in names}
    result = {"model": "m", "dtype": "float32", "tokens": 64, "repeats": 3, "prefill": prefill}
    table = tables.presets(result, tmp_path)
    assert table.count("| 2.50 | 2.62 |") == len(names) and table.count("+8 %") == len(names)
