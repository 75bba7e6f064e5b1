"""A ledger survives a kill; damaged and foreign files are errors."""

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
        for part in range(2000):  # more than SQLite's cache, so that pages are written before
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


@pytest.mark.parametrize("lost", ["part = 3", "part > 2", "1"])
def test_lost_rows_are_an_error(path: Path, lost: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"DELETE FROM parts WHERE {lost}")
    with pytest.raises(RunError, match=r"damaged \(expected 9 rows, got \d\)\. Remove the file"):
        read(path)


def test_a_damaged_cell_count_is_an_error(path: Path) -> None:
    """SQLite reads a page with a smaller cell count without an error, but returns fewer rows."""
    content = bytearray(path.read_bytes())
    leaf = max(i for i in range(4096, len(content), 4096) if content[i] == 10)  # leaf of an index
    assert content[leaf + 4] > 1
    content[leaf + 4] -= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"is damaged \(expected 9 rows, got 8\)"):
        read(path)


def test_replaced_values_do_not_change_the_row_count(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.add([("a", 3, b"new"), ("a", 9, b"nine"), ("a", 9, b"ten")])
    assert [(part, value) for _, part, value in read(path)[3::6]] == [(3, b"new"), (9, b"ten")]


def test_a_ledger_of_an_earlier_version_has_no_row_count(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 0")
    assert read(path) == FIRST
    with Ledger(path) as ledger:
        ledger.add([("a", 9, b"nine")])
    with closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (10,)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; expected a file"):
        Ledger(tmp_path)


def test_a_commit_waits_for_the_disk(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
