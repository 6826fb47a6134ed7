"""safetensors files with a JSON head: written whole or not at all, and checked before anything in them is believed."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

CHECKSUM = "headq_sha256"


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    Args:
        name: in messages, and ``headq_{name}`` in the file.
        version: the one this headq_ao writes; any change of the format counts it up.
        remedy: how to make such a file again.
        oldest: the oldest version that is read too; None: no older one.
    """

    name: str
    version: int
    remedy: str
    oldest: int | None = None

    @property
    def entry(self) -> str:
        """Key of the head in safetensors' metadata."""
        return f"headq_{self.name.replace(' ', '_')}"

    def metadata(self, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """What goes into safetensors' metadata: the head, and a SHA-256 over it and the tensors."""
        text = json.dumps({"version": self.version, **head}, allow_nan=False)
        return {self.entry: text, CHECKSUM: checksum(text, tensors)}

    def head(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        """The head, its version checked.

        Raises:
            ValueError: when there is none, or it is of an older or newer version.
        """
        if self.entry not in metadata:
            others = [key.removeprefix("headq_").replace("_", " ") for key in metadata if key.startswith("headq_")]
            other = next((f": it is a {name}" for name in others if name != CHECKSUM.removeprefix("headq_")), "")
            raise ValueError(f"its header has no {self.entry} entry{other}; {self.remedy}")
        head: dict[str, Any] = json.loads(metadata[self.entry])
        version = head.get("version") if isinstance(head, dict) else None
        if not isinstance(version, int) or isinstance(version, bool):
            raise ValueError(f"its header has no version, got {version!r}; {self.remedy}")
        if version > self.version:
            raise ValueError(
                f"version {version} is newer than {self.version}, which this headq_ao reads; update headq_ao"
            )
        oldest = self.version if self.oldest is None else self.oldest
        if version < oldest:
            raise ValueError(f"version {version} is older than {oldest}, which this headq_ao reads; {self.remedy}")
        return head

    def check(self, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError where head or tensors are not those that were written."""
        if metadata.get(CHECKSUM) != checksum(metadata[self.entry], tensors):
            raise ValueError(f"its checksum does not fit its content: it was changed or damaged; {self.remedy}")

    def save(self, path: str | os.PathLike[str], head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a file whole or leave the old one.

        Raises:
            FileNotFoundError: when there is no folder to write to.
            OSError: when it cannot be written, as on a full disk.
        """
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with atomic_path(path) as temporary:
            try:
                safetensors.torch.save_file(tensors, temporary, self.metadata(head, tensors))
            except safetensors.SafetensorError as error:
                raise OSError(
                    f"cannot write {os.fspath(path)!r}: {error}; what was there before is unchanged"
                ) from error

    def load(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Head and tensors of a file.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is of another kind or version, truncated, or changed.
        """
        if os.path.isdir(path):
            raise FileNotFoundError(f"{os.fspath(path)!r} is a folder, not a {self.name} file; name the file in it")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {self.name} file at {os.fspath(path)!r}; {self.remedy}")
        with self.refusing(path), safetensors.safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            head = self.head(metadata)
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, not a dict
            self.check(metadata, tensors)
        return head, tensors

    @contextlib.contextmanager
    def refusing(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Turn what goes wrong with a file's content into a ValueError that names the file."""
        try:
            yield
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            missing = f"it has no {error}" if isinstance(error, KeyError) else error
            if isinstance(error, safetensors.SafetensorError):
                missing = f"it is no whole safetensors file ({error}); {self.remedy}"
            raise ValueError(f"{os.fspath(path)!r} is not a usable headq_ao {self.name}: {missing}") from error


def checksum(head: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the head's text and each tensor's name, dtype, shape and bytes, in the order of names."""
    digest = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        digest.update(f"\0{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\0".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary path beside ``path`` that replaces it on success and is removed on failure.

    The content is on the disk before the name changes, so a kill or a power cut leaves the old file or the new one; a
    kill also leaves the temporary file, ``.headq-….tmp``. A symbolic link is followed, and kept: the file that it names
    is replaced or made.

    Raises:
        FileNotFoundError: when there is no folder to write to.
        IsADirectoryError: when ``path`` is a folder.
        OSError: when links lead in a circle, or nothing can be written to the folder.
    """
    target = link_target(path)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".headq-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as f:
            mode = os.fstat(f.fileno()).st_mode
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write {os.fspath(path)!r}: no file can be made in {folder!r} ({error.strerror})"
        ) from error
    try:
        yield temporary
        os.chmod(temporary, mode)  # safetensors leaves the file to its owner alone
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def link_target(path: str | os.PathLike[str]) -> str:
    """The absolute path that is written to: ``path``, or what its links lead to, whether that file is there or not."""
    name = os.fspath(path)
    target = os.path.realpath(name)
    if os.path.islink(target):
        raise OSError(errno.ELOOP, f"cannot write {name!r}: it is a symbolic link that leads in a circle")
    if os.path.isdir(target) or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, f"cannot write {name!r}: it is a folder; name a file in it")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        through = f" (which {name!r} links to)" if os.path.islink(name) else ""
        raise FileNotFoundError(
            f"no folder {folder!r} to write {os.path.basename(target)!r}{through} to; create it first"
        )
    return target
