"""Files are written whole or not at all, where a path and its links lead, and are checked before they are read."""

import errno
import os
import stat

import pytest
import safetensors.torch

from headq_ao import Calibration
from headq_ao.files import atomic_path
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
