"""Read untrusted Parquet files; every error is a ``UserError`` that names file and column."""

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
from fastadapt.io.files import one_line, open_regular

#: Rows per byte of a file above which the row counts of the footer are checked by reading. A column
#: of one repeated value reaches 250 to 450 with pyarrow and 600 with DuckDB. The format itself has
#: no bound, since a run of any length takes a few bytes.
_ROWS_PER_BYTE = 1 << 10
_COUNT_ROWS = 1 << 16  # rows per batch when counting


@contextmanager
def open_parquet(
    path: str | os.PathLike[str], schema: pa.Schema | None = None
) -> Iterator[pq.ParquetFile]:
    """Yield an open Parquet file. Errors inside the context are raised as ``UserError``.

    Args:
        path: path of the file.
        schema: columns that the file must have, with their types.

    Raises:
        UserError: the file is no Parquet file, is damaged, lacks a column, has a column of a wrong
            type, or declares more rows than it has.
    """
    path = Path(path)
    with parquet_errors(path):
        open_regular(path).close()  # raise for a pipe, on which pyarrow would block
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
    """Read the rows of a Parquet file that pass ``filters``; raise as :func:`open_parquet` does."""
    path = Path(path)
    with open_parquet(path, schema):
        rows = pq.read_table(
            path,
            columns=None if columns is None else list(columns),
            filters=filters,
            partitioning=None,  # a folder named "layer=3" adds no column
        )
    check_contents(path, rows, schema)
    return rows


def read_group(
    path: str | os.PathLike[str],
    file: pq.ParquetFile,
    group: int,
    schema: pa.Schema,
) -> pa.Table:
    """Read the columns of ``schema`` in one row group; raise as :func:`open_parquet` does."""
    path = Path(path)
    with parquet_errors(path):
        rows = file.read_row_group(group, columns=schema.names)
    check_contents(path, rows, schema)
    return rows


def check_contents(path: Path, rows: pa.Table, schema: pa.Schema | None) -> None:
    """Raise ``UserError`` for a column with invalid values.

    Examples are text that is not UTF-8 and lists whose offsets decrease. A null is invalid in a
    column, or in a list of a column, that ``schema`` declares as not nullable.
    """
    for name in rows.column_names:
        column = rows[name]
        try:
            column.validate(full=True)
        except pa.ArrowException as error:
            raise UserError(f"{path}: the column {name!r} is damaged: {one_line(error)}") from error
        if schema is None or schema.get_field_index(name) < 0 or schema.field(name).nullable:
            continue
        inner = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if column.null_count or inner.null_count:
            raise UserError(f"{path}: the column {name!r}: expected values, got nulls")


def check_columns(path: Path, actual: pa.Schema, expected: pa.Schema) -> None:
    """Raise ``UserError`` for a column that is missing, repeated or of the wrong type."""
    for field in expected:
        n = actual.names.count(field.name)
        if n != 1:
            fault = "is missing" if n == 0 else f"occurs {n} times"
            raise UserError(f"{path}: the column {field.name!r} {fault}")
        if not (kind := actual.field(field.name).type).equals(field.type):
            raise UserError(f"{path}: the column {field.name!r}: expected {field.type}, got {kind}")


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Raise errors of reading Parquet as a ``UserError`` that names the file."""
    try:
        yield
    # OverflowError, UnicodeDecodeError: an invalid number or name in the footer.
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def _check_rows(path: Path, file: pq.ParquetFile) -> None:
    metadata = file.metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise UserError(f"{path}: the row counts in its footer contradict each other")
    if metadata.num_rows <= path.stat().st_size * _ROWS_PER_BYTE or not metadata.num_columns:
        return
    # Reading a group at once would allocate memory for the row count in the footer: count batches.
    first = metadata.schema.column(0).path
    for group, declared in enumerate(groups):
        n = sum(map(len, file.iter_batches(_COUNT_ROWS, row_groups=[group], columns=[first])))
        if n != declared:
            raise UserError(
                f"{path}: row group {group}: expected {declared:,} rows by the footer, got {n:,}"
            )
