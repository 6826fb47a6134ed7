"""Where a result was measured, with what, and whether the code it describes is still the same."""

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHANGED = " **The code that it describes has changed since.**"
QUALITY = (
    "headq_ao/codecs", "headq_ao/calibration", "headq_ao/statistics", "headq_ao/cache", "headq_ao/config.py",
    "ops/encode", "ops/error_feedback", "ops/rounding.py", "evals/baselines",
)  # fmt: skip
SPEED = ("ops", "headq_ao/cache", "headq_ao/codecs", "headq_ao/integrations/transformers")
KERNELS = ("ops",)


class History:
    """What git says of the checkout at ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._changed: dict[tuple[str, tuple[str, ...]], bool] = {}
        shallow = self._git("rev-parse", "--is-shallow-repository", "--show-toplevel").stdout.split()
        self.known = shallow[:1] == ["false"] and Path(shallow[1]).resolve() == root.resolve()

    def _git(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(self.root), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=60)
        except OSError as error:  # no git
            return subprocess.CompletedProcess(command, 1, "", str(error))

    def changed(self, commit: str | None, paths: Sequence[str]) -> bool:
        """Whether those files differ from what they were at a commit; so too where it is not in this history."""
        if commit is None or self._git("merge-base", "--is-ancestor", commit, "HEAD").returncode != 0:
            return True
        key = commit, tuple(paths)
        if key not in self._changed:
            self._changed[key] = self._git("diff", "--quiet", commit, "--", *paths).returncode != 0
        return self._changed[key]


def environments(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What results say of themselves; older ones only name their versions."""
    found: list[dict[str, Any]] = []
    for result in results:
        versions = {name: result[name] for name in ("torch", "transformers") if name in result}
        commits = {entry.get("commit") for entry in result.get("classes", [])} or {None}
        bare = [{"versions": versions, "git": {"commit": c} if c else None} for c in sorted(commits, key=str)]
        found += [result["environment"]] if "environment" in result else bare
    return found


def footer(results: Sequence[dict[str, Any]], files: str, code: Sequence[str], history: History) -> str:
    """One line below a generated block: files, commits, days, versions, machine; and the mark where code has changed.

    Args:
        files: where the results lie, for readers.
        code: files and folders that they describe.
    """
    known = environments(results)
    commits = _each((env.get("git") or {}).get("commit", "")[:7] for env in known)
    parts = [f"`{files}`"]
    parts.append(f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}" if commits else "commit not recorded")
    if days := _each(env.get("date", "")[:10] for env in known):
        parts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
    versions = _each(
        ", ".join(f"{n} {v}" for n, v in env["versions"].items() if n in ("torch", "transformers", "triton"))
        for env in known
    )
    parts += versions
    machines = _each(machine(env) for env in known)
    parts += machines
    if any((env.get("git") or {}).get("dirty") for env in known):
        parts.append("some of it from a working tree with uncommitted changes")
    old = any(history.changed((env.get("git") or {}).get("commit"), code) for env in known) if history.known else False
    return f"<small>Measured: {'; '.join(parts)}.{CHANGED if old else ''}</small>"


def machine(env: dict[str, Any]) -> str:
    """Device, processor and threads."""
    device = env.get("device", "cpu")
    threads = env.get("threads")
    cpu = env.get("cpu") or ""
    of = f"{cpu}, {threads} thread{'' if threads == 1 else 's'}" if cpu and threads else cpu
    return of if device in ("cpu", None) else str(device)


def _each(texts: Iterable[str]) -> list[str]:
    return sorted({text for text in texts if text})


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of files.

    Raises:
        FileNotFoundError: where there is none.
    """
    if not paths:
        raise FileNotFoundError("no result file")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
