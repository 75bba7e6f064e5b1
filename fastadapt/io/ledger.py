"""Store the finished parts of a resumable computation in one SQLite file."""

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
_DELETE = "DELETE FROM parts WHERE fingerprint = ? AND part = ?"
#: Prefixes of SQLite's messages about the disk. Other messages are about damaged contents.
_UNWRITABLE = (
    "attempt to write a readonly",
    "database is locked",
    "disk I/O error",
    "unable to open",
)


class Ledger:
    """SQLite file of values in bytes, each under a fingerprint and a part number as key.

    The caller holds the lock of the folder. A commit is atomic: a kill, a full disk or a power cut
    leaves the previous commit.

    Args:
        path: path of the file in an existing folder. SQLite writes ``path-journal`` beside it
            during a commit.
        advice: last sentence of the message of a failed write.
        restart: last sentence of the message of a damaged file.

    Raises:
        UserError: the path is no regular file.
        RunError: the file is damaged or lacks rows, is no ledger, or cannot be written.

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
                # With a rollback journal, unlike WAL, the ledger is one file between commits. EXTRA
                # also syncs the folder after the journal is removed, which makes a commit durable.
                self._connection.execute("PRAGMA journal_mode = DELETE")
                self._connection.execute("PRAGMA synchronous = EXTRA")
                if is_new:
                    self._create()
                (application,) = self._connection.execute("PRAGMA application_id").fetchone()
                if application != _APPLICATION:
                    raise sqlite3.DatabaseError("expected a ledger of this library")
                self._connection.execute(f"{_SELECT} LIMIT 0", ("",))
                self._n_rows = self._count_rows()
        except BaseException:
            self._connection.close()
            raise

    def _count_rows(self) -> int:
        """Return the number of rows; raise if it differs from the header's ``user_version``.

        A damaged page may lose rows without an error of SQLite. Ledgers of earlier versions have a
        ``user_version`` of 0 until the next commit.
        """
        (n,) = self._connection.execute("SELECT COUNT(*) FROM parts").fetchone()
        (expected,) = self._connection.execute("PRAGMA user_version").fetchone()
        if expected not in (0, n):
            raise sqlite3.DatabaseError(f"expected {expected:,} rows, got {n:,}")
        return int(n)

    def _create(self) -> None:
        with self._transaction():
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            self._connection.execute(_TABLE)
        sync_folder(self.path.parent)

    def add(self, entries: Iterable[tuple[str, int, bytes]]) -> None:
        """Write values to the disk in one commit, replacing values with the same keys.

        Args:
            entries: fingerprint, part and value of each entry.

        Raises:
            RunError: the file cannot be written; its contents are unchanged.
        """
        n = self._n_rows
        with self._errors(), self._transaction():
            for key, part, value in entries:
                row = (key, part, _digest(key, part, value), value)
                deleted = self._connection.execute(_DELETE, (key, part)).rowcount
                self._connection.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", row)
                n += 1 - deleted
            self._connection.execute(f"PRAGMA user_version = {n}")
        self._n_rows = n

    def get(self, fingerprint: str, part: int) -> bytes | None:
        """Return the value of a key, or None if the ledger lacks the key.

        Raises:
            RunError: the file is damaged.
        """
        with self._errors():
            row = self._connection.execute(
                f"{_SELECT} AND part = ?", (fingerprint, part)
            ).fetchone()
            return None if row is None else _checked(fingerprint, *row)

    def parts(self, fingerprint: str) -> Iterator[tuple[int, bytes]]:
        """Yield part number and value of each entry of a fingerprint, in ascending order.

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
        """Close the file; added values are on the disk already."""
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
    # SQLite does not enforce column types, so a damaged cell may come back as text or a number.
    if not isinstance(value, bytes) or _digest(fingerprint, part, value) != sha256:
        raise sqlite3.DatabaseError(f"the SHA-256 of {fingerprint} {part} does not match its value")
    return value
