"""The file that a calibration is kept in: what it holds, and what of it is refused."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from headq_ao import Calibration
from headq_ao.files import checksum
from headq_ao.statistics.moments import TENSORS
from tests.calibration.moments import assert_same, small_calibration


@pytest.fixture
def made():
    return small_calibration()


@pytest.mark.parametrize("as_path", [str, lambda p: p])
def test_save_and_load(made, tmp_path, as_path):
    path = as_path(tmp_path / "made.safetensors")
    made.save(path)
    assert_same(Calibration.load(path), made)


def test_saving_over_a_file_that_was_loaded(made, tmp_path):
    path = tmp_path / "c.safetensors"
    made.save(path)
    loaded = Calibration.load(path)
    Calibration([], {}).save(path)
    assert_same(loaded, made)
    assert Calibration.load(path).layers == []


def test_the_file_is_plain_safetensors(made, tmp_path, monkeypatch):
    """Nothing in it is code: torch.load and pickle are not used to read it."""
    path = tmp_path / "c.safetensors"
    made.save(path)
    assert set(safetensors.torch.load_file(path)) == {f"{i}.{name}" for i in range(2) for name in TENSORS}

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("pickle.loads", "pickle.load", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    assert_same(Calibration.load(path), made)


def test_a_pickle_is_not_loaded(tmp_path):
    path = tmp_path / "c.safetensors"
    torch.save({"layers": []}, path)
    with pytest.raises(ValueError, match="is not a usable headq_ao calibration"):
        Calibration.load(path)


def rewrite(path, change=None, drop=(), edit=None, signed=True):
    """The file with another description, other tensors or without some; ``signed``: with a checksum that fits."""
    with safetensors.safe_open(path, "pt") as f:
        metadata = dict(f.metadata())
    tensors = {n: t.clone() for n, t in safetensors.torch.load_file(path).items() if n not in drop}
    if edit:
        edit(tensors)
    head = json.loads(metadata["headq_calibration"])
    text = change(head) if change else head
    metadata["headq_calibration"] = text if isinstance(text, str) else json.dumps(text)
    if signed:
        metadata["headq_sha256"] = checksum(metadata["headq_calibration"], tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def without(head, key):
    return {k: v for k, v in head.items() if k != key}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), ""),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:40]), ""),
    "truncated body": (lambda p: p.write_bytes(p.read_bytes()[:-4]), ""),
    "longer body": (lambda p: p.write_bytes(p.read_bytes() + b"0000"), ""),
    "flipped header": (lambda p: p.write_bytes(p.read_bytes().replace(b"F32", b"F99", 1)), ""),
    "flipped last bit": (lambda p: flip(p, -1), "its checksum does not fit its content"),
    "text": (lambda p: p.write_text("0123456789" * 9), ""),
    "other safetensors": (
        lambda p: safetensors.torch.save_file({"w": torch.ones(1)}, p),
        "no headq_calibration entry; make one with calibrate",
    ),
    "newer": (lambda p: rewrite(p, lambda h: h | {"version": 99}), "version 99 is newer than .*; update headq_ao"),
    "older": (
        lambda p: rewrite(p, lambda h: h | {"version": 1}),
        "version 1 is older than .*; make one with calibrate",
    ),
    "uniform moments alone": (  # what headq_ao wrote before it weighted them by attention
        lambda p: rewrite(
            p, lambda h: h | {"version": 2}, drop=[f"{i}.{n}" for i in (0, 1) for n in TENSORS if "seen" in n]
        ),
        "version 2 is older than .*; make one with calibrate",
    ),
    "no seen moments": (lambda p: rewrite(p, drop=("0.q_seen_outer",)), "it has no '0.q_seen_outer'"),
    "a scalar for each layer": (
        lambda p: rewrite(p, edit=lambda t: t.update({"1.v_seen": torch.ones(1)})),
        r"layer 1: v_seen must be \(2,\), got \(1,\)",
    ),
    "older, no checksum yet": (lambda p: rewrite(p, lambda h: h | {"version": 1}, signed=False), "version 1 is older"),
    "no version": (lambda p: rewrite(p, lambda h: without(h, "version")), "version"),
    "a version of another kind": (lambda p: rewrite(p, lambda h: h | {"version": "2"}), "no version, got '2'"),
    "no fingerprint": (lambda p: rewrite(p, lambda h: without(h, "fingerprint")), "it has no 'fingerprint'"),
    "another fingerprint": (
        lambda p: rewrite(p, lambda h: h | {"fingerprint": {}}, signed=False),
        "it was changed or damaged; make one with",
    ),
    "another number": (lambda p: rewrite(p, edit=lambda t: t["0.k_sum"].mul_(1.5), signed=False), "changed or damaged"),
    "no JSON": (lambda p: rewrite(p, lambda h: "{"), ""),
    "another JSON": (lambda p: rewrite(p, lambda h: [1]), ""),
    "layers of another kind": (lambda p: rewrite(p, lambda h: h | {"layers": [3]}), ""),
    "no tokens": (lambda p: rewrite(p, lambda h: h | {"layers": [{"tokens": 0, "groups": 1}] * 2}), "layer 0: tokens"),
    "more layers": (lambda p: rewrite(p, lambda h: h | {"layers": h["layers"] * 2}), "2.q_outer"),
    "fewer layers": (lambda p: rewrite(p, lambda h: h | {"layers": h["layers"][:1]}), "tensors that no layer has: 1.k"),
    "a lost tensor": (lambda p: rewrite(p, drop=("1.v_sum",)), "it has no '1.v_sum'"),
    "another shape": (
        lambda p: rewrite(p, edit=lambda t: t.update({"1.q_outer": torch.ones(1, 4, 4)})),
        r"layer 1: q_outer must be \(2, 4, 4\), got \(1, 4, 4\)",
    ),
    "not finite": (lambda p: rewrite(p, edit=lambda t: t["1.v_outer"].fill_(torch.nan)), "v_outer must hold finite"),
    "another dtype": (lambda p: rewrite(p, edit=lambda t: t.update({"0.v_sum": torch.ones(2, 4).half()})), "float32"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(made, tmp_path, name):
    path = tmp_path / "c.safetensors"
    made.save(path)
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(ValueError, match=f"c.safetensors' is not a usable headq_ao calibration: .*{message}"):
        Calibration.load(path)


def framed(layers, segment_tokens):
    return [{**without(x, "segment_tokens"), **segment_tokens} for x in layers]


def test_files_say_whether_keys_are_in_the_frame_of_their_segment(made, tmp_path):
    """Those of version 4 do not, and their keys are not."""
    path, layers = tmp_path / "c.safetensors", [dataclasses.replace(x, segment_tokens=512) for x in made.layers]
    Calibration(layers, made.fingerprint, made.meta).save(path)
    assert [x.segment_tokens for x in Calibration.load(path).layers] == [512, 512]
    rewrite(path, lambda h: h | {"layers": framed(h["layers"], {})})
    with pytest.raises(ValueError, match="segment_tokens must be a whole number of at least 0, got 'left out'"):
        Calibration.load(path)
    rewrite(path, lambda h: h | {"version": 4, "layers": framed(h["layers"], {})})
    assert [x.segment_tokens for x in Calibration.load(path).layers] == [0, 0]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no calibration file at '.*nowhere'; make one with calibrate"):
        Calibration.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a folder, not a calibration file"):
        Calibration.load(tmp_path)


def test_no_folder(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*gone' to write 'c.safetensors' to; create it first"):
        made.save(tmp_path / "gone" / "c.safetensors")


def test_another_model(made):
    made.check_model(made.fingerprint)
    made.check_model(made.fingerprint | {"weights": [0.1002, 0.2495]})
    made.check_model({k: v for k, v in made.fingerprint.items() if k != "weights"})
    with pytest.raises(ValueError, match="made on another model: layers is 3 here and 2 there; run calibrate on this"):
        made.check_model(made.fingerprint | {"layers": 3})
    with pytest.raises(ValueError, match="another model: its weights differ; run"):
        made.check_model(made.fingerprint | {"weights": [0.1, 0.26]})
    with pytest.raises(ValueError, match="head_dim is 64 here and None there"):
        made.check_model(made.fingerprint | {"head_dim": 64})
