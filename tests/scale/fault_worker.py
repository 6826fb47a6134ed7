"""Runs in a process of its own: ``fault_worker.py CASE FOLDER``. Children are forked, so that Python starts once."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from headq_ao import Calibration, HeadQCache, calibrate, headq_config, quantize_
from tests.conftest import build_tiny

IDS = torch.randint(3, 128, (1, 400), generator=torch.Generator().manual_seed(0))


def prepared():
    model = build_tiny(head_dim=64)
    quantize_(model, headq_config(warmup_tokens=64, residual_length=32, block_size=16))
    return model


@torch.no_grad()
def filled(model, tokens):
    cache = HeadQCache(model)
    model(IDS[:, :tokens], cache=cache)
    return cache


def killed(work, delay):
    """Run ``work`` in a child and kill it."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the child ended before it was killed"


def kill_during_save(folder):
    """Two writers of one name, killed at 20 random moments: the file is always one of the two, whole."""
    model, delays = prepared(), random.Random(0)
    caches = [filled(model, n) for n in (300, 400)]
    calibrations = [calibrate(model, [IDS[:, :n]], n_rows=4096, progress=False) for n in (300, 400)]
    cache_path, calibration_path = folder / "cache", folder / "calibration"
    caches[0].save(cache_path)
    calibrations[0].save(calibration_path)

    def work():
        while True:
            for cache, calibration in zip(caches, calibrations, strict=True):
                cache.save(cache_path)
                calibration.save(calibration_path)

    left = 0
    for _ in range(20):
        killed(work, delays.uniform(0.01, 0.25))
        assert HeadQCache.load(cache_path, model).get_seq_length() in (300, 400)
        assert Calibration.load(calibration_path).meta["tokens"] in (300, 400)
        for path in folder.glob(".headq-*.tmp"):
            path.unlink()
            left += 1
    assert left, "no kill came in the middle of a save: this test shows nothing"


def kill_during_generation(folder):
    """A process that generates on a stored prompt and is killed leaves the file, and others go on from it."""
    model = prepared()
    cache = filled(model, 300)
    cache.save(folder / "cache")

    def work():
        mine = HeadQCache.load(folder / "cache", model)
        while True:
            model.generate(IDS[:, :310], max_new_tokens=500, do_sample=False, cache=mine, pad_token_id=0)

    for delay in (0.05, 0.2, 0.4):
        killed(work, delay)
    with torch.no_grad():
        loaded = HeadQCache.load(folder / "cache", model)
        assert torch.equal(model(IDS[:, 300:301], cache=loaded).logits, model(IDS[:, 300:301], cache=cache).logits)
    assert os.listdir(folder) == ["cache"]


def disk_full(folder):
    """A limit on the size of files stands for the disk: each save fails with OSError and leaves the old file alone."""
    model = prepared()
    cache, calibration = filled(model, 300), calibrate(model, [IDS], progress=False)
    for name, one, larger in (("cache", cache, filled(model, 400)), ("calibration", calibration, calibration)):
        one.save(folder / name)
        before = (folder / name).read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        told = ""
        try:
            larger.save(folder / name)
        except OSError as error:
            told = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot write" in told and "what was there before is unchanged" in told, told
        assert (folder / name).read_bytes() == before
    assert sorted(os.listdir(folder)) == ["cache", "calibration"]
    larger.save(folder / "calibration")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {f.__name__: f for f in (kill_during_save, kill_during_generation, disk_full)}[sys.argv[1]](Path(sys.argv[2]))
