"""Finished parts of a work that a later run goes on with, in one SQLite file."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastadapt.errors import RunError
from fastadapt.io.atomic import cannot_write, sync_folder
from fastadapt.io.names import has_file

#: Marks a file as a ledger, in SQLite's header.
_APPLICATION = 0x66616C67
_TABLE = """CREATE TABLE parts (
    fingerprint TEXT NOT NULL, part INTEGER NOT NULL, sha256 BLOB NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (fingerprint, part)
) WITHOUT ROWID"""
_SELECT = "SELECT part, sha256, value FROM parts WHERE fingerprint = ?"
#: Beginnings of SQLite's messages where the disk, not the file's contents, is the reason.
_UNWRITABLE = (
    "attempt to write a readonly",
    "database is locked",
    "disk I/O error",
    "unable to open",
)


class Ledger:
    """Values in bytes, each of a fingerprint and the number of a part.

    The caller holds the folder's lock. A commit is on the disk as a whole or not at all: a kill, a
    full disk or a power cut leaves what was committed before.

    Args:
        path: of the file; its folder exists. SQLite adds ``-journal`` to the name while it writes.
        advice: last sentence of the message of a failed write.
        restart: last sentence of the message of a damaged file.

    Raises:
        UserError: the path is no file.
        RunError: the file is damaged, is no ledger, or cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Ledger(Path(folder, "parts.sqlite")) as ledger:
        ...     ledger.add([("texts", 3, b"three"), ("texts", 1, b"one")])
        ...     list(ledger.parts("texts")), ledger.get("texts", 2)
        ([(1, b'one'), (3, b'three')], None)
    """

    def __init__(
        self,
        path: Path,
        advice: str = "Run the same command again.",
        restart: str = "Remove the file and run the same command again.",
    ) -> None:
        self.path, self._advice, self._restart = path, advice, restart
        is_new = not has_file(path) or path.stat().st_size == 0
        with self._errors():
            self._connection = sqlite3.connect(path, isolation_level=None, cached_statements=8)
        try:
            with self._errors():
                # A rollback journal keeps the ledger in one file between commits, which WAL does
                # not. EXTRA also syncs the folder once the journal is removed: a commit lasts.
                self._connection.execute("PRAGMA journal_mode = DELETE")
                self._connection.execute("PRAGMA synchronous = EXTRA")
                if is_new:
                    self._create()
                (found,) = self._connection.execute("PRAGMA application_id").fetchone()
                if found != _APPLICATION:
                    raise sqlite3.DatabaseError("it is no ledger of this library")
                self._connection.execute(f"{_SELECT} LIMIT 0", ("",))
        except BaseException:
            self._connection.close()
            raise

    def _create(self) -> None:
        with self._transaction():
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(_TABLE)
        sync_folder(self.path.parent)

    def add(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        """Write values in place of any of the same keys, and return once all are on the disk.

        Args:
            entries: fingerprint, part and value of each.

        Raises:
            RunError: the file cannot be written; none of the values is in it.
        """
        rows = ((key, part, _digest(key, part, value), value) for key, part, value in entries)
        with self._errors(), self._transaction():
            self._connection.executemany("REPLACE INTO parts VALUES (?, ?, ?, ?)", rows)

    def get(self, fingerprint: str, part: int) -> bytes | None:
        """Return a value; None where there is none.

        Raises:
            RunError: the file is damaged.
        """
        with self._errors():
            row = self._connection.execute(
                f"{_SELECT} AND part = ?", (fingerprint, part)
            ).fetchone()
            return None if row is None else _checked(fingerprint, *row)

    def parts(self, fingerprint: str) -> Iterator[tuple[int, bytes]]:
        """Yield number and value of each part of a fingerprint, in the order of the numbers.

        Raises:
            RunError: the file is damaged.
        """
        with self._errors():
            for row in self._connection.execute(f"{_SELECT} ORDER BY part", (fingerprint,)):
                yield row[0], _checked(fingerprint, *row)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; what was added stays."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            reason: Exception = error
            if str(error) == "database or disk is full":
                reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            elif not str(error).startswith(_UNWRITABLE):
                raise RunError(f"{self.path} is damaged ({error}). {self._restart}") from error
            raise RunError(cannot_write(self.path, reason, self._advice)) from error


def _digest(fingerprint: str, part: int, value: bytes) -> bytes:
    return hashlib.sha256(f"{fingerprint}\0{part}\0".encode() + value).digest()


def _checked(fingerprint: str, part: int, sha256: bytes, value: bytes) -> bytes:
    # SQLite returns a damaged cell in the type that the cell claims.
    if not isinstance(value, bytes) or _digest(fingerprint, part, value) != sha256:
        raise sqlite3.DatabaseError(f"{fingerprint} {part} has another SHA-256 than was written")
    return value
