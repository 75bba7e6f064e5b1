"""Replace files and folders atomically; sync, hash and lock them."""

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
_STAGED, _LOCK, _OLD = ".tmp-", ".lock", "old"
_STAGED_NAME = re.compile(re.escape(_STAGED) + "(.+)-[0-9a-f]{32}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a staged path beside ``path``, and replace ``path`` by it if the context succeeds.

    The caller creates a file or a folder at the staged path. A file replaces no folder. The order
    of syncs is: every file; every folder; the rename; the parent folder of ``path``.

    Args:
        path: a file, a folder, or a path that does not exist. Its parent is a folder. If it is a
            link, the link itself is replaced.

    Raises:
        OSError: the disk is full, the folder cannot be written, or a file would replace a folder.
            ``path`` is unchanged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "a.txt")) as staged:
        ...         _ = staged.write_text("new")
        ...     Path(folder, "a.txt").read_text()
        'new'
    """
    # A rename needs both names in the same real folder, so links of the parent are resolved.
    path = Path(os.path.realpath(path.parent)) / path.name
    staged = staged_beside(path)
    try:
        yield staged
        sync_tree(staged)
        old = staged_beside(path) if path.is_dir() and staged.is_dir() else None
        _swap(staged, path, old)
        if old is not None:
            remove(old, ignore_errors=True)  # the next sweep removes what this leaves
    finally:
        remove(staged, ignore_errors=True)


def staged_beside(path: Path) -> Path:
    """Return a new path beside ``path`` for a file or folder that will replace ``path``."""
    return path.parent / f"{_STAGED}{path.name}-{uuid.uuid4().hex}"


def unstaged(name: str) -> str | None:
    """Return the final name of a staged file or folder, or None if ``name`` is not staged.

    Example:
        >>> unstaged(staged_beside(Path("run/summary.json")).name)
        'summary.json'
        >>> unstaged("summary.json") is None
        True
    """
    staged = _STAGED_NAME.fullmatch(name)
    return staged[1] if staged else None


def _swap(staged: Path, path: Path, old: Path | None) -> None:
    """Rename ``staged`` to ``path``; rename an existing folder to ``old`` first.

    A rename cannot replace a folder that is not empty.
    """
    try:
        if old is not None:
            os.rename(path, old)
        os.replace(staged, path)
    except BaseException:  # also Ctrl-C between the two
        if old is not None and not os.path.lexists(path):
            os.rename(old, path)
        raise
    sync_folder(path.parent)


@contextmanager
def writing_folder(
    path: Path,
    *,
    last: str | None = None,
    ours: Sequence[str] = ("*",),
    advice: str = "Run the same command again.",
) -> Iterator[Path]:
    """Yield an empty staged folder, and move its contents to ``path`` if the context succeeds.

    A lock is held until ``path`` is complete. Leftovers of killed writers, whose locks are free,
    are removed first. A folder that such a writer had moved aside is restored.

    An existing folder is swapped for the staged folder if all of its entries match ``ours``. A
    folder that is empty, is a mount point or the working directory, or holds other files is filled
    in place: ``last`` and the entries that match ``ours`` are removed, then the new files are moved
    in, ``last`` after the others. A kill in between leaves a folder without ``last``, for which
    :func:`half_filled` returns True.

    Args:
        path: a folder, or a path that does not exist.
        last: name of the file whose existence marks the folder as complete.
        ours: patterns of the names to remove from an existing folder.
        advice: last sentence of the message of an error.

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
                _swap(new, path, stage / _OLD if path.is_dir() else None)


@contextmanager
def _stage(path: Path) -> Iterator[Path]:
    """Yield a locked folder beside ``path`` that holds an empty folder ``new``; remove it after."""
    with ExitStack() as held:
        while True:
            stage = staged_beside(path)
            stage.mkdir()
            try:
                held.enter_context(locked(stage / _LOCK))
                (stage / "new").mkdir()
                break
            except (BlockingIOError, FileNotFoundError):
                continue  # another process removed the folder as abandoned before it was locked
        try:
            yield stage
        finally:
            remove(stage, ignore_errors=True)


def _fill(path: Path, new: Path, last: str | None, ours: Sequence[str]) -> None:
    """Move the entries of ``new`` into an existing folder, which lacks ``last`` meanwhile."""
    if last is not None:
        (path / last).unlink(missing_ok=True)
        sync_folder(path)
    for pattern in ours:
        for old in path.glob(pattern):
            if unstaged(old.name) is None:
                remove(old, ignore_errors=True)
    for entry in sorted(new.iterdir(), key=lambda entry: (entry.name == last, entry)):
        if entry.name == last:
            sync_folder(path)
        os.replace(entry, path / entry.name)
    sync_folder(path)


def half_filled(path: Path) -> bool:
    """Return whether a writer is filling the folder in place, or was killed while it did."""
    name = Path(os.path.realpath(path)).name
    return path.is_dir() and any(unstaged(entry) == name for entry in os.listdir(path))


def _remove_abandoned(path: Path) -> None:
    """Remove leftovers of killed writers of ``path``; live writers hold their lock.

    The old folder of a writer that was killed between the two renames is restored.
    """
    for left in (*staged_for(path), *staged_for(path / path.name)):
        if left.is_dir():
            with suppress(BlockingIOError), locked(left / _LOCK):
                if (left / _OLD).is_dir() and not os.path.lexists(path):
                    _swap(left / _OLD, path, None)
                shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, or a folder with its contents; remove a link, but not its target.

    Args:
        path: the path, which need not exist.
        ignore_errors: leave entries of a folder that cannot be removed.

    Raises:
        OSError: the path cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Remove an empty folder that is neither a link nor a mount point."""
    stays = folder.is_symlink() or os.path.ismount(folder)
    if not stays and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def staged_for(*paths: Path) -> list[Path]:
    """Return the staged files and folders beside ``paths``, of killed and live writers.

    The search includes siblings of a link and siblings of its target.
    """
    left: list[Path] = []
    beside = {Path(os.path.realpath(path.parent)) / path.name for path in paths}
    for path in sorted(beside | {Path(os.path.realpath(path)) for path in paths}):
        if path.parent.is_dir():
            names = sorted(os.listdir(path.parent))
            left += [path.parent / name for name in names if unstaged(name) == path.name]
    return left


def sweep(*paths: Path) -> list[Path]:
    """Remove and return the leftovers of :func:`replacing` beside ``paths``.

    The caller must hold the lock of the folder: staged files of live writers are removed too.

    Raises:
        OSError: a leftover cannot be removed.
    """
    left = staged_for(*paths)
    for staged in left:
        remove(staged)
    return left


def sweep_tree(folder: Path, *, but: Collection[str] = ()) -> list[Path]:
    """Remove and return the leftovers of :func:`replacing` in a folder and below it.

    Args:
        folder: folder whose lock the caller holds.
        but: names to skip, because other locks than the folder's protect them.

    Raises:
        OSError: a leftover cannot be removed.
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
    """Raise ``OSError`` and ``SafetensorError`` as a ``RunError`` with path, reason and advice."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(cannot_write(path, error, advice)) from error


def cannot_write(path: Path, error: Exception, advice: str = "") -> str:
    """Return the message of a failed write: path, reason, free space if the disk is full, advice.

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
    """Return whether a write failed because the disk is full or the quota is reached."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def free_space(path: Path) -> str:
    """Return the free space on the disk of a path in MiB, as text. The path need not exist."""
    folder = next((p for p in (path, *path.parents) if p.is_dir()), Path())
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"


def _number(error: Exception) -> int | None:
    number = getattr(error, "errno", None)
    if number is None and (named := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(named[1])  # SafetensorError has the number in its message only
    return number


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and sync their names to the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_tree(path: Path, last: str | None = None) -> None:
    """Sync a file; or sync all files below a folder, ``last`` at the end, then its folders."""
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


def sync_file(path: Path, flags: int = 0) -> None:
    """Sync the contents of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to the disk."""
    sync_file(path, os.O_DIRECTORY)


def open_appended(path: Path) -> FileIO:
    """Open a file for appending, create it if it is missing, and sync its name to the disk.

    The file is unbuffered: closing it writes nothing, so closing cannot fail.
    """
    with ExitStack() as opened:
        file = opened.enter_context(FileIO(path, "a+"))
        sync_folder(path.parent)
        opened.pop_all()
    return file


def digest(path: Path) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 in hexadecimal of a regular file.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    sha256, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            sha256.update(block)
            size += len(block)
    return size, sha256.hexdigest()


def digest_of_input(path: Path) -> tuple[int, str]:
    """Return :func:`digest` of a file that the user named.

    Raises:
        UserError: the file cannot be read, or is no regular file.
    """
    try:
        return digest(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the umask's permissions; safetensors itself writes 0600."""
    from safetensors.torch import save_file

    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def locked(path: Path, *, wait: float = 0) -> Iterator[None]:
    """Hold a lock file for this process; the system releases the lock when the process ends.

    Args:
        path: the lock file, which stays.
        wait: seconds to wait for another process.

    Raises:
        BlockingIOError: another process holds the lock.
        UserError: the path is no regular file, such as a pipe.
        OSError: the lock file cannot be created, or its file system has no locks.
    """
    has_file(path)
    # A soft lock would outlive a killed process. The process, not a thread, holds the lock.
    lock = FileLock(path, timeout=wait, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "Locked by another process", str(path)) from None
    try:
        yield
    finally:
        lock.release()
