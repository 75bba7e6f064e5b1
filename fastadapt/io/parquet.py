"""Read Parquet files that anyone may have written: one error, naming file and column."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastadapt.errors import UserError
from fastadapt.io.files import open_regular

#: Rows for each byte of a file beyond which its footer is not believed but held against its pages.
#: Columns of one value reach 250 to 450 with pyarrow and 600 with DuckDB; the format itself has no
#: bound, since a run of any length takes a few bytes.
_ROWS_PER_BYTE = 1 << 10
_COUNTED = 1 << 16  # rows at a time


@contextmanager
def open_parquet(
    path: str | os.PathLike[str], schema: pa.Schema | None = None
) -> Iterator[pq.ParquetFile]:
    """A Parquet file; what is wrong with it, then or while it is read, is a ``UserError``.

    Args:
        path: of the file.
        schema: columns that it must have, of these types.

    Raises:
        UserError: it is no Parquet file, is damaged, lacks a column, has one of another type, or
            claims more rows than its bytes can hold.
    """
    path = Path(path)
    with parquet_errors(path):
        open_regular(path).close()  # or a pipe would be waited for
    with parquet_errors(path), pq.ParquetFile(path) as file:
        _check_rows(path, file)
        if schema is not None:
            check_columns(path, file.schema_arrow, schema)
        yield file


def read_table(
    path: str | os.PathLike[str],
    schema: pa.Schema | None = None,
    *,
    columns: Sequence[str] | None = None,
    filters: Any = None,
) -> pa.Table:
    """The rows of a Parquet file, or those that pass ``filters``; see :func:`open_parquet`."""
    path = Path(path)
    with open_parquet(path, schema):
        rows = pq.read_table(
            path,
            columns=None if columns is None else list(columns),
            filters=filters,
            partitioning=None,  # a folder called "layer=3" is no column
        )
    check_contents(path, rows, schema)
    return rows


def read_group(
    path: str | os.PathLike[str],
    file: pq.ParquetFile,
    group: int,
    schema: pa.Schema,
) -> pa.Table:
    """The columns of ``schema`` in one row group of an open file; see :func:`open_parquet`."""
    path = Path(path)
    with parquet_errors(path):
        rows = file.read_row_group(group, columns=schema.names)
    check_contents(path, rows, schema)
    return rows


def check_contents(path: Path, rows: pa.Table, schema: pa.Schema | None) -> None:
    """Raise ``UserError`` for a column whose bytes are no values of its type.

    That is text that is not UTF-8, lists that begin behind their end, and, where ``schema`` has a
    column without null, a null in it or in one of its lists.
    """
    for name in rows.column_names:
        column = rows[name]
        try:
            column.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(f"{path}: the column {name!r} is damaged: {_line(error)}") from error
        if schema is None or schema.get_field_index(name) < 0 or schema.field(name).nullable:
            continue
        inner = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if column.null_count or inner.null_count:
            raise UserError(f"{path}: the column {name!r}: expected values, got nulls")


def check_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    """Raise ``UserError`` for a column that is missing or of another type."""
    for field in expected:
        times = found.names.count(field.name)
        if times != 1:
            how = "is missing" if times == 0 else f"is there {times} times"
            raise UserError(f"{path}: the column {field.name!r} {how}")
        if not found.field(field.name).type.equals(field.type):
            raise UserError(
                f"{path}: the column {field.name!r}: expected {field.type}, got "
                f"{found.field(field.name).type}"
            )


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a ``UserError`` that names it."""
    try:
        yield
    # OverflowError, UnicodeDecodeError: a number or a name in the footer that Python cannot hold.
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {_line(error)}") from error


def _check_rows(path: Path, file: pq.ParquetFile) -> None:
    metadata = file.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise UserError(f"{path}: its footer contradicts itself about the number of rows")
    if metadata.num_rows <= path.stat().st_size * _ROWS_PER_BYTE or not metadata.num_columns:
        return
    # To read it at once would reserve memory for what the footer claims.
    first = metadata.schema.column(0).path
    for group, claimed in enumerate(groups):
        held = sum(map(len, file.iter_batches(_COUNTED, row_groups=[group], columns=[first])))
        if held != claimed:
            raise UserError(
                f"{path}: its footer claims {claimed:,} rows in row group {group}, it has {held:,}"
            )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
