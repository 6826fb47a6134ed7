"""What a config accepts, what it says otherwise, and its way through torchao's JSON."""

import copy
import dataclasses
import enum
import inspect
import itertools
import json
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torchao.core.config import config_from_dict, config_to_dict

from headq_ao import Calibration, HeadQCache, HeadQConfig, headq_config, quantize_
from headq_ao.config import PRESETS
from headq_ao.statistics.moments import TENSORS, LayerMoments

WHOLE = "must be a whole number of at least"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_bits": 7}, "k_bits must be 1, 2, 3, 4, 5, 6 or 8, or None (exact), got 7"),
        ({"k_bits": 2.5}, "k_bits must be 1, 2, 3, 4, 5, 6 or 8, or None (exact), got 2.5"),
        ({"k_bits": "2"}, "or None (exact), got '2'"),
        ({"k_bits": float("nan")}, "or None (exact), got nan"),
        ({"v_bits": 0}, "v_bits must be 1, 2, 3, 4, 5, 6 or 8, or None (exact), got 0"),
        ({"v_bits": 16}, "v_bits must be 1, 2, 3, 4, 5, 6 or 8, or None (exact), got 16"),
        ({"k_bits": None, "v_bits": None}, "both None: nothing would be packed; give at least one of them"),
        ({"block_size": 48}, "block_size must be 16, 32, 64 or 128, got 48"),
        ({"block_size": "32"}, "block_size must be 16, 32, 64 or 128, got '32'"),
        ({"v_bits": 3, "block_size": 16}, "block_size must be a multiple of 32 with v_bits=3, got 16"),
        ({"key_codec": "kivi"}, "key_codec must be one of 'whitened', 'affine', got 'kivi'"),
        ({"value_codec": None}, "value_codec must be one of 'whitened', 'affine', got None"),
        (
            {"basis": "pca"},
            "basis must be one of 'query_pca', 'score_optimal', 'key_pca', 'random', got 'pca'",
        ),
        ({"adapt": None}, "adapt must be one of 'off', 'prompt', got None"),
        ({"side_bits": 0}, "side_bits must be 1, 2, 3, 4, 5, 6 or 8, got 0; rank=0 for none"),
        ({"side_bits": None}, "side_bits must be 1, 2, 3, 4, 5, 6 or 8, got None; rank=0 for none"),
        ({"sign": 0}, "sign must be 1 or -1, got 0"),
        ({"k_bits": True}, "or None (exact), got True"),
        ({"v_bits": 2.0}, "or None (exact), got 2.0"),
        ({"side_bits": 2.0}, "got 2.0; rank=0 for none"),
        ({"block_size": 32.0}, "16, 32, 64 or 128, got 32.0"),
        ({"sign": True}, "sign must be 1 or -1, got True"),
        ({"whitening": 1.5}, "whitening must be a number from 0 to 1, got 1.5"),
        ({"whitening": -0.1}, "whitening must be a number from 0 to 1, got -0.1"),
        ({"whitening": float("nan")}, "whitening must be a number from 0 to 1, got nan"),
        ({"whitening": None}, "whitening must be a number from 0 to 1, got None"),
        ({"whitening": True}, "whitening must be a number from 0 to 1, got True"),
        ({"error_feedback": 1}, "error_feedback must be True or False, got 1"),
        ({"k_zero_point": True}, "k_zero_point=True needs key_codec='affine': whitened keys stand around their mean"),
        ({"v_zero_point": True}, "v_zero_point and v_group_size need value_codec='affine'"),
        ({"v_group_size": 32, "key_codec": "affine"}, "v_zero_point and v_group_size need value_codec='affine'"),
        ({"sign": -1}, "sign=-1 and basis='query_pca' shape the side code, and there is none: give rank (16, say)"),
        ({"basis": "random"}, "sign=1 and basis='random' shape the side code, and there is none"),
        ({"basis": "key_pca", "rank": 0, "key_codec": "affine"}, "basis='key_pca' shape the side code"),
        ({"seed": None}, f"seed {WHOLE} 0, got None"),
        ({"rotation": "no"}, "rotation must be True or False, got 'no'"),
        ({"k_zero_point": 1}, "k_zero_point must be True or False, got 1"),
        ({"v_zero_point": None}, "v_zero_point must be True or False, got None"),
        ({"subtract_key_mean": 0}, "subtract_key_mean must be True or False, got 0"),
        ({"unbiased_scale": "yes"}, "unbiased_scale must be True or False, got 'yes'"),
        ({"check_finite": 1}, "check_finite must be True, False or None, got 1"),
        ({"n_sink": -1}, f"n_sink {WHOLE} 0, got -1"),
        ({"n_sink": True}, f"n_sink {WHOLE} 0, got True"),
        ({"residual_length": 0}, f"residual_length {WHOLE} 1, got 0"),
        ({"residual_length": 64.0}, f"residual_length {WHOLE} 1, got 64.0"),
        ({"prior_tokens": -5}, f"prior_tokens {WHOLE} 0, got -5"),
        ({"rank": -1}, f"rank {WHOLE} 0 or None, got -1"),
        ({"warmup_tokens": 0}, f"warmup_tokens {WHOLE} 1 or None, got 0"),
        ({"v_group_size": 0}, f"v_group_size {WHOLE} 1 or None, got 0"),
        ({"calibration": 3}, "calibration must be a Calibration, the path of a saved one, or None, got"),
        ({"calibration": b"c.safetensors"}, "calibration must be a Calibration, the path of a saved one, or None, got"),
        (
            {"mean_bits": "abc"},
            "mean_bits must be a number from 1 to 8, which keys and values can have with block_size",
        ),
        ({"mean_bits": "2.25"}, "mean_bits must be a number from 1 to 8"),
        ({"mean_bits": float("nan")}, "or None, got nan"),
        ({"mean_bits": float("inf")}, "or None, got inf"),
        ({"mean_bits": -3}, "block_size=32, or None, got -3"),
        ({"mean_bits": 0}, "mean_bits must be a number from 1 to 8"),
        ({"mean_bits": 0.99}, "mean_bits must be a number from 1 to 8"),
        ({"mean_bits": 8.01}, "mean_bits must be a number from 1 to 8"),
        ({"mean_bits": 100}, "mean_bits must be a number from 1 to 8"),
        ({"mean_bits": 10**400}, "mean_bits must be a number from 1 to 8"),
        ({"mean_bits": True}, "or None, got True"),
        ({"mean_bits": np.True_}, "or None, got True"),
        ({"mean_bits": [2.25]}, "or None, got [2.25]"),
        ({"mean_bits": 2 + 0j}, "or None, got (2+0j)"),
        ({"mean_bits": torch.tensor(2.0)}, "or None, got tensor(2.)"),
        ({"mean_bits": Fraction(9, 4)}, "or None, got Fraction(9, 4)"),
        ({"mean_bits": 1.4, "block_size": 16}, "from 1.5 to 8, which keys and values can have with block_size=16, or"),
        ({"mean_bits": 1.9, "block_size": 16, "k_bits": None}, "from 2 to 8, which values can have with block_size=16"),
        ({"mean_bits": 0.5, "v_bits": None}, "from 1 to 8, which keys can have with block_size=32, or None, got 0.5"),
        ({"k_bits": np.array([2, 2])}, "k_bits must be 1, 2, 3, 4, 5, 6 or 8, or None (exact), got array([2, 2])"),
        ({"k_bits": np.float32(2)}, "or None (exact), got 2.0"),
        ({"k_bits": "balanced"}, "or None (exact), got 'balanced'"),
        ({"key_codec": ["whitened"]}, "key_codec must be one of 'whitened', 'affine', got ['whitened']"),
        ({"basis": np.array(["random", "key_pca"])}, "basis must be one of"),
        ({"version": 3}, "version must be 1 to 2, which this headq_ao reads, got 3"),
        ({"scale_bits": 12}, "scale_bits must be 8 or 16, got 12"),
        ({"scale_bits": None}, "scale_bits must be 8 or 16, got None"),
        ({"version": True}, "version must be 1 to 2, which this headq_ao reads, got True"),
        ({"version": 1.0}, "version must be 1 to 2, which this headq_ao reads, got 1.0"),
        ({"version": "1"}, "version must be 1 to 2, which this headq_ao reads, got '1'"),
        ({"seed": -1}, f"seed {WHOLE} 0, got -1"),
        ({"seed": 2**63}, f"seed must be at most {2**63 - 1}, got {2**63}"),
        ({"residual_length": 2**31}, f"residual_length must be at most {2**31 - 1}, got {2**31}"),
        ({"prior_tokens": 10**30}, f"prior_tokens must be at most {2**31 - 1}, got"),
        ({"whitening": "1"}, "whitening must be a number from 0 to 1, got '1'"),
        ({"whitening": 10**400}, "whitening must be a number from 0 to 1, got 1"),
        ({"whitening": float("inf")}, "whitening must be a number from 0 to 1, got inf"),
        ({"rotation": np.int64(1)}, "rotation must be True or False, got 1"),
        ({"sign": 1.0}, "sign must be 1 or -1, got 1.0"),
        ({"value_weight": -0.1}, "value_weight must be a number from 0 to 2147483647, or None, got -0.1"),
        ({"value_weight": "1"}, "or None, got '1'"),
    ],
    ids=str,
)
def test_values_out_of_range(options, message):
    for make in (headq_config, HeadQConfig, lambda **given: dataclasses.replace(headq_config(), **given)):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**options)


@pytest.mark.parametrize("mean", [1, 2, 2.25, 8, 8.0, np.float32(2.5), np.float64(3), np.int64(4)], ids=repr)
def test_mean_bits_that_can_be_had(mean):
    config = headq_config(mean_bits=mean)
    assert config.mean_bits == mean and type(config.mean_bits) is float


def test_numbers_of_numpy_and_subclasses_become_plain():
    """What is stored is what JSON has, so that a config equals itself after its way through a file."""

    class Text(str, enum.Enum):
        affine = "affine"

    class Number(enum.IntEnum):
        three = 3

    given = {
        "k_bits": np.int64(3), "v_bits": Number.three, "rank": np.uint8(16), "seed": np.int32(7),
        "key_codec": Text.affine, "value_codec": np.str_("affine"), "rotation": np.bool_(False),
        "whitening": np.float16(0.5), "check_finite": np.True_,
    }  # fmt: skip
    config = headq_config(**given)
    assert {name: type(getattr(config, name)) for name in given} == {
        "k_bits": int, "v_bits": int, "rank": int, "seed": int, "key_codec": str, "value_codec": str, "rotation": bool,
        "whitening": float, "check_finite": bool,
    }  # fmt: skip
    assert config == headq_config(
        k_bits=3, v_bits=3, rank=16, seed=7, key_codec="affine", value_codec="affine", rotation=False, whitening=0.5,
        check_finite=True,
    )  # fmt: skip
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


ALTERNATIVES = {
    "k_bits": [2, 3, None], "v_bits": [2, 4], "mean_bits": [None, 2.375, 3], "key_codec": ["whitened", "affine"],
    "value_codec": ["whitened", "affine"], "n_sink": [0],
}  # fmt: skip


def test_the_class_is_what_headq_config_makes():
    """Whichever options are given, and with each value of those that decide whether bits are shared."""
    seen = set()
    for values in itertools.product(*([..., *values] for values in ALTERNATIVES.values())):
        options = {name: value for name, value in zip(ALTERNATIVES, values, strict=True) if value is not ...}
        config = HeadQConfig(**options)
        assert config == headq_config(**options) == headq_config("balanced", **options)
        assert dataclasses.asdict(config).items() >= options.items()
        seen.add(config.mean_bits)
    assert seen == {None, 2.375, 3.0}
    assert HeadQConfig(3, None) == headq_config(k_bits=3, v_bits=None)


def test_defaults_can_be_read_off_the_class():
    fields = {f.name: f.default for f in dataclasses.fields(HeadQConfig)}
    assert fields == {f: getattr(HeadQConfig, f) for f in fields} == dataclasses.asdict(HeadQConfig())
    assert HeadQConfig(**fields) == HeadQConfig()
    assert "k_bits: int | None = 2, v_bits: int | None = 2, mean_bits: float | None = 2.375" in str(
        inspect.signature(HeadQConfig)
    )


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(HeadQConfig)])
def test_fields_cannot_be_assigned(name):
    config = headq_config()
    for change in (lambda: setattr(config, name, 99), lambda: delattr(config, name)):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            change()
    assert config == headq_config()


def test_replace_checks_again():
    config = headq_config(k_bits=3)
    assert dataclasses.replace(config, n_sink=0) == headq_config(k_bits=3, n_sink=0)
    assert dataclasses.replace(headq_config(), v_bits=4) == headq_config(v_bits=4, mean_bits=2.375)
    with pytest.raises(ValueError, match="k_bits must be 1, 2, 3, 4, 5, 6 or 8"):
        dataclasses.replace(config, k_bits=99)
    with pytest.raises(ValueError, match="v_zero_point and v_group_size need"):
        dataclasses.replace(config, v_zero_point=True)


@pytest.mark.parametrize(
    "make", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), dataclasses.replace]
)
@pytest.mark.parametrize("options", [{}, {"k_bits": 3}, {"mean_bits": None}], ids=str)
def test_copies_are_equal(make, options):
    config = headq_config(**options)
    made = make(config)
    assert made == config and hash(made) == hash(config) and vars(made) == vars(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.k_bits = 99


@pytest.mark.parametrize("preset", [3, "", "Balanced", ["balanced"], {}, True, ("balanced",)], ids=repr)
def test_presets_that_are_none(preset):
    with pytest.raises(ValueError, match=re.escape(f"or None, got {preset!r}")):
        headq_config(preset)


@pytest.mark.parametrize("name", ["n_sink", "residual_length", "prior_tokens"])
def test_lengths_are_not_optional(name):
    with pytest.raises(ValueError, match=f"{name} {WHOLE}"):
        headq_config(**{name: None})


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_widths(bits):
    config = headq_config(k_bits=bits, v_bits=bits, side_bits=bits)
    assert config.key_bits(64) == (bits,) * 64
    assert headq_config(k_bits=bits, side_bits=bits, rank=16).key_bits(64) == (bits,) * 80
    assert headq_config(k_bits=bits, v_bits=None).v_bits is None
    assert headq_config(k_bits=None, v_bits=bits).k_bits is None


def test_unknown_options_list_the_valid_ones():
    with pytest.raises(ValueError, match="unknown option bits, kbits; valid options are k_bits, v_bits, ") as raised:
        headq_config(kbits=2, bits=3, v_bits=2)
    for field in dataclasses.fields(HeadQConfig):
        assert field.name in str(raised.value)


def test_presets():
    with pytest.raises(
        ValueError,
        match=re.escape(
            "preset must be one of ['balanced', 'compact', 'headq_paper', 'minimal', 'near_lossless', 'quality'] or "
            "None, got 'paper'"
        ),
    ):
        headq_config("paper")
    paper = headq_config("headq_paper")
    assert (paper.basis, paper.rank, paper.side_bits, paper.k_zero_point) == ("query_pca", 8, 4, True)
    assert (paper.key_codec, paper.value_codec) == ("affine", "affine")
    assert headq_config("headq_paper", rank=4).rank == 4
    assert headq_config() == headq_config("balanced") == HeadQConfig() == HeadQConfig(mean_bits=2.375)
    assert headq_config(k_bits=3).mean_bits is None and headq_config("quality", value_codec="affine").mean_bits is None
    assert headq_config(v_bits=None, mean_bits=3.0).mean_bits == 3.0
    for name, options in PRESETS.items():
        assert dataclasses.asdict(headq_config(name)) == dataclasses.asdict(HeadQConfig(mean_bits=None)) | options


def test_a_config_from_when_all_scales_had_16_bits():
    """Of version 1, unless it says otherwise; it stays of that version."""
    old = config_to_dict(headq_config(scale_bits=16))
    del old["_data"]["scale_bits"]
    old["_data"]["version"] = 1
    assert config_from_dict(old) == HeadQConfig(version=1) == HeadQConfig(version=1, scale_bits=16)
    assert (HeadQConfig(version=1).scale_bits, HeadQConfig().scale_bits, HeadQConfig().version) == (16, 8, 2)
    assert dataclasses.replace(HeadQConfig(version=1), n_sink=0).scale_bits == 16


@pytest.mark.parametrize("options", [
    {"sign": -1, "rank": 1}, {"basis": "random", "rank": 16}, {"sign": -1, "key_codec": "affine"},
    {"basis": "score_optimal", "key_codec": "affine", "rank": None}, {"k_zero_point": True, "key_codec": "affine"},
    {"k_zero_point": True, "k_bits": None}, {"v_zero_point": True, "v_group_size": 16, "value_codec": "affine"},
    {"v_zero_point": True, "v_bits": None}, {"whitening": 0}, {"whitening": 1}, {"error_feedback": False},
], ids=str)  # fmt: skip
def test_options_that_fit_each_other(options):
    config = headq_config(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_defaults_are_the_visible_code():
    config = headq_config()
    assert (config.key_codec, config.value_codec, config.rank) == ("whitened", "whitened", None)
    assert (config.whitening, config.error_feedback, config.side_rank(64)) == (0.75, True, 0)
    assert not config.k_zero_point and not config.v_zero_point


@pytest.mark.parametrize(
    ("codec", "rank", "expected"),
    [("affine", None, 16), ("whitened", None, 0), *((c, r, r) for c in ("affine", "whitened") for r in (0, 5, 64))],
)
def test_rank(codec, rank, expected):
    config = headq_config(key_codec=codec, rank=rank, k_bits=3, side_bits=4)
    assert config.side_rank(64) == expected
    assert config.key_bits(64) == (3,) * 64 + (4,) * expected


@pytest.mark.parametrize(
    ("options", "head_dim", "expected"),
    [
        ({}, 64, 256),
        ({}, 128, 512),
        ({}, 16, 256),
        ({"warmup_tokens": 100}, 64, 128),  # whole blocks
        ({"warmup_tokens": 128, "block_size": 16}, 64, 128),
        ({"block_size": 128, "warmup_tokens": 1}, 64, 128),
    ],
)
def test_warmup_tokens(options, head_dim, expected):
    assert headq_config(**options).warmup(head_dim) == expected


@pytest.mark.parametrize(
    ("options", "head_dim", "message"),
    [
        ({}, 72, "head_dim must be a multiple of 16 up to 512, got 72"),
        ({}, 528, "head_dim must be a multiple of 16 up to 512, got 528"),
        ({"v_group_size": 32, "value_codec": "affine"}, 80, "v_group_size must divide head_dim 80, got 32"),
        ({"rank": 96}, 80, "rank must be at most head_dim 80, got 96"),
    ],
)
def test_head_dims_that_cannot_be_stored(options, head_dim, message):
    with pytest.raises(ValueError, match=message):
        headq_config(**options).check_head_dim(head_dim)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256, 512])
def test_head_dims_that_can_be_stored(head_dim):
    headq_config(value_codec="affine", v_group_size=16, rank=16).check_head_dim(head_dim)


def every_option_changed():
    """A config that differs from the default in every field, so that a lost one shows."""
    changed = headq_config(
        k_bits=3, v_bits=None, key_codec="affine", value_codec="affine", whitening=0.5, error_feedback=False,
        k_zero_point=True, v_zero_point=True, rank=8, side_bits=4,
        basis="score_optimal", sign=-1, rotation=False, subtract_key_mean=False, unbiased_scale=False, scale_bits=16,
        v_group_size=16, n_sink=0, residual_length=32, block_size=64, calibration="a/b.safetensors", adapt="prompt",
        prior_tokens=1, warmup_tokens=512, check_finite=True, seed=3, context_length=512,
        value_weight=0.5,
    )  # fmt: skip
    default = HeadQConfig()
    same = [f.name for f in dataclasses.fields(default) if getattr(changed, f.name) == getattr(default, f.name)]
    refused = ["batch_size", "cache_bytes", "codec", "codec_options", "version"]
    assert sorted(same) == refused, "HeadQ's own options are refused beside another codec, and bits beside bytes"
    return changed


def budget():
    return headq_config(cache_bytes="8GiB", context_length=512, batch_size=3)


@pytest.mark.parametrize("make", [headq_config, lambda: headq_config("headq_paper"), every_option_changed, budget])
def test_torchao_json_round_trip(make):
    config = make()
    text = json.dumps(config_to_dict(config))
    loaded = config_from_dict(json.loads(text))
    assert type(loaded) is HeadQConfig
    assert loaded == config


def test_json_written_before_classes_had_the_presets_default():
    """Each field was written then, mean_bits=None for bits that are the same everywhere; none given is the default."""
    data = config_to_dict(headq_config(mean_bits=None))
    assert data["_data"]["mean_bits"] is None and data["_data"]["k_bits"] == 2
    assert config_from_dict(json.loads(json.dumps(data))) == headq_config(k_bits=2)
    del data["_data"]["mean_bits"]
    assert config_from_dict(data) == headq_config(k_bits=2)
    assert config_from_dict(data | {"_data": {}}) == headq_config()


def test_json_with_an_unknown_field_is_refused():
    data = config_to_dict(headq_config())
    data["_data"]["k_bit"] = 2
    with pytest.raises(ValueError, match="Failed to create instance of HeadQConfig"):
        config_from_dict(data)


def test_json_with_a_value_out_of_range_is_refused():
    data = config_to_dict(headq_config())
    data["_data"]["k_bits"] = 7
    with pytest.raises(ValueError, match="k_bits must be 1, 2, 3"):
        config_from_dict(data)


def test_a_calibration_object_has_no_json():
    """Its tensors do not fit; HeadQConfig's docstring says to give a path."""
    moments = LayerMoments(1, 1, *(torch.zeros(1) for _ in TENSORS))
    config = headq_config(calibration=Calibration([moments], {}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        config_to_dict(config)
    assert "Only a path fits into JSON" in HeadQConfig.__doc__


def test_a_path_becomes_text(tmp_path):
    config = headq_config(calibration=tmp_path / "calibration.safetensors")
    assert config.calibration == str(tmp_path / "calibration.safetensors")
    assert config_to_dict(config)["_data"]["calibration"] == config.calibration


def test_each_field_is_documented():
    arguments = HeadQConfig.__doc__.split("Args:")[1]
    missing = [
        f.name for f in dataclasses.fields(HeadQConfig) if not re.search(rf"^\s+.*\b{f.name}\b.*:", arguments, re.M)
    ]
    assert missing == ["version"]


@pytest.mark.parametrize("name", ["residual_length", "n_sink", "warmup_tokens"])
@pytest.mark.parametrize("room", [32, 4096])
def test_lengths_of_any_size(tiny, token_ids, monkeypatch, name, room):
    """More exact tokens than there is memory: nothing is packed, and room is made for what comes."""
    monkeypatch.setattr("headq_ao.cache.state.ROOM", room)
    monkeypatch.setattr("headq_ao.cache.batch.ROOM", room)
    model, ids = tiny(), token_ids(2, 150)
    with torch.no_grad():
        expected = model(ids).logits
        quantize_(model, headq_config(**{name: 2**31 - 1}))
        cache = HeadQCache(model)
        logits = torch.cat([model(part, cache=cache).logits for part in ids.split([90] + [1] * 60, 1)], 1)
    assert cache.packed_fraction == 0 and (logits - expected).abs().max() < 1e-4
    assert max(t.shape[2] for t in cache.layers[0].window.tensors()) <= max(room, 150 + 150 // 8) + 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"key_codec": "visible", "value_codec": "visible"}, {"key_codec": "whitened", "value_codec": "whitened"}),
        ({"epoch_tokens": 64}, {"warmup_tokens": 64}),
        ({"key_gauge": False}, {"subtract_key_mean": False}),
    ],
    ids=str,
)
def test_old_names_are_aliases(old, new):
    for make in (headq_config, HeadQConfig):
        config = make(**old)
        assert config == make(**new) and hash(config) == hash(make(**new)) and vars(config) == vars(make(**new))
        assert dataclasses.replace(config, seed=3) == make(**new, seed=3)
    assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(ValueError, match="warmup_tokens must be"):
        headq_config(epoch_tokens=0)
