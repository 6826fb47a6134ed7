"""Where compiled kernels are kept: found again without a compiler, rebuilt when damaged, and said aloud."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from headq_ao.ops import cpu_build
from headq_ao.ops.error_feedback import cpu_kernel

try:
    cpu_build.compiler()
except (OSError, ValueError):
    pytest.skip("no C++ compiler", allow_module_level=True)

SOURCE = 'extern "C" int answer() { return %d; }'


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernel" / "cpu_kernel.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE % 42)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, in a process that has said nothing yet."""
    monkeypatch.setenv("HEADQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("HEADQ_CPU_KERNEL", raising=False)
    monkeypatch.setattr(cpu_build, "_announced", [])
    return tmp_path / "cache"


@pytest.fixture
def compiled(source, cache):
    """The one library in the folder."""
    assert answer(source) == 42
    (path,) = cache.iterdir()
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    """A function that takes compilers off the path, as in a slim container."""

    def remove():
        monkeypatch.setenv("PATH", "/nonexistent")
        monkeypatch.delenv("CXX", raising=False)

    return remove


def answer(source):
    lib = cpu_build.load.__wrapped__(source)
    return None if lib is None else lib.answer()


def test_found_without_a_compiler(source, compiled, no_compiler):
    no_compiler()
    assert answer(source) == 42


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "'unfinished", "/"])
def test_found_whatever_the_compiler_is(source, compiled, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert answer(source) == 42


@pytest.mark.parametrize("cores", [1, 2, 96])
def test_the_number_of_cores_is_no_part_of_the_cpu(monkeypatch, cores):
    core = "processor\t: {}\nmodel name\t: A CPU\ncpu MHz\t: {}.1\nflags\t\t: fpu avx2\n\n"
    whole = "".join(core.format(i, i) for i in range(cores))
    monkeypatch.setattr(Path, "read_text", lambda self: whole)
    assert cpu_build.cpu_name().splitlines()[1:] == ["flags\t\t: fpu avx2", "model name\t: A CPU"]


@pytest.mark.parametrize(
    "lines",
    [
        "model name\t: A CPU\nflags\t\t: fpu",
        "model name\t: B CPU\nflags\t\t: fpu avx2",
        "Features\t: fp asimd sve\nCPU part\t: 0xd40",
        "Features\t: fp asimd sve\nCPU part\t: 0xd4f",
    ],
)
def test_nothing_of_another_cpu_is_loaded(source, compiled, monkeypatch, no_compiler, lines):
    no_compiler()
    monkeypatch.setattr(Path, "read_text", lambda self: lines)
    with pytest.warns(UserWarning, match=r"no compiled CPU kernel.*reference serves: no C\+\+ compiler found"):
        assert answer(source) is None


def test_nothing_of_another_source_is_loaded(source, compiled):
    source.write_text(SOURCE % 43)
    assert answer(source) == 43


def flipped(data):
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


DAMAGE = {"empty": lambda data: b"", "cut": lambda data: data[:-100], "flipped": flipped}


def damage(path, how):
    """Put a damaged copy in a library's place; the process may have the library itself open."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(DAMAGE[how](data))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_library_is_compiled_again(source, compiled, no_compiler, name):
    sound = compiled.read_bytes()
    damage(compiled, name)
    assert answer(source) == 42
    assert compiled.read_bytes() == sound
    damage(compiled, name)
    no_compiler()
    with pytest.warns(UserWarning, match=rf"{compiled} is damaged; no C\+\+ compiler found \(set CXX\)"):
        assert answer(source) is None


@pytest.mark.parametrize("name", ["kernel-{tag}.so", "kernel-{tag}-0123456789abcdef.so", "other.so"])
def test_files_that_are_no_sound_library_are_not_loaded(source, compiled, monkeypatch, no_compiler, name):
    """Such as one of an older version, which had no checksum in its name."""
    tag = compiled.stem.split("-")[1]
    compiled.rename(compiled.with_name(name.format(tag=tag)))
    no_compiler()
    with pytest.warns(UserWarning, match="no compiled CPU kernel"):
        assert answer(source) is None


def test_a_library_that_this_system_cannot_load_is_compiled_beside_it(source, cache, no_compiler, monkeypatch):
    """As one that needs another C library: its bytes are sound."""
    assert answer(source) == 42
    (path,) = cache.iterdir()
    other = cache / "made elsewhere"
    other.write_bytes(b"for another system")
    other.rename(cache / f"{path.stem.rpartition('-')[0]}-{cpu_build.checksum(other)}.so")
    path.unlink()
    assert answer(source) == 42
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-compiler -v", "no C\\+\\+ compiler 'no-such-compiler', which CXX names"),
        ("false", "false failed: exit status 1"),
        ("true", "kernel-[0-9a-f]*.so: cannot open shared object file"),
        ("g++ --no-such-option", "g\\+\\+ failed: .*no-such-option"),
        ("'unfinished", 'CXX="\'unfinished" is no command: No closing quotation'),
        ("/", "no C\\+\\+ compiler '/'"),
        ("cat", "cat failed"),
    ],
)
def test_a_broken_compiler_is_one_warning(source, cache, monkeypatch, command, message):
    monkeypatch.setenv("CXX", command)
    with pytest.warns(UserWarning, match=f"headq_ao: no compiled CPU kernel, .*: .*{message}") as seen:
        assert answer(source) is None
    assert len(seen) == 1
    assert not cache.exists() or not list(cache.iterdir())


def test_no_compiler_is_one_warning(source, cache, no_compiler):
    no_compiler()
    with pytest.warns(UserWarning, match=r"reference serves: no C\+\+ compiler found \(set CXX\)$") as seen:
        assert answer(source) is None
    assert len(seen) == 1 and not cache.exists()


def a_file(folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("")


def read_only(folder):
    folder.mkdir()
    folder.chmod(0o500)


@pytest.mark.parametrize("make", [a_file, read_only])
def test_a_folder_that_cannot_be_written(source, cache, make, tmp_path, monkeypatch):
    if make is read_only and os.geteuid() == 0:
        monkeypatch.setattr(cpu_build.tempfile, "TemporaryDirectory", refusing(cpu_build.tempfile.TemporaryDirectory))
    make(cache)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(cpu_build.tempfile, "tempdir", str(temporary))
    with pytest.warns(
        UserWarning, match=rf"cannot be kept, so each process compiles them again: {cache}: .*HEADQ_CACHE"
    ) as w:
        assert answer(source) == 42
    assert len(w) == 1 and not list(temporary.iterdir())


def refusing(real):
    """What the file system does to other users than root."""

    def make(prefix, dir=None):
        if dir is not None:
            raise PermissionError(13, "Permission denied", str(dir))
        return real(prefix=prefix)

    return make


def test_a_read_only_folder_that_has_it(source, compiled, no_compiler):
    compiled.chmod(0o400)
    compiled.parent.chmod(0o500)
    no_compiler()
    assert answer(source) == 42
    compiled.parent.chmod(0o700)


@pytest.mark.parametrize("temporary", [False, True])
def test_no_home(source, monkeypatch, temporary):
    for name in ("HEADQ_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry in /etc/passwd
    with pytest.raises(FileNotFoundError, match="no home folder to keep files in; set HEADQ_CACHE_DIR"):
        cpu_build.cache_folder()
    if temporary:
        with pytest.warns(UserWarning, match="cannot be kept.*there is no home folder"):
            assert answer(source) == 42
    else:
        monkeypatch.setattr(cpu_build.tempfile, "TemporaryDirectory", full_disk)
        with pytest.warns(UserWarning, match="no compiled CPU kernel.*no home folder.*No space left"):
            assert answer(source) is None
    assert not Path("~").exists()


def full_disk(**_):
    raise OSError(28, "No space left on device")


def test_a_home_in_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HEADQ_CACHE_DIR", "~/kernels")
    assert cpu_build.cache_folder() == tmp_path / "kernels"
    monkeypatch.setenv("HEADQ_CACHE_DIR", "kernels")
    assert cpu_build.cache_folder() == Path.cwd() / "kernels"


def test_turned_off(source, compiled, monkeypatch):
    monkeypatch.setenv("HEADQ_CPU_KERNEL", "0")
    assert answer(source) is None


def test_compiling_is_announced_once(source, cache, caplog):
    """At a level that is shown where nobody has set up logging."""
    with caplog.at_level(logging.WARNING, "headq_ao"):
        assert answer(source) == 42
        source.write_text(SOURCE % 7)
        assert answer(source) == 7
        assert answer(source) == 7
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(cache) in record.getMessage()
    assert "compiles its CPU kernels" in record.getMessage()


def test_what_is_kept_is_not_announced(source, compiled, caplog, monkeypatch):
    monkeypatch.setattr(cpu_build, "_announced", [])
    caplog.clear()
    assert answer(source) == 42
    assert not caplog.records


def test_the_folder_does_not_grow_without_end(source, cache):
    cache.mkdir()
    for i in range(cpu_build.KEPT + 5):
        path = cache / f"kernel-{i:016x}-{i:016x}.so"
        path.write_bytes(b"")
        os.utime(path, (i, i))
    for name, age in (("building-old", cpu_build.STALE + 60), ("building-new", 60)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    others = ("feedback-0123456789abcdef-0123456789abcdef.so", "small-model.so")
    for name in others:
        (cache / name).write_bytes(b"")
        os.utime(cache / name, (0, 0))
    assert answer(source) == 42
    names = {path.name for path in cache.iterdir()}
    assert names >= {*others, "building-new"} and "building-old" not in names
    kept = {name for name in names if name.startswith("kernel-")}
    assert len(kept) == cpu_build.KEPT and f"kernel-{5:016x}-{5:016x}.so" not in kept


def test_the_file_is_whole_when_it_has_its_name(source, cache, monkeypatch):
    """It is compiled, and loaded once, elsewhere."""
    load = ctypes.CDLL

    def watched(path):
        assert not [p for p in cache.iterdir() if p.suffix == ".so"]
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", watched)
    assert answer(source) == 42


def test_threads_compile_once(source, cache, monkeypatch):
    runs, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (runs.append(args), run(*args, **kwargs))[1])
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(answer(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [42] * 4 and len(runs) == 1


@pytest.mark.slow
def test_in_processes(tmp_path):
    """With the feedback kernel: one compiles and says so, the next, without a compiler, finds it and says nothing."""
    code = f"""
import sys
from pathlib import Path
from headq_ao.ops import cpu_build
print(cpu_build.load(Path({str(Path(cpu_kernel.__file__).with_name("cpu_kernel.cpp"))!r})) is not None)
"""

    def python(**environment):
        command = [sys.executable, "-W", "default:headq_ao", "-c", code]
        env = os.environ | {"HEADQ_CACHE_DIR": str(tmp_path / "cache")} | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True)
        return done.stdout.strip(), [line for line in done.stderr.splitlines() if "headq_ao" in line]

    found, said = python()
    assert found == "True" and len(said) == 1 and "compiles its CPU kernels" in said[0]
    (path,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    assert python(PATH="/nonexistent") == ("True", [])
    damage(path, "cut")
    found, said = python(PATH="/nonexistent")
    assert found == "False" and len([x for x in said if "UserWarning" in x]) == 1 and "is damaged" in said[0]
