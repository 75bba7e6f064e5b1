"""Rows of conversations from a file, a folder or the hub, each with a name for error messages.

Local files are read directly: nothing is copied into a cache, and nothing is fetched.
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
"""Where the row stands ("train.jsonl, line 3") and its conversation, not yet checked."""

Cursor = tuple[int, int, int]
"""A place in a list of files: file, offset in it (bytes of JSONL, rows of Parquet), rows before."""


class Record(NamedTuple):
    """A row of a file: where it stands, its columns, and the place after it."""

    where: str
    values: dict[str, Any]
    after: Cursor


def read_rows(source: str, *, split: str, revision: str | None = None) -> Iterator[Row]:
    """Rows of a source in order.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file; a folder of them, read in order of their paths,
            behind links too (where files, or folders of one file's parts, are named after splits,
            as in ``train-00000.parquet``, those of ``split`` only); or the id of a dataset on the
            hub, which ``datasets`` fetches and caches in its default place.
        split: of the hub's dataset or of the folder. A single file is one split whatever this is.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: nothing there, no file of a known kind, malformed JSON (with its line), or no
            column ``conversations`` (with the columns there are).
    """
    values = read_values(source, split=split, revision=revision)
    return ((where, row[COLUMN]) for where, row in values)


def read_values(
    source: str, *, split: str, revision: str | None = None, optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with further columns: where each stands, and its columns.

    Args:
        source, split, revision: as of :func:`read_rows`, and so are the errors.
        optional: columns beside ``conversations`` that are given where the source has them; others
            may be given too.
    """
    files = find_files(source, split)
    if files is None:
        return _read_hub(source, split, revision, optional)
    return ((row.where, row.values) for row in read_files(files, optional=optional))


def find_files(source: str, split: str) -> list[Path] | None:
    """Files of a local source, in order; None for the id of a dataset on the hub.

    Raises:
        UserError: nothing there, or no file of a known kind or of the split.
    """
    path = typed_path(source, "data source")
    if path.is_dir():
        return _files_of(path, split)
    if has_file(path):
        return [path]
    looks_local = path.suffix in (*SUFFIXES, ".json", ".csv") or not _HUB_ID.fullmatch(source)
    if looks_local:
        raise UserError(f"data source {source!r}: no such file or folder")
    return None


def _files_of(folder: Path, split: str) -> list[Path]:
    files = sorted(_walk(folder))
    if not files:
        raise UserError(f"data source {str(folder)!r}: the folder holds no .jsonl or .parquet file")
    names = {path: _split_name(path.relative_to(folder)) for path in files}
    if not any(name in (*_SPLITS, split) for name in names.values()):
        return files
    chosen = [path for path in files if names[path] == split]
    if not chosen:
        found = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        raise UserError(f"data source {str(folder)!r}: no file of split {split!r} among {found}")
    return chosen


def _walk(folder: Path) -> Iterator[Path]:
    """Files of a known kind below ``folder``, behind links to folders too, each folder once."""
    seen: set[str] = set()
    links = [folder]
    while links:
        start = links.pop(0)
        for place, folders, names in os.walk(start, onerror=_cannot_list):
            real = os.path.realpath(place)
            here = Path(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            shown = sorted(name for name in folders if not name.startswith("."))
            links += [here / name for name in shown if (here / name).is_symlink()]
            folders[:] = [name for name in shown if not (here / name).is_symlink()]
            for name in names:
                path = here / name
                if name.startswith("."):
                    continue
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
    """What may name a split: of parts in a folder such as ``train.parquet``, the folder's name."""
    name = next(part for part in path.parts if Path(part).suffix in SUFFIXES)
    return re.split(r"[-_.]", Path(name).stem)[0]


def read_files(
    paths: Sequence[Path],
    required: Sequence[str] = (COLUMN,),
    optional: Sequence[str] = (),
    start: Cursor = (0, 0, 0),
) -> Iterator[Record]:
    """Rows of ``.jsonl`` and ``.parquet`` files in order, from a place on.

    Args:
        paths: the files.
        required: columns that each row has; without one of them, ``UserError``.
        optional: columns whose values are given where there are any.
        start: ``Record.after`` of the last row that is not wanted any more.
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


_Place = tuple[str, dict[str, Any], int, int]


def _read_jsonl(path: Path, required: Sequence[str], offset: int, before: int) -> Iterator[_Place]:
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
) -> Iterator[_Place]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as file:
        try:
            # Page by page: a row group is never in memory as a whole.
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
                    skipped = min(max(before - done, 0), len(batch))
                    fresh = batch.slice(skipped).to_pylist()
                    for number, values in enumerate(fresh, start=done + skipped + 1):
                        yield f"{path}, row {number}", values, number, number
                    done += len(batch)
        # Arrow reports a damaged footer or page as OSError, text that is not UTF-8 as Python does.
        except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a readable Parquet file: {reason}") from None


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
    """Turn what the hub and ``datasets`` raise while opening a dataset into one ``UserError``."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except (
        datasets.exceptions.DatasetsError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        OSError,  # no connection: the errors of requests and of datasets' own are OSErrors
        ValueError,  # an unknown split, or a name of several configurations
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data source {name!r}: no such file or folder here, and as a dataset of the hub "
            f"(split {split!r}, revision {revision or 'main'!r}) it could not be loaded: {reason}"
        ) from None


def _open(path: Path) -> Any:
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"data source {str(path)!r}: cannot be read: {error.strerror}") from None


def require_columns(columns: Iterable[str], required: Iterable[str], where: str) -> None:
    """Raise ``UserError`` naming the first of the required columns that is not there once."""
    names = list(columns)
    for column in required:
        if column not in names:
            found = ", ".join(repr(name) for name in names) or "none"
            raise UserError(f"{where}: no column {column!r}; the columns are {found}")
        if names.count(column) > 1:
            raise UserError(f"{where}: expected one column {column!r}, got {names.count(column)}")
