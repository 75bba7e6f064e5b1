"""Files that a kill cannot spoil: synced, hashed, replaced as a whole, locked."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

_READ_BYTES = 1 << 22


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a sibling to write to; it takes the place of ``path`` when the context ends well."""
    staged = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex}"
    try:
        yield staged
        for file in staged.iterdir() if staged.is_dir() else [staged]:
            sync_file(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(staged, path)
    finally:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Return once the file's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Return once the names in the folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, in hexadecimal."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            sha256.update(block)
            size += len(block)
    return size, sha256.hexdigest()


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file with the permissions of any new file; the library's own are 0600."""
    from safetensors.torch import save_file

    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file for this process; the kernel lets go of it when the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
