"""Rows of conversations from a file, a folder or the hub, each with a name for error messages.

Local files are read directly: nothing is copied into a cache, and nothing is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError

COLUMN = "conversations"
SUFFIXES = (".jsonl", ".parquet")

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SPLITS = ("train", "validation", "test")

Row = tuple[str, Any]
"""Where the row stands ("train.jsonl, line 3") and its conversation, not yet checked."""


def read_rows(source: str, *, split: str, revision: str | None = None) -> Iterator[Row]:
    """Rows of a source in order.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file; a folder of them, read in order of their paths
            (where files are named after splits, as in ``train-00000.parquet``, those of ``split``
            only); or the id of a dataset on the hub, which ``datasets`` fetches and caches in its
            default place.
        split: of the hub's dataset or of the folder. A single file is one split whatever this is.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: nothing there, no file of a known kind, malformed JSON (with its line), or no
            column ``conversations`` (with the columns there are).
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_files(_files_of(path, split))
    if path.exists():
        return _read_files([path])
    looks_local = path.suffix in (*SUFFIXES, ".json", ".csv") or not _HUB_ID.fullmatch(source)
    if looks_local:
        raise UserError(f"data source {source!r}: no such file or folder")
    return _read_hub(source, split, revision)


def _files_of(folder: Path, split: str) -> list[Path]:
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"data source {str(folder)!r}: the folder holds no .jsonl or .parquet file")
    names = {path: re.split(r"[-_.]", path.stem)[0] for path in files}
    if not any(name in (*_SPLITS, split) for name in names.values()):
        return files
    chosen = [path for path in files if names[path] == split]
    if not chosen:
        found = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        raise UserError(f"data source {str(folder)!r}: no file of split {split!r} among {found}")
    return chosen


def _read_files(paths: Iterable[Path]) -> Iterator[Row]:
    for path in paths:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            raise UserError(f"data source {str(path)!r}: expected a .jsonl or .parquet file")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start}") from None
            if not text:
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: malformed JSON at column {error.colno}: {error.msg}"
                ) from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            _require_column(row, where)
            yield where, row[COLUMN]


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(path) as file:
        try:
            table = pq.ParquetFile(file)
            _require_column(table.schema_arrow.names, str(path))
            number = 0
            for batch in table.iter_batches(columns=[COLUMN], batch_size=256):
                for row in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a readable Parquet file: {reason}") from None


def _read_hub(name: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
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
    _require_column(rows.column_names, f"{name} ({split})")
    for number, row in enumerate(rows.select_columns([COLUMN])):
        yield f"{name} ({split}), row {number}", row[COLUMN]


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"data source {str(path)!r}: cannot be read: {error.strerror}") from None


def _require_column(columns: Iterable[str], where: str) -> None:
    names = list(columns)
    if COLUMN not in names:
        found = ", ".join(repr(name) for name in names) or "none"
        raise UserError(f"{where}: no column {COLUMN!r}; the columns are {found}")
