"""Read rows of conversations from a file, a folder or the hub.

Local files are read in place, without a cache and without the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastadapt.errors import UserError
from fastadapt.io.documents import parse_line
from fastadapt.io.files import open_regular
from fastadapt.io.names import has_file, typed_path

COLUMN = "conversations"
SUFFIXES = (".jsonl", ".parquet")

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SPLITS = ("train", "validation", "test")

Row = tuple[str, Any]
"""Location of the row for messages ("train.jsonl, line 3"), and its unchecked conversation."""

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


def read_rows(source: str, *, split: str, revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of a source in order.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, a folder of such files, or the id of a dataset on
            the hub. A folder is read in the order of the paths; links are followed. If files, or
            folders that hold the parts of one file, are named after splits
            (``train-00000.parquet``), only those of ``split`` are read. ``datasets`` downloads and
            caches a dataset of the hub.
        split: split of the hub's dataset or of the folder; ignored for a single file.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: the source does not exist, has no .jsonl or .parquet file, holds malformed JSON
            (the message names the line), or lacks the column ``conversations`` (the message lists
            the columns).
    """
    values = read_values(source, split=split, revision=revision)
    return ((where, row[COLUMN]) for where, row in values)


def read_values(
    source: str, *, split: str, revision: str | None = None, optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the columns of each row of a source; raise as :func:`read_rows` does.

    Args:
        source, split, revision: see :func:`read_rows`.
        optional: columns to read besides ``conversations`` if the source has them. Rows may hold
            further columns.
    """
    files = find_files(source, split)
    if files is None:
        return _read_hub(source, split, revision, optional)
    return ((row.where, row.values) for row in read_files(files, optional=optional))


def find_files(source: str, split: str) -> list[Path] | None:
    """Return the files of a local source in order, or None for the id of a dataset on the hub.

    Raises:
        UserError: the source does not exist, or has no .jsonl or .parquet file of the split.
    """
    path = typed_path(source, "data source")
    if path.is_dir():
        return _select_files(path, split)
    if has_file(path):
        return [path]
    looks_local = path.suffix in (*SUFFIXES, ".json", ".csv") or not _HUB_ID.fullmatch(source)
    if looks_local:
        raise UserError(f"data source {source!r}: no such file or folder")
    return None


def _select_files(folder: Path, split: str) -> list[Path]:
    files = sorted(_list_files(folder))
    if not files:
        raise UserError(f"data source {str(folder)!r}: the folder holds no .jsonl or .parquet file")
    names = {path: _split_name(path.relative_to(folder)) for path in files}
    if not any(name in (*_SPLITS, split) for name in names.values()):
        return files
    chosen = [path for path in files if names[path] == split]
    if not chosen:
        names_of_files = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        raise UserError(
            f"data source {str(folder)!r}: no file of split {split!r} among {names_of_files}"
        )
    return chosen


def _list_files(folder: Path) -> Iterator[Path]:
    """Yield .jsonl and .parquet files below ``folder``; follow links, visit each folder once."""
    visited: set[str] = set()
    links = [folder]
    while links:
        for root, folders, names in os.walk(links.pop(0), onerror=_cannot_list):
            parent, real = Path(root), os.path.realpath(root)
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            visible = sorted(name for name in folders if not name.startswith("."))
            links += [parent / name for name in visible if (parent / name).is_symlink()]
            folders[:] = [name for name in visible if not (parent / name).is_symlink()]
            for path in (parent / name for name in names if not name.startswith(".")):
                if path.is_symlink() and not path.exists():
                    raise UserError(
                        f"data source {str(folder)!r}: {path} is a link to {os.readlink(path)}, "
                        "which is missing"
                    )
                if path.suffix in SUFFIXES:
                    yield path


def _cannot_list(error: OSError) -> NoReturn:
    reason = f"cannot be read: {error.strerror}"
    raise UserError(f"data source {str(error.filename)!r}: {reason}") from None


def _split_name(path: Path) -> str:
    """Return the part of a path that may name a split: ``train`` for ``train.parquet/part-0``."""
    name = next(part for part in path.parts if Path(part).suffix in SUFFIXES)
    return re.split(r"[-_.]", Path(name).stem)[0]


def read_files(
    paths: Sequence[Path],
    required: Sequence[str] = (COLUMN,),
    optional: Sequence[str] = (),
    start: Cursor = (0, 0, 0),
) -> Iterator[Record]:
    """Yield the rows of ``.jsonl`` and ``.parquet`` files in order, from a position on.

    Args:
        paths: the files.
        required: columns that each row must have.
        optional: columns to read if a file has them.
        start: ``Record.after`` of the last row that was read before.

    Raises:
        UserError: a file cannot be read, has a malformed row, or lacks a required column.
    """
    first, offset, before = start
    for index, path in enumerate(paths[first:], start=first):
        if path.suffix == ".jsonl":
            rows = _read_jsonl(path, required, offset, before)
        elif path.suffix == ".parquet":
            rows = _read_parquet(path, required, optional, before)
        else:
            raise UserError(f"data source {str(path)!r}: expected a .jsonl or .parquet file")
        for where, values, offset, number in rows:
            yield Record(where, values, (index, offset, number))
        offset = before = 0


#: Location, columns, offset after the row, and number of lines or rows up to it.
_FileRow = tuple[str, dict[str, Any], int, int]


def _read_jsonl(
    path: Path, required: Sequence[str], offset: int, before: int
) -> Iterator[_FileRow]:
    with _open(path) as file:
        file.seek(offset)
        for number, line in enumerate(file, start=before + 1):
            offset += len(line)
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
            if not text:
                continue
            row = parse_line(text, where)
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            require_columns(row, required, where)
            yield where, row, offset, number


def _read_parquet(
    path: Path, required: Sequence[str], optional: Sequence[str], before: int
) -> Iterator[_FileRow]:
    import pyarrow.parquet as pq

    from fastadapt.io.parquet import parquet_errors

    with _open(path) as file, parquet_errors(path):
        # A small buffer reads page by page, so that no row group is in memory as a whole.
        table = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        names = table.schema_arrow.names
        require_columns(names, required, str(path))
        columns = [*required, *(name for name in optional if name in names)]
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


def _read_hub(
    name: str, split: str, revision: str | None, optional: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    with reading_hub(name, split, revision):
        rows = datasets.load_dataset(name, split=split, revision=revision)
    require_columns(rows.column_names, (COLUMN,), f"{name} ({split})")
    columns = [COLUMN, *(column for column in optional if column in rows.column_names)]
    for number, row in enumerate(rows.select_columns(columns)):
        yield f"{name} ({split}), row {number}", row


@contextmanager
def reading_hub(name: str, split: str, revision: str | None) -> Iterator[None]:
    """Raise errors of the hub and of ``datasets`` while opening a dataset as ``UserError``."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        OSError,  # no connection: errors of requests and datasets derive from OSError
        ValueError,  # an unknown split, or a dataset with several configurations
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data source {name!r}: no such file or folder, and loading a dataset of this name "
            f"from the hub (split {split!r}, revision {revision or 'main'!r}) failed: {reason}"
        ) from None


def _open(path: Path) -> Any:
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"data source {str(path)!r}: cannot be read: {error.strerror}") from None


def require_columns(columns: Iterable[str], required: Iterable[str], where: str) -> None:
    """Raise ``UserError`` for the first required column that is missing or occurs twice."""
    names = list(columns)
    for column in required:
        if column not in names:
            listed = ", ".join(map(repr, names)) or "none"
            raise UserError(f"{where}: no column {column!r}; the columns are {listed}")
        if names.count(column) > 1:
            raise UserError(f"{where}: expected one column {column!r}, got {names.count(column)}")
