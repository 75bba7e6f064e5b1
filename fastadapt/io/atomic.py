"""Files that a kill cannot spoil: synced, hashed, replaced as a whole, locked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from fastadapt.errors import RunError

_READ_BYTES = 1 << 22
_STAGED, _LOCK = ".tmp-", ".lock"
_TOKEN = re.compile("[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, *, last: str | None = None, follow_link: bool = False) -> Iterator[Path]:
    """Yield a sibling to write to; it takes the place of ``path`` when the context ends well.

    The sibling is a file or a folder, as the caller makes it. Before it takes its place, every file
    in it is on the disk, ``last`` after all others, and then every folder; after, the folder that
    holds ``path``. A link is replaced, not what it leads to: that may lie anywhere.

    Args:
        path: a file or a folder, or neither yet; its parent is a folder.
        last: the name, in a folder, of the file that says that the folder is whole.
        follow_link: where ``path`` is a link, replace what it leads to instead; the link stays.

    Raises:
        OSError: the disk is full, or the folder cannot be written. ``path`` is as it was.
    """
    # The folder that holds ``path`` may lie behind links in any case.
    whole = os.path.realpath(path)
    path = Path(whole) if follow_link else Path(os.path.realpath(path.parent)) / path.name
    staged = staged_beside(path)
    try:
        yield staged
        sync_tree(staged, last)
        _put_in_place(staged, path)
    finally:
        _remove(staged)


def staged_beside(path: Path) -> Path:
    """A new name beside ``path`` for what is to take its place; see :func:`sweep`."""
    return path.parent / f"{_STAGED}{path.name}-{uuid.uuid4().hex}"


def _put_in_place(staged: Path, path: Path) -> None:
    """Rename; a folder that was there is moved aside first, since no rename replaces a folder."""
    old = None
    if path.is_dir():
        old = staged_beside(path)
        os.rename(path, old)
    try:
        os.replace(staged, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    sync_folder(path.parent)
    if old is not None:
        _remove(old)  # what stays of it is for the next sweep


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: Path, *, last: str | None = None) -> Iterator[Path]:
    """Yield an empty folder to write to, which takes the place of ``path``: the writer of outputs.

    As :func:`replacing`, and a lock is held on the staged folder while it is written. Staged
    folders beside ``path`` whose lock is free are those of killed writers; they are removed first.

    Raises:
        RunError: the folder cannot be written, with the reason and the free space.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with replacing(path, last=last) as staged:
            staged.mkdir()
            with locked(staged / _LOCK):
                yield staged
                (staged / _LOCK).unlink()


def _remove_abandoned(path: Path) -> None:
    """Remove what killed writers of ``path`` left; those that live hold their lock."""
    for left in _staged_for(path):
        if left.is_dir():
            with suppress(BlockingIOError), locked(left / _LOCK):
                shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def sweep(*paths: Path) -> list[Path]:
    """Remove what killed calls of :func:`replacing` left beside ``paths``; return what it was.

    Only for who holds the lock of the folder: what another process is writing would go, too.

    Raises:
        OSError: it cannot be removed.
    """
    left = [staged for path in paths for staged in _staged_for(Path(os.path.realpath(path)))]
    for staged in left:
        shutil.rmtree(staged) if staged.is_dir() else staged.unlink()
    return left


def _staged_for(path: Path) -> list[Path]:
    prefix = f"{_STAGED}{path.name}-"
    if not path.parent.is_dir():
        return []
    return sorted(
        entry
        for entry in path.parent.iterdir()
        if entry.name.startswith(prefix) and _TOKEN.fullmatch(entry.name.removeprefix(prefix))
    )


@contextmanager
def disk_errors(path: Path, advice: str = "Run the same command again.") -> Iterator[None]:
    """Raise what goes wrong on the disk as a ``RunError``: path, reason, free space, ``advice``.

    Errors of safetensors are among it, which are no ``OSError``.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(cannot_write(path, error, advice)) from error


def cannot_write(path: Path, error: Exception, advice: str = "") -> str:
    """The message of a failed write: path, reason, free space where that is the reason, advice."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if getattr(error, "errno", None) in _FULL or "os error 28" in reason:
        folder = next((p for p in (path, *path.parents) if p.is_dir()), Path())
        free = shutil.disk_usage(folder).free
        reason = f"No space left on device ({free / 2**20:,.0f} MiB free). Make room"
    return " ".join(f"{path} cannot be written: {reason.rstrip('.')}. {advice}".split())


def sync_tree(path: Path, last: str | None = None) -> None:
    """Return once a file, or all files of a folder and then its folders, are on the disk."""
    if not path.is_dir():
        sync_file(path)
        return
    files: list[Path] = []
    folders = [path]
    for entry in sorted(path.rglob("*")):
        (folders if entry.is_dir() else files).append(entry)
    for file in sorted(files, key=lambda file: (file.name == last, file)):
        sync_file(file)
    for folder in reversed(folders):
        sync_folder(folder)


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
