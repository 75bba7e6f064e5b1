"""The folder that a command writes into: claimed by one process, cleared of its own files alone."""

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
    """An output folder and what a command writes into it.

    Attributes:
        folder: which exists or is to be created.
        option: the option or key that names the folder, for messages.
        activity: of the process that holds the folder, for messages: ``training in``.
        replaced: paths in the folder that are written by :func:`fastadapt.io.atomic.replacing`.
        written: patterns of everything that :meth:`start` removes.
        marker: path in the folder of the file whose existence says that work has begun.
        lock: path in the folder of the lock file; a folder that holds it belongs to the command.
        advice: last sentence of the message of a failed write.
        unusable: class of the error where the folder cannot be read, created or locked.
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
        """Return the sorted names in the folder, without the lock and leftovers of killed writes.

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
        return [n for n in names if n != self._own and unstaged(n) not in self.replaced]

    def refusal(self, reason: str) -> UserError:
        """Return the error whose message names the option and the folder before ``reason``."""
        return UserError(f"{self.option}: {self.folder} {reason}")

    def foreign(self, reason: str, names: Sequence[str]) -> UserError:
        """Return the error for a folder of something else, which holds ``names``."""
        return self.refusal(
            f"{reason} (it holds {', '.join(names[:3])}); nothing in it was touched. "
            "Give a new folder."
        )

    @contextmanager
    def claimed(self) -> Iterator[Path]:
        """Create the folder and hold its lock; nothing in it is changed.

        Where no marker exists at the end, the lock file is removed, and a folder that was new.

        Raises:
            UserError: another process holds the folder.
            UserError or RunError: the folder cannot be created or locked; see ``unusable``.
        """
        is_new = not self.folder.exists()
        lock = self.folder / self.lock
        with ExitStack() as held:
            try:
                failure = "made"
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
                    remove(self.folder / self._own)
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
        """Remove and return what killed writes left beside ``replaced``; the caller has the lock.

        Raises:
            RunError: a leftover cannot be removed.
        """
        with self.disk_errors():
            return sweep(*(self.folder / name for name in self.replaced))

    def start(self, write_marker: Callable[[Path], object]) -> None:
        """Remove what an earlier run wrote and write a new marker; the caller has the lock.

        Folders that are links or mount points are emptied and stay. An old marker that no pattern
        of ``written`` names is replaced last, so that what an error leaves still has one.

        Args:
            write_marker: called with the path to write to.

        Raises:
            RunError: the folder cannot be written.
        """
        assert self.marker is not None
        self.sweep()
        with self.disk_errors():
            for pattern in self.written:
                for path in self.folder.glob(pattern):
                    remove(path)
            # No old file may come back beside the new marker after a power cut.
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
    def _own(self) -> str:
        """Name, in the folder, of the lock file or of the folder that holds the lock file."""
        return Path(self.lock).parts[0]
