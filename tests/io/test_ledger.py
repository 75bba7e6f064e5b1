"""A ledger that is killed, damaged, or another program's."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fastadapt.errors import RunError, UserError
from fastadapt.io.ledger import Ledger

FIRST = [("a", part, bytes([part]) * 3000) for part in range(9)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "parts.sqlite"
    with Ledger(path) as ledger:
        ledger.add(FIRST)
    return path


def read(path: Path) -> list[tuple[str, int, bytes]]:
    with Ledger(path) as ledger:
        return [("a", *entry) for entry in ledger.parts("a")]


def test_a_kill_in_a_commit_leaves_the_one_before(path: Path) -> None:
    def killed() -> Iterator[tuple[str, int, bytes]]:
        for part in range(2000):  # more than SQLite's cache: pages are on the disk already
            yield "a", part, bytes(3000)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with Ledger(path) as ledger:
            ledger.add(killed())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert (path.parent / "parts.sqlite-journal").exists()
    assert read(path) == FIRST
    assert [file.name for file in path.parent.iterdir()] == ["parts.sqlite"]


def test_a_failed_add_leaves_nothing_of_it(path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, int, bytes]]:
        yield "a", 9, b"nine"
        raise KeyboardInterrupt

    with Ledger(path) as ledger:
        with pytest.raises(KeyboardInterrupt):
            ledger.add(interrupted())
        assert ledger.get("a", 9) is None
    assert read(path) == FIRST


@pytest.mark.parametrize("kind", ["cut", "another format", "another program's", "a value"])
def test_a_damaged_or_foreign_file_is_one_error(path: Path, kind: str) -> None:
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-4096])
    elif kind == "another format":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" * 20)
    elif kind == "another program's":
        path.unlink()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE bookmarks (url)")
    else:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE parts SET value = 'x' WHERE part = 3")
    with pytest.raises(RunError, match=r"parts\.sqlite is damaged \(.*\)\. Remove the file"):
        read(path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; expected a file"):
        Ledger(tmp_path)


def test_a_commit_waits_for_the_disk(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
