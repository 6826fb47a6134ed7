"""Made-up results of about thirty settings, whose choices the tests work out by hand."""

import json
import math

import pytest

# name, family, method, options, key bits, value bits, mean KL: plain numbers to choose among, no measurements
H, N = "HeadQ, side code", "HeadQ"
SETTINGS = [
    ("exact", "exact", "exact", {}, None, None, 0.0),
    ("kv_default", H, "headq", {}, 2.75, 2.25, 0.030),
    ("kv_uncalibrated", H, "headq", {}, 2.75, 2.25, 0.033),
    ("kv_no_side_code", N, "headq", {"rank": 0}, 2.25, 2.25, 0.080),
    ("kv_k3v2", N, "headq", {"k_bits": 3, "rank": 0}, 3.25, 2.25, 0.0215),
    ("kv_k3v2_side", H, "headq", {"k_bits": 3, "rank": 16}, 3.75, 2.25, 0.0165),
    ("kv_k2v3_side", H, "headq", {"v_bits": 3}, 2.75, 3.25, 0.0240),
    ("kv_3bit", N, "headq", {"k_bits": 3, "v_bits": 3, "rank": 0}, 3.25, 3.25, 0.0130),
    ("kv_4bit", N, "headq", {"k_bits": 4, "v_bits": 4, "rank": 0}, 4.25, 4.25, 0.0034),
    ("kv_8bit", N, "headq", {"k_bits": 8, "v_bits": 8, "rank": 0}, 8.25, 8.25, 0.00001),
    ("kv_paper", H, "headq", {"preset": "headq_paper"}, 3.0, 2.5, 0.045),
    ("kv_wrong_sign", H, "headq", {"preset": "headq_paper", "sign": -1}, 3.0, 2.5, 1.25),
    ("k_default", H, "headq", {"v_bits": None}, 2.75, None, 0.018),
    ("k_no_side_code", N, "headq", {"rank": 0, "v_bits": None}, 2.25, None, 0.070),
    ("k_3bit", N, "headq", {"k_bits": 3, "rank": 0, "v_bits": None}, 3.25, None, 0.011),
    ("v_default", H, "headq", {"k_bits": None}, None, 2.25, 0.009),
    ("v_3bit", H, "headq", {"k_bits": None, "v_bits": 3}, None, 3.25, 0.002),
    ("kivi2_g128", "KIVI", "kivi", {"k_bits": 2, "v_bits": 2, "k_group": 128}, 2.25, 2.5, 0.36),
    ("kivi2_g64", "KIVI", "kivi", {"k_bits": 2, "v_bits": 2, "k_group": 64}, 2.5, 2.5, 0.30),
    ("kivi2_g32", "KIVI", "kivi", {"k_bits": 2, "v_bits": 2}, 3.0, 3.0, 0.16),
    ("kivi4_g64", "KIVI", "kivi", {"k_bits": 4, "v_bits": 4, "k_group": 64}, 4.5, 4.5, 0.007),
    ("affine3", "per-token affine", "per_token", {"k_bits": 3, "v_bits": 3}, 3.5, 3.5, 0.090),
    ("affine4", "per-token affine", "per_token", {"k_bits": 4, "v_bits": 4}, 4.5, 4.5, 0.012),
    ("hadamard2", "Hadamard per-token", "hadamard", {"k_bits": 2, "v_bits": 2}, 2.5, 2.5, 0.21),
    ("hadamard3", "Hadamard per-token", "hadamard", {"k_bits": 3, "v_bits": 3}, 3.5, 3.5, 0.020),
    ("turboquant2", "TurboQuant-like", "turboquant", {"k_bits": 2, "v_bits": 2}, 2.25, 2.25, 0.095),
    ("turboquant3", "TurboQuant-like", "turboquant", {"k_bits": 3, "v_bits": 3}, 3.25, 3.25, 0.0160),
    ("squat2", "SQuat-like", "squat", {"k_bits": 2, "v_bits": 2}, 3.0, 3.0, 0.12),
    ("gear2", "GEAR-like", "gear", {"k_bits": 2, "v_bits": 2, "rank": 2}, 3.25, 3.25, 0.13),
    ("fp8", "FP8", "fp8", {}, 8.0, 8.0, 0.0012),
    ("quanto4", "transformers quanto", "quanto", {"nbits": 4}, 4.5, 4.5, 0.02),
    ("hqq2", "transformers hqq", "hqq", {"nbits": 2}, 3.0, 3.0, 0.9),
]
HEADLINE = ("kv_default", "kv_no_side_code", "kv_3bit", "kivi2_g32", "turboquant2", "k_default", "v_default")
TOKENS = (1024, 4096, 16384, 65536)
LAYERS, WIDTH, EXACT_ROWS = 30, 192, 96
PROTOCOL = {
    "text": "wiki.test.raw", "rows": 8, "row_length": 1024, "prefill": 256, "chunk": 64,
    "calibration": "wiki.valid.raw", "calibration_tokens": 4096, "dtype": "float32",
}  # fmt: skip


def wave(name, n):
    """n numbers near 0 that depend on the name only and add up to 0."""
    phase = sum(map(ord, name))
    values = [math.sin(phase * (i + 1) + i) for i in range(n)]
    return [v - sum(values) / n for v in values]


def memory(sides, tokens):
    """Bytes with bf16 full-precision tokens; sides are bits, None for 16."""
    exact = EXACT_ROWS if any(sides) else tokens
    return sum(LAYERS * WIDTH * (2 * exact + (tokens - exact) * (bits or 16) / 8) for bits in sides)


def score(name, kl, key_bits, value_bits, exact):
    rows, n = PROTOCOL["rows"], 12
    shared = [1 + 0.7 * w for w in wave("rows", rows)]
    by_row = [kl * (s + 0.05 * w) for s, w in zip(shared, wave(name, rows), strict=True)]
    spread = math.sqrt(sum((x - kl) ** 2 for x in by_row) / (rows - 1) / rows)
    ratio = math.exp(1.3 * kl + 0.0005 * wave(name, 3)[0])
    positions = [256 + i * 64 for i in range(n)]
    return {
        "perplexity": exact * ratio, "perplexity_sem": 0.04 * exact * ratio,
        "exact_perplexity": exact, "exact_perplexity_sem": 0.04 * exact,
        "ppl_ratio": ratio, "ppl_ratio_sem": 0.4 * spread, "mean_kl": kl, "mean_kl_sem": spread,
        "kl_by_row": by_row,
        "kl_by_position": [
            {"start": start, "stop": start + 64, "kl": kl * (0.7 + 0.05 * i + 0.1 * wave(name, n)[i])}
            for i, start in enumerate(positions)
        ],
        "flips": min(0.45 * math.sqrt(kl), 1.0), "packed_fraction": 0.8 if key_bits or value_bits else 0.0,
        "report": {"key_body_bits": key_bits, "value_body_bits": value_bits, "exact_rows": float(EXACT_ROWS)},
        "tokens": rows * 768,
    }  # fmt: skip


def layers(name, kl, key_bits, value_bits):
    def by_layer(scale, tilt):
        return [scale * math.exp(tilt * i / LAYERS + 0.4 * w) for i, w in enumerate(wave(name, LAYERS))]

    keys, values = key_bits is not None, value_bits is not None
    return {
        "attention_kl": by_layer(kl / 3, 1.0) if keys else None,
        "fisher_error": by_layer(kl / 3, 1.1) if keys else None,
        "key_mse": by_layer(2 ** (4 - 2 * key_bits), 0.5) if keys else None,
        "value_error": by_layer(2 ** (2 - 2 * value_bits), 1.5) if values else None,
        "output_error": by_layer(kl, 2.0),
    }


def result(setting, order, model="smollm2", exact=17.4, factor=1.0, **changes):
    """One result file's content."""
    name, family, method, options, key_bits, value_bits, kl = setting
    kind = method if method in ("headq", "exact") else "transformers" if "quanto" in family else "baseline"
    sides = [bits for bits in (key_bits, value_bits) if bits is not None]
    body = sum(sides) / len(sides) if sides else None
    at = {str(t): body + (8 / t if key_bits else 0) for t in TOKENS[:3]} if sides else None
    return {
        "name": name, "title": f"**{name}** of {family}", "order": order, "headline": name in HEADLINE,
        "family": family, "method": {"kind": kind, "name": method, "options": options}, "options": options,
        "calibrated": name != "kv_uncalibrated" and kind == "headq",
        "model": model, "protocol": PROTOCOL,
        "config": {"n_sink": 4, "residual_length": 64, "block_size": 32},
        "score": score(name, kl * factor, key_bits, value_bits, exact),
        "bits": {"key": key_bits, "value": value_bits, "body": body, "at": at},
        "memory_bytes": {str(t): memory((key_bits, value_bits), t) for t in TOKENS},
        "layers": layers(name, kl * factor, key_bits, value_bits) if sides else None,
        "environment": {
            "versions": {"python": "3.11.7", "headq_ao": "0.1.0", "torch": "2.13.0"}, "device": "cpu",
            "cpu": "a <processor>", "threads": 1, "git": {"commit": "0123456789abcdef", "dirty": True},
            "date": "2026-11-24T22:05:10+00:00", "command": f"python recipes/run.py --only {name}",
        },
    } | changes  # fmt: skip


def write_recipe(root, recipe, names=None, **options):
    """A results folder of the settings of those names, or of all; files are named as recipes/run.py does."""
    folder = root / recipe
    folder.mkdir(parents=True, exist_ok=True)
    for order, setting in enumerate(SETTINGS):
        if names is None or setting[0] in names:
            file = f"{options['model']}.{setting[0]}.json" if "model" in options else f"{setting[0]}.json"
            (folder / file).write_text(json.dumps(result(setting, order, **options)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def settings():
    """The settings as tuples: name, family, method, options, key bits, value bits, mean KL."""
    return SETTINGS


@pytest.fixture(scope="session", name="write_recipe")
def write_recipe_fixture():
    """``write_recipe(root, recipe, names, **changes)``: a results folder of some settings or of all."""
    return write_recipe


@pytest.fixture(scope="session")
def panel():
    """Some of what a perturbation panel holds."""
    return {
        "correlations": {
            "all": {"perturbations": 7, "key_mse": {"spearman": 0.125}, "fisher_error": {"spearman": 0.875}}
        },
        "counterexamples": {"pairs": [{"bits": 3.0, "a": {"name": "A"}, "b": {"name": "B"}, "heads": 0.75}]},
        "null_space": [{"name": "<null>", "relative_key_mse": 10.0, "score_error": None, "attention_kl": 1e-13}],
    }
