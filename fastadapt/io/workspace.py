"""Claim the output folder of a command for one process, and remove only files of the command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import (
    cannot_write,
    locked,
    make_folder,
    remove,
    remove_if_empty,
    replacing,
    sweep,
    sync_folder,
    unstaged,
)


@dataclass(frozen=True)
class Workspace:
    """An output folder and the files that a command writes into it.

    Attributes:
        folder: the folder, which need not exist.
        option: option or key that names the folder, for messages.
        activity: activity of the process that holds the lock, for messages: ``training in``.
        replaced: paths in the folder that are written by :func:`fastadapt.io.atomic.replacing`.
        written: patterns of the files that :meth:`start` removes.
        marker: path in the folder of the file whose existence means that the command has started.
        lock: path in the folder of the lock file. A subfolder that holds the lock file belongs to
            the command.
        advice: last sentence of the message of a failed write.
        unusable: class of the error if the folder cannot be read, created or locked.
    """

    folder: Path
    option: str
    activity: str
    replaced: Sequence[str]
    written: Sequence[str] = ()
    marker: str | None = None
    lock: str = ".lock"
    advice: str = "Run the same command again."
    unusable: type[UserError] | type[RunError] = UserError

    def names(self) -> list[str]:
        """Return the sorted names in the folder, except the lock and leftovers of killed writes.

        Raises:
            UserError: the path is a file.
            UserError or RunError: the folder cannot be read; see ``unusable``.
        """
        try:
            if not self.folder.exists():
                return []
            if not self.folder.is_dir():
                raise self.refusal("is a file; expected a folder or a new name")
            names = sorted(os.listdir(self.folder))
        except OSError as error:
            raise self._unusable("read", error) from error
        return [n for n in names if n != self._lock_entry and unstaged(n) not in self.replaced]

    def refusal(self, reason: str) -> UserError:
        """Return the error whose message names the option and the folder before ``reason``."""
        return UserError(f"{self.option}: {self.folder} {reason}")

    def foreign(self, reason: str, names: Sequence[str]) -> UserError:
        """Return the error for a folder with files ``names`` that the command did not write."""
        return self.refusal(
            f"{reason} (it holds {', '.join(names[:3])}); nothing in it was touched. "
            "Give a new folder."
        )

    @contextmanager
    def claimed(self) -> Iterator[Path]:
        """Create the folder and hold its lock, without changing its contents.

        If no marker exists at the end, the lock file is removed. A folder that was created is then
        removed too.

        Raises:
            UserError: another process holds the folder.
            UserError or RunError: the folder cannot be created or locked; see ``unusable``.
        """
        is_new = not self.folder.exists()
        lock = self.folder / self.lock
        with ExitStack() as held:
            try:
                failure = "created"
                make_folder(lock.parent)
                failure = "written"
                held.enter_context(locked(lock))
            except BlockingIOError:
                message = f"{self.option}: another process is {self.activity} {self.folder}"
                raise UserError(message) from None
            except OSError as error:
                raise self._unusable(failure, error) from error
            try:
                yield self.folder
            finally:
                if self.marker is not None and not (self.folder / self.marker).exists():
                    remove(self.folder / self._lock_entry)
                    if is_new:
                        remove_if_empty(self.folder)

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Raise ``OSError`` as a ``RunError`` with option, folder, reason and advice."""
        try:
            yield
        except OSError as error:
            message = cannot_write(self.folder, error, self.advice)
            raise RunError(f"{self.option}: {message}") from error

    def sweep(self) -> list[Path]:
        """Remove and return leftovers of killed writes of ``replaced``; the caller has the lock.

        Raises:
            RunError: a leftover cannot be removed.
        """
        with self.disk_errors():
            return sweep(*(self.folder / name for name in self.replaced))

    def start(self, write_marker: Callable[[Path], object]) -> None:
        """Remove the files of an earlier run and write a new marker; the caller has the lock.

        Folders that are links or mount points are emptied, not removed. An old marker that no
        pattern of ``written`` matches is replaced last, so that the folder has a marker after an
        error.

        Args:
            write_marker: function that writes the marker to the given path.

        Raises:
            RunError: the folder cannot be written.
        """
        assert self.marker is not None
        self.sweep()
        with self.disk_errors():
            for pattern in self.written:
                for path in self.folder.glob(pattern):
                    remove(path)
            # Sync the removals first: old files must not reappear beside the new marker after a
            # power cut.
            for name in sorted({Path(p).parent for p in self.written}, reverse=True):
                remove_if_empty(self.folder / name)
                if (self.folder / name).is_dir():
                    sync_folder(self.folder / name)
            with replacing(self.folder / self.marker) as staged:
                write_marker(staged)

    def _unusable(self, failure: str, error: OSError) -> Exception:
        message = f"{self.option}: {self.folder} cannot be {failure}: {error.strerror}"
        return self.unusable(message)

    @property
    def _lock_entry(self) -> str:
        """Name of the lock file, or of the subfolder that holds the lock file."""
        return Path(self.lock).parts[0]
