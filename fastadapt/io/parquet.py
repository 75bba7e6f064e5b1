"""Read Parquet files that anyone may have written: one error, naming file and column."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastadapt.errors import UserError

#: Rows for each byte of a file: what run lengths and compression reach is far below.
_ROWS_PER_BYTE = 1 << 14


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
    with parquet_errors(path), pq.ParquetFile(path) as file:
        _check_rows(path, file.metadata)
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
        return pq.read_table(
            path,
            columns=None if columns is None else list(columns),
            filters=filters,
            partitioning=None,  # a folder called "layer=3" is no column
        )


def check_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    """Raise ``UserError`` for a column that is missing or of another type."""
    for field in expected:
        if found.get_field_index(field.name) < 0:
            raise UserError(f"{path}: the column {field.name!r} is missing, or there are two")
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
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as Parquet: {reason}") from error


def _check_rows(path: Path, metadata: pq.FileMetaData) -> None:
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise UserError(f"{path}: its footer contradicts itself about the number of rows")
    if metadata.num_rows > path.stat().st_size * _ROWS_PER_BYTE:
        raise UserError(f"{path}: its footer claims {metadata.num_rows:,} rows; it is too small")
