"""Read the rows of data files: JSON lines, a JSON array, CSV, Parquet, Arrow."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastadapt.errors import UserError
from fastadapt.io.documents import parse_line, read_json
from fastadapt.io.files import one_line, open_regular

#: Files that a folder is searched for, and all files that can be read.
SUFFIXES = (".jsonl", ".parquet")
READABLE = (*SUFFIXES, ".json", ".csv", ".arrow")

OnBad = Callable[[UserError], None]
"""Called with the error of a row that cannot be read; raises to stop, returns to go on."""

Cursor = tuple[int, int, int]
"""Position in a list of files: index of the file, offset in it (JSONL: bytes; Parquet: rows), and
the number of lines or rows before the position."""


class Record(NamedTuple):
    """A row of a file.

    Attributes:
        where: location of the row, for messages.
        values: columns of the row.
        after: position after the row.
    """

    where: str
    values: dict[str, Any]
    after: Cursor


def raise_bad(error: UserError) -> None:
    """Raise ``error``, which is that of a row that cannot be read."""
    raise error


def read_files(
    paths: Sequence[Path],
    required: Sequence[str] = (),
    optional: Sequence[str] | None = (),
    start: Cursor = (0, 0, 0),
    *,
    on_bad: OnBad = raise_bad,
) -> Iterator[Record]:
    """Yield the rows of files in order, from a position on.

    Args:
        paths: the files.
        required: columns that each row must have.
        optional: columns to read if a file has them; None for all.
        start: ``Record.after`` of the last row that was read before.
        on_bad: called for a row of a text file that is malformed or lacks a column.

    Raises:
        UserError: a file cannot be read, has a malformed row, or lacks a required column.
    """
    first, offset, before = start
    for index, path in enumerate(paths[first:], start=first):
        if path.suffix == ".parquet":
            rows = _read_parquet(path, required, optional, before)
        elif path.suffix == ".arrow":
            rows = _read_arrow(path, required, before)
        elif path.suffix == ".csv":
            rows = _read_csv(path, required, before, on_bad)
        elif path.suffix == ".json" and _is_array(path):
            rows = _read_array(path, required, before, on_bad)
        elif path.suffix in (".jsonl", ".json"):
            rows = _read_jsonl(path, required, offset, before, on_bad)
        else:
            expected = ", ".join(READABLE)
            raise UserError(f"data source {str(path)!r}: expected a file of {expected}")
        for where, values, offset, number in rows:
            yield Record(where, values, (index, offset, number))
        offset = before = 0


#: Location, columns, offset after the row, and number of lines or rows up to it.
_FileRow = tuple[str, dict[str, Any], int, int]


def _read_jsonl(
    path: Path, required: Sequence[str], offset: int, before: int, on_bad: OnBad
) -> Iterator[_FileRow]:
    with _open(path) as file:
        file.seek(offset)
        for number, line in enumerate(file, start=before + 1):
            offset += len(line)
            where = f"{path}, line {number}"
            try:
                row = _parse(line, where, first=number == 1)
                if row is not None:
                    require_columns(row, required, where)
            except UserError as error:
                on_bad(error)
                continue
            if row is not None:
                yield where, row, offset, number


def _parse(line: bytes, where: str, *, first: bool) -> dict[str, Any] | None:
    """Return the object of a line; None for a blank line."""
    try:
        text = line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
    return _object(parse_line(text, where), where) if text else None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _is_array(path: Path) -> bool:
    """Return whether a JSON file holds an array; others hold an object per line."""
    with _open(path) as file:
        return bool(file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


def _read_array(
    path: Path, required: Sequence[str], before: int, on_bad: OnBad
) -> Iterator[_FileRow]:
    rows = read_json(path, list[Any], constants=True)
    for number, row in enumerate(rows[before:], start=before + 1):
        where = f"{path}, row {number}"
        try:
            require_columns(_object(row, where), required, where)
        except UserError as error:
            on_bad(error)
            continue
        yield where, row, number, number


def _read_csv(
    path: Path, required: Sequence[str], before: int, on_bad: OnBad
) -> Iterator[_FileRow]:
    limit = csv.field_size_limit(1 << 30)  # the default is 128 KB a cell
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            names = next(rows, [])
            require_columns(names, required, str(path))
            for number, cells in enumerate(rows, start=1):
                if number <= before or not cells:
                    continue
                where = f"{path}, row {number}"
                if len(cells) != len(names):
                    got = f"expected {len(names)} cells, as in the first line, got {len(cells)}"
                    on_bad(UserError(f"{where}: {got}"))
                    continue
                yield where, dict(zip(names, cells, strict=True)), number, number
    except OSError as error:
        raise _unreadable(path, error) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV: {one_line(error)}") from None
    finally:
        csv.field_size_limit(limit)


def _read_arrow(path: Path, required: Sequence[str], before: int) -> Iterator[_FileRow]:
    import pyarrow as pa

    try:
        with _open(path) as file, pa.ipc.open_stream(file) as batches:
            require_columns(batches.schema.names, required, str(path))
            number = 0
            for batch in batches:
                batch.validate(full=True)
                for row in batch.to_pylist():
                    number += 1
                    if number > before:
                        yield f"{path}, row {number}", row, number, number
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as Arrow: {one_line(error)}") from None


def _read_parquet(
    path: Path, required: Sequence[str], optional: Sequence[str] | None, before: int
) -> Iterator[_FileRow]:
    import pyarrow.parquet as pq

    from fastadapt.io.parquet import parquet_errors

    with _open(path) as file, parquet_errors(path):
        # A small buffer reads page by page, so that no row group is in memory as a whole.
        table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        names = table.schema_arrow.names
        require_columns(names, required, str(path))
        wanted = names if optional is None else (name for name in optional if name in names)
        columns = list(dict.fromkeys((*required, *wanted)))
        done = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if done + rows <= before:
                done += rows
                continue
            for batch in table.iter_batches(256, row_groups=[group], columns=columns):
                # ``done`` rows precede this batch; skip those of its rows before the start.
                skipped = min(max(before - done, 0), len(batch))
                unread = batch.slice(skipped).to_pylist()
                for number, values in enumerate(unread, start=done + skipped + 1):
                    yield f"{path}, row {number}", values, number, number
                done += len(batch)


def _open(path: Path) -> Any:
    try:
        return open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"data source {str(path)!r}: cannot be read: {error.strerror}")


def require_columns(columns: Iterable[str], required: Iterable[str], where: str) -> None:
    """Raise ``UserError`` for the first required column that is missing or occurs twice."""
    names = list(columns)
    for column in required:
        if column not in names:
            listed = ", ".join(map(repr, names)) or "none"
            raise UserError(f"{where}: no column {column!r}; the columns are {listed}")
        if names.count(column) > 1:
            raise UserError(f"{where}: expected one column {column!r}, got {names.count(column)}")
