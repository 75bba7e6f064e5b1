"""Files that a kill cannot spoil: synced, hashed, replaced as a whole, locked."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from fastadapt.errors import RunError, UserError
from fastadapt.io.files import open_regular
from fastadapt.io.names import has_file

_READ_BYTES = 1 << 22
_STAGED, _LOCK = ".tmp-", ".lock"
_STAGED_NAME = re.compile(re.escape(_STAGED) + "(.+)-[0-9a-f]{32}")


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
        old = staged_beside(path) if path.is_dir() else None
        _swap(staged, path, old)
        if old is not None:
            _remove(old)  # a remainder is left to the next sweep
    finally:
        _remove(staged)


def staged_beside(path: Path) -> Path:
    """Return a new name beside ``path`` for what is to take its place; see :func:`sweep`."""
    return path.parent / f"{_STAGED}{path.name}-{uuid.uuid4().hex}"


def unstaged(name: str) -> str | None:
    """Return the name that a staged file or folder is to take; None of any other name.

    Example:
        >>> unstaged(staged_beside(Path("run/summary.json")).name)
        'summary.json'
        >>> unstaged("summary.json") is None
        True
    """
    staged = _STAGED_NAME.fullmatch(name)
    return staged[1] if staged else None


def _swap(staged: Path, path: Path, old: Path | None) -> None:
    """Rename; a folder that was there becomes ``old`` first, since no rename replaces a folder."""
    if old is not None:
        os.rename(path, old)
    try:
        os.replace(staged, path)
    except OSError:
        if old is not None:
            os.rename(old, path)
        raise
    sync_folder(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing_folder(
    path: Path,
    *,
    last: str | None = None,
    ours: Sequence[str] = ("*",),
    advice: str = "Run the same command again.",
) -> Iterator[Path]:
    """Yield an empty folder to write to, whose contents become those of ``path``.

    As :func:`replacing`, and a lock is held until the folder is in place. What killed writers of
    ``path`` left, whose locks are free, is removed first.

    A folder that is there is swapped for the new one where all in it is to go. One that is empty,
    is a mount point or the working directory, or holds files of others stays itself, and is filled:
    ``last`` and what matches ``ours`` is removed, the new files are moved in, ``last`` after all
    others. A kill meanwhile leaves a folder without ``last``, which :func:`half_filled` tells.

    Args:
        path: a folder, or nothing yet.
        last: the name of the file that says that the folder is whole.
        ours: patterns of the names that are to go from a folder that is there.
        advice: what the message of an error ends with.

    Raises:
        RunError: the folder cannot be written, with the reason and the free space.
    """
    path = Path(os.path.realpath(path))
    with disk_errors(path, advice):
        make_folder(path.parent)
        _remove_abandoned(path)
        entries = os.listdir(path) if path.is_dir() else []
        filled = path.is_dir() and (
            not all(any(fnmatch(name, pattern) for pattern in ours) for name in entries)
            or not entries
            or os.path.ismount(path)
            or path == Path.cwd()
        )
        with _stage(path / path.name if filled else path) as stage:
            new = stage / "new"
            yield new
            sync_tree(new, last)
            if filled:
                _fill(path, new, last, ours)
            else:
                _swap(new, path, stage / "old" if path.is_dir() else None)


@contextmanager
def _stage(path: Path) -> Iterator[Path]:
    """A locked folder beside ``path`` with an empty folder ``new`` in it; removed at the end."""
    with ExitStack() as held:
        while True:
            stage = staged_beside(path)
            stage.mkdir()
            try:
                held.enter_context(locked(stage / _LOCK))
                (stage / "new").mkdir()
                break
            except (BlockingIOError, FileNotFoundError):
                continue  # another process took it, not locked yet, for one that a kill left
        try:
            yield stage
        finally:
            _remove(stage)


def _fill(path: Path, new: Path, last: str | None, ours: Sequence[str]) -> None:
    """Move what is in ``new`` into a folder that stays; without ``last`` in between."""
    if last is not None:
        (path / last).unlink(missing_ok=True)
        sync_folder(path)
    for pattern in ours:
        for old in path.glob(pattern):
            if unstaged(old.name) is None:
                _remove(old)
    for entry in sorted(new.iterdir(), key=lambda entry: (entry.name == last, entry)):
        if entry.name == last:
            sync_folder(path)
        os.replace(entry, path / entry.name)
    sync_folder(path)


def half_filled(path: Path) -> bool:
    """Whether a writer of the folder is at work in it, or was killed in it."""
    name = Path(os.path.realpath(path)).name
    return path.is_dir() and any(unstaged(entry) == name for entry in os.listdir(path))


def _remove_abandoned(path: Path) -> None:
    """Remove what killed writers of ``path`` left; those that live hold their lock."""
    for left in (*staged_for(path), *staged_for(path / path.name)):
        if left.is_dir():
            with suppress(BlockingIOError), locked(left / _LOCK):
                shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; of a link, the target stays.

    Raises:
        OSError: the path cannot be removed. A path that does not exist is no error.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Remove an empty folder that is neither a link nor a mount point."""
    stays = folder.is_symlink() or os.path.ismount(folder)
    if not stays and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def staged_for(*paths: Path) -> list[Path]:
    """What calls of :func:`replacing` that were killed, or are at work, have beside ``paths``.

    Of a link both are looked at: what lies beside it, and beside what it leads to.
    """
    left: list[Path] = []
    beside = {Path(os.path.realpath(path.parent)) / path.name for path in paths}
    for path in sorted(beside | {Path(os.path.realpath(path)) for path in paths}):
        if path.parent.is_dir():
            names = sorted(os.listdir(path.parent))
            left += [path.parent / name for name in names if unstaged(name) == path.name]
    return left


def sweep(*paths: Path) -> list[Path]:
    """Remove what killed calls of :func:`replacing` left beside ``paths``; return what it was.

    Only for who holds the lock of the folder: what another process is writing would go, too.

    Raises:
        OSError: it cannot be removed.
    """
    left = staged_for(*paths)
    for staged in left:
        remove(staged)
    return left


def sweep_tree(folder: Path, *, but: Collection[str] = ()) -> list[Path]:
    """Remove what killed calls of :func:`replacing` left in a folder or below; return what it was.

    Args:
        folder: whose lock the caller holds.
        but: names whose writers have a lock of their own.

    Raises:
        OSError: it cannot be removed.
    """
    left: list[Path] = []
    for parent, folders, files in os.walk(folder):
        staged = {name for name in (*folders, *files) if (unstaged(name) or "") not in ("", *but)}
        folders[:] = [name for name in folders if unstaged(name) is None]
        left += [Path(parent, name) for name in sorted(staged)]
    for path in left:
        remove(path)
    return left


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
    """The message of a failed write: path, reason, free space where that is the reason, advice.

    Example:
        >>> cannot_write(Path("out"), PermissionError(13, "Permission denied"), "Give another.")
        'out cannot be written: Permission denied. Give another.'
    """
    number = _number(error)
    reason = os.strerror(number) if number else str(error) or type(error).__name__
    if is_full(error):
        reason = f"{reason} ({free_space(path)} free). Make room"
    return " ".join(f"{path} cannot be written: {reason.rstrip('.')}. {advice}".split())


def is_full(error: Exception) -> bool:
    """Whether an error of a write means that the disk is full, or the quota reached."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def free_space(path: Path) -> str:
    """What is free on the disk of a path, which may not be there yet, in MiB."""
    folder = next((p for p in (path, *path.parents) if p.is_dir()), Path())
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"


def _number(error: Exception) -> int | None:
    number = getattr(error, "errno", None)
    if number is None and (named := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(named[1])  # safetensors has it in the text alone
    return number


def make_folder(path: Path) -> None:
    """Make a folder and those that it lies in; return once their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_tree(path: Path, last: str | None = None) -> None:
    """Return once a file, or all files of a folder and then its folders, are on the disk."""
    if not path.is_dir():
        sync_file(path)
        return
    files: list[Path] = []
    folders = [path]
    for entry in sorted(path.rglob("*")):
        (folders if entry.is_dir() else files).append(entry)
    for file in sorted(files, key=lambda file: (file == path / (last or ""), file)):
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


def open_appended(path: Path) -> FileIO:
    """Open a file to add to, which is made if it is not there; its name is on the disk.

    Unbuffered, so that closing writes nothing and cannot fail.
    """
    with ExitStack() as opened:
        file = opened.enter_context(FileIO(path, "a+"))
        sync_folder(path.parent)
        opened.pop_all()
    return file


def digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a regular file, in hexadecimal."""
    sha256, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            sha256.update(block)
            size += len(block)
    return size, sha256.hexdigest()


def digest_of_input(path: Path) -> tuple[int, str]:
    """:func:`digest` of a file that others gave.

    Raises:
        UserError: it cannot be read, or is no file.
    """
    try:
        return digest(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


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
    """Hold a lock file for this process; the system releases the lock when the process ends.

    Raises:
        BlockingIOError: another process holds the lock.
        UserError: the path is no file, such as a pipe.
        OSError: the lock file cannot be created, or its file system has no locks.
    """
    has_file(path)
    # A soft lock would outlive a killed process. A hold belongs to the process, not to a thread.
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "Locked by another process", str(path)) from None
    try:
        yield
    finally:
        lock.release()
