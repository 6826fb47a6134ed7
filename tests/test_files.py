"""Files are written whole or not at all, where a path and its links lead, and are checked before they are read."""

import errno
import json
import os
import stat

import pytest
import safetensors.torch
import torch

from headq_ao import Calibration
from headq_ao.files import FileKind, atomic_path, checksum, tensor_bytes
from tests.calibration.moments import small_calibration


def test_the_file_is_readable_to_others(tmp_path):
    """As any file one writes: what the umask leaves."""
    (tmp_path / "plain").write_text("")
    small_calibration().save(tmp_path / "c.safetensors")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "c.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("when", ["writing", "replacing"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, when):
    path = tmp_path / "c.safetensors"
    small_calibration().save(path)
    before = path.read_bytes()

    def half_written(tensors, target, metadata):
        with open(target, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    def fail(*args):
        raise OSError("disk full")

    if when == "writing":
        monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Calibration([], {}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


# Symbolic links
@pytest.mark.parametrize("kind", ["absolute", "relative", "other folder", "chain", "dangling", "linked folder"])
def test_a_link_is_kept_and_followed(tmp_path, kind):
    calibration, other = Calibration([], {"model_type": "none"}), tmp_path / "other"
    other.mkdir()
    real, link = tmp_path / "real", tmp_path / "link"
    if kind in ("other folder", "linked folder"):
        real = other / "real"
    if kind != "dangling":
        Calibration([], {"model_type": "old"}).save(real)
    if kind == "chain":
        (other / "middle").symlink_to("../real")
        link.symlink_to("other/middle")
    elif kind == "linked folder":
        (tmp_path / "folder").symlink_to("other")
        link = tmp_path / "folder" / "real"
    else:
        link.symlink_to(real if kind in ("absolute", "dangling") else os.path.relpath(real, tmp_path))
    links = {p: os.readlink(p) for p in tmp_path.rglob("*") if p.is_symlink()}
    calibration.save(link)
    assert {p: os.readlink(p) for p in tmp_path.rglob("*") if p.is_symlink()} == links
    assert not real.is_symlink()
    for path in (real, link):
        assert Calibration.load(path).fingerprint == calibration.fingerprint
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".headq")]


def test_links_that_lead_nowhere(tmp_path):
    calibration = Calibration([], {})
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("gone/file")
    (tmp_path / "d").symlink_to(".")
    for name, error, message in (
        ("a", OSError, "a': it is a symbolic link that leads in a circle"),
        ("c", FileNotFoundError, r"no folder '.*gone' to write 'file' \(which '.*c' links to\) to; create it first"),
        ("d", IsADirectoryError, "d'.* is a folder"),
    ):
        with pytest.raises(error, match=message):
            calibration.save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """Found before anything is written, and both the file and the folder of the link's target are named."""
    real = tmp_path / "closed" / "real"
    real.parent.mkdir()
    Calibration([], {"model_type": "old"}).save(real)
    (tmp_path / "link").symlink_to("closed/real")
    real_open = open

    def closed(path, mode="r", *args, **kwargs):
        if "x" in mode and os.path.dirname(path) == str(real.parent):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(
        PermissionError, match=r"cannot write '.*link': no file can be made in '.*closed' .Permission"
    ) as e:
        Calibration([], {}).save(tmp_path / "link")
    assert e.value.errno == errno.EACCES
    assert Calibration.load(tmp_path / "link").fingerprint == {"model_type": "old"}
    assert os.listdir(real.parent) == ["real"]


def test_a_failure_leaves_target_and_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")

    def fail():
        with atomic_path(tmp_path / "link") as temporary:
            with open(temporary, "w") as f:
                f.write("half")
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "link").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["link", "real"]


KIND = FileKind("made thing", 5, "make one with made()", oldest=3)


def test_a_head_and_tensors_come_back(tmp_path):
    """Plain data and any dtype, contiguous or not; the version is in the head."""
    tensors = {"a": torch.arange(6).view(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.empty(0)}
    KIND.save(tmp_path / "x", {"list": [1, None, "ü"]}, tensors)
    head, found = KIND.load(tmp_path / "x")
    assert head == {"version": 5, "list": [1, None, "ü"]}
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], x) for n, x in tensors.items())
    assert KIND.entry == "headq_made_thing"


def test_numbers_that_are_none_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float values"):
        KIND.save(tmp_path / "x", {"error": float("nan")}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (6, "version 6 is newer than 5, which this headq_ao reads; update headq_ao"),
        (2, "version 2 is older than 3, which this headq_ao reads; make one with made"),
        (True, "its header has no version, got True; make one with made"),
        (None, "its header has no version, got None"),
        (3, None),
        (5, None),
    ],
)
def test_versions_that_are_read(version, message):
    metadata = {KIND.entry: json.dumps({"version": version})}
    if message is None:
        assert KIND.head(metadata) == {"version": version}
        return
    with pytest.raises(ValueError, match=message):
        KIND.head(metadata)
    if version == 2:
        with pytest.raises(ValueError, match="version 4 is older than 5"):
            FileKind("made thing", 5, "").head({KIND.entry: json.dumps({"version": 4})})


def test_another_kind_of_file_is_called_by_its_name(tmp_path):
    FileKind("other thing", 1, "").save(tmp_path / "x", {}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="has no headq_made_thing entry: it is a other thing; make one with made"):
        KIND.load(tmp_path / "x")
    for path, message in ((tmp_path, "is a folder, not a made thing file"), (tmp_path / "y", "no made thing file at")):
        with pytest.raises(FileNotFoundError, match=message):
            KIND.load(path)


def test_the_checksum_counts_all_there_is():
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, dtype=torch.int32)}
    others = [
        ("h2", x), ("h", {"a": x["a"]}), ("h", {"a": x["a"], "c": x["b"]}), ("h", {"a": x["b"], "b": x["a"]}),
        ("h", x | {"b": torch.zeros(2)}), ("h", x | {"b": x["b"][None]}), ("h", x | {"a": torch.tensor([1.0, -2.0])}),
    ]  # fmt: skip
    sums = {checksum(head, tensors) for head, tensors in [("h", x), *others]}
    assert len(sums) == 1 + len(others)
    assert (
        checksum("h", dict(reversed(x.items())))
        == checksum("h", x)
        == checksum("h", {n: t.clone() for n, t in x.items()})
    )


def test_bytes_are_in_row_major_order():
    x = torch.arange(6, dtype=torch.int16).view(2, 3)
    assert bytes(tensor_bytes(x.t())) == b"\0\0\3\0\1\0\4\0\2\0\5\0"


def test_what_goes_wrong_within_is_said_of_the_file():
    for error, message in ((KeyError("a"), "it has no 'a'"), (TypeError("kind"), "kind")):
        with (
            pytest.raises(ValueError, match=f"'path' is not a usable headq_ao made thing: {message}"),
            KIND.refusing("path"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="other"), KIND.refusing("path"):
        raise RuntimeError("other")
