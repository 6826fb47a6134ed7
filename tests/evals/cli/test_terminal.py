"""Commands as a shell runs them: what a terminal shows, what Ctrl-C does, who reads only the first line."""

import os
import signal
import subprocess
import sys
import time

import pytest

pty = pytest.importorskip("pty")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
HEADQ = [sys.executable, "-m", "headq_ao.evals.cli"]
LONG = ["--row-length", "512", "--rows", "60", "--batch-size", "1", "--prefill", "64", "--chunk", "1"]


def in_terminal(arguments, **environment):
    """Exit code, and all that a terminal was sent."""
    ours, theirs = pty.openpty()
    own = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen([*HEADQ, *arguments], stdout=theirs, stderr=theirs, env=own | environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # its end, on Linux
                part = b""
            if not part:
                break
            shown += part
    os.close(ours)
    return process.returncode, shown.decode()


@pytest.mark.parametrize(
    ("environment", "rich"), [({"TERM": "xterm-256color"}, True), ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False)]
)
def test_rich_text_on_a_terminal_and_without_no_color(environment, rich, tiny_folder):
    pytest.importorskip("rich")
    code, shown = in_terminal(["estimate", str(tiny_folder)], **environment)
    assert code == 0 and "near_lossless" in shown
    assert ("\x1b[" in shown) == rich and ("─" in shown) == rich
    assert not rich or "\x1b[1mbalanced " in shown  # the default is set off
    code, shown = in_terminal(["estimate", str(tiny_folder / "config.json")], **environment)
    assert code == 2 and ("\x1b[1;31mheadq:" in shown) == rich and "got the file" in shown


def test_plain_text_in_a_pipe(tiny_folder):
    done = subprocess.run([*HEADQ, "estimate", str(tiny_folder)], capture_output=True, text=True, check=True)
    assert "\x1b[" not in done.stdout + done.stderr and done.stdout.startswith("cache ")


@pytest.fixture
def interruptible():
    """Children heed Ctrl-C, where these tests were started in the background too, whose shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("arguments", "under_way"),
    [
        (["calibrate", "--tokens", "200000", "-o", "c.safetensors"], "calibrate: "),
        (["eval", "--calibration", "none", *LONG], "exact"),
        (["compare", "--calibration", "none", "--method", "headq", *LONG], "exact"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_ctrl_c(arguments, under_way, tiny_folder, text_file, tmp_path):
    """In the midst of the work: 130, one line, no traceback, no result."""
    command = [*HEADQ, arguments[0], str(tiny_folder), "--text", str(text_file(tokens=200_000)), *arguments[1:]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True
    ) as process:
        os.set_blocking(process.stderr.fileno(), False)
        told, start = b"", time.monotonic()
        while under_way.encode() not in told and process.poll() is None and time.monotonic() - start < 120:
            told += process.stderr.read() or b""
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        os.set_blocking(process.stderr.fileno(), True)
        out, rest = process.communicate(timeout=120)
    told = (told + rest).decode()
    assert process.returncode == 130, told
    assert told.rstrip().endswith("headq: interrupted") and "Traceback" not in told and out == b""
    assert not (tmp_path / "c.safetensors").exists()


def test_who_has_read_enough(tiny_folder):
    """``headq … | head`` is no error to be told."""
    with subprocess.Popen(
        [*HEADQ, "estimate", str(tiny_folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 1 and len(told.splitlines()) == 1 and "layers with a KV cache" in told
