"""Find and read the rows of a data set: files, folders, and datasets of the hub."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from typing_extensions import TypedDict

from fastadapt.data.contents import Content
from fastadapt.data.formats import (
    READABLE,
    SUFFIXES,
    OnBad,
    raise_bad,
    read_files,
    require_columns,
)
from fastadapt.data.hub import load_hub
from fastadapt.data.layouts import PEEKED, Layout, find_layout
from fastadapt.errors import UserError
from fastadapt.io.documents import read_json
from fastadapt.io.names import has_file, typed_path
from fastadapt.organism import resolve

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: Words in names of files and folders that name a split, as in ``datasets``: the word, the split.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # of a split, as the hub names its files
_EXAMPLES = 5  # bad rows whose errors are shown

Policy = Literal["stop", "skip"]


@dataclass(frozen=True)
class Source:
    """A data set, and how it is read.

    Attributes:
        name: a .jsonl, .json, .csv or .parquet file, a folder of .jsonl, .parquet or .csv files or
            of a dataset that ``datasets`` saved, or the id of a dataset on the hub. A folder is
            read in the order of the paths; links are followed. If files or folders in it are named
            after splits (``train-00000.parquet``, ``val/a.jsonl``), only those of ``split`` are
            read. ``datasets`` downloads and caches a dataset of the hub.
        split: split of the hub's dataset or of the folder; ignored for a single file.
        revision: branch, tag or commit on the hub.
        subset: configuration of a hub dataset, or folder within a folder.
        columns: column to read, or prompt,response; None: recognised by name.
    """

    name: str
    split: str = "train"
    revision: str | None = None
    subset: str | None = None
    columns: str | None = None


@dataclass(frozen=True)
class MixedSource:
    """One source of a mixture.

    Attributes:
        source: file, folder or dataset id on the hub.
        weight: share of the training tokens, relative to those of the other sources.
        split, revision, subset, columns: how the source is read; None: as ``data`` says.
    """

    source: str
    weight: float = 1.0
    split: str | None = None
    revision: str | None = None
    subset: str | None = None
    columns: str | None = None

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(
                f"data.train: weight of {self.source!r}: expected a finite number above 0, got "
                f"{self.weight:g}; leave the source out to train without it"
            )


class Row(NamedTuple):
    """A row of a source.

    Attributes:
        where: location of the row for messages ("train.jsonl, line 3").
        number: number of the row in the source, from 0; rows that are left out are counted.
        content: what the row holds.
        values: columns of the row.
    """

    where: str
    number: int
    content: Content
    values: dict[str, Any]


@dataclass
class BadRows:
    """Policy for rows that cannot be read, and a record of these rows.

    Attributes:
        policy: "stop" raises the error of the first one, "skip" leaves them out.
        hint: end of that error's message.
        counts: number of rows by reason, without their locations.
        examples: messages of the first rows.
    """

    policy: Policy = "stop"
    hint: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def take(self, error: UserError, where: str = "") -> None:
        """Raise the error, or count the row.

        Args:
            error: says what is wrong.
            where: location of the row, if the message does not begin with one.
        """
        message = f"{where}: {error}" if where else str(error)
        if self.policy == "stop":
            raise UserError(message + self.hint) from None
        self.counts[str(error) if where else re.sub(r"^.*, (line|row) \d+: ", "", message)] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(message)

    @property
    def n(self) -> int:
        """Number of rows that were left out."""
        return self.counts.total()


def read_contents(
    source: Source, *, optional: Sequence[str] = (), bad: BadRows | None = None
) -> tuple[Layout | None, Iterator[Row]]:
    """Return the :class:`Layout` of a source's columns, and the source's rows in order.

    Args:
        source: the data set.
        optional: columns to read besides those of the content if the source has them.
        bad: what happens to rows that cannot be read; default: the first one is an error.

    Returns:
        The layout, or None if the source has no rows; and an iterator over the rows.

    Raises:
        UserError: the source does not exist, cannot be read, or has no column or several columns
            that may hold the data.
    """
    policy = bad or BadRows()
    # Rows that cannot be read are met again, in their order, when the source is read.
    peeked = read_values(source, (), None, on_bad=lambda _: None)
    first = list(islice(peeked, PEEKED))
    if not first:
        return None, _read(source, None, optional, policy)
    layout = find_layout([row for _, row in first], source.columns, source.name)
    return layout, _read(source, layout, optional, policy)


def _read(
    source: Source, layout: Layout | None, optional: Sequence[str], bad: BadRows
) -> Iterator[Row]:
    bad_lines = 0

    def on_bad(error: UserError) -> None:
        nonlocal bad_lines
        bad_lines += 1
        bad.take(error)

    if layout is None:
        # Only rows that cannot be read, or none: on_bad counts them.
        yield from (Row(w, 0, Content(), v) for w, v in read_values(source, on_bad=on_bad))
        return
    beside = [*layout.beside, *optional]
    rows = read_values(source, layout.columns, beside, on_bad=on_bad)
    for read, (where, values) in enumerate(rows):
        number = read + bad_lines
        try:
            content = layout.read(values)
        except UserError as error:
            bad.take(error, where)
            continue
        yield Row(where, number, content, values)


def read_values(
    source: Source,
    required: Sequence[str] = (),
    optional: Sequence[str] | None = (),
    *,
    on_bad: OnBad = raise_bad,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location and the columns of each row of a source.

    Args:
        source: the data set; its ``columns`` are not used.
        required: columns that each row must have.
        optional: columns to read besides if the source has them; None for all. Rows may hold
            further columns.
        on_bad: called for a row that is malformed or lacks a column.

    Raises:
        UserError: the source does not exist, has no file that can be read, holds malformed JSON
            (the message names the line), or lacks a required column (the message lists the
            columns).
    """
    files = find_files(source.name, source.split, source.subset)
    if files is None:
        return _read_hub(source, required, optional)
    rows = read_files(files, required, optional, on_bad=on_bad)
    return ((row.where, row.values) for row in rows)


class _Saved(TypedDict):
    """Keys of ``state.json`` that ``datasets.Dataset.save_to_disk`` writes."""

    _data_files: list[dict[str, str]]


def located(name: str) -> str:
    """Return the absolute path of a local source; names of the embedded pair and hub ids unchanged.

    A path that is not absolute could be taken for a hub id where nothing is.
    """
    path = typed_path(name, "data source")
    return os.path.abspath(path) if resolve(name) == name and path.exists() else name


def find_files(source: str, split: str, subset: str | None = None) -> list[Path] | None:
    """Return the files of a local source in order, or None for the id of a dataset on the hub.

    Raises:
        UserError: the source does not exist, or has no file of the split that can be read.
    """
    path = typed_path(source, "data source")
    if path.is_dir():
        folder = path / subset if subset else path
        if not folder.is_dir():
            raise UserError(f"data source {source!r}: no folder {subset!r} (data.subset)")
        return _saved_files(folder, split) or _select_files(folder, split)
    if has_file(path):
        return [path]
    looks_local = path.suffix in READABLE or not _HUB_ID.fullmatch(source)
    if looks_local:
        raise UserError(f"data source {source!r}: no such file or folder")
    return None


def _saved_files(folder: Path, split: str) -> list[Path]:
    """Return the files of a dataset that ``datasets`` saved; an empty list if it is none."""
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", dict[str, list[str]])["splits"]
        if split not in splits:
            raise UserError(
                f"data source {str(folder)!r}: no split {split!r} among {', '.join(splits)}"
            )
        folder = folder / Path(split).name
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return []
    state = read_json(folder / "state.json", _Saved)
    return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]


def _select_files(folder: Path, split: str) -> list[Path]:
    files = sorted(_list_files(folder, SUFFIXES)) or sorted(_list_files(folder, (".csv",)))
    if not files:
        raise UserError(
            f"data source {str(folder)!r}: the folder holds no .jsonl or .parquet file, no .csv "
            "file, and no dataset that datasets.save_to_disk wrote"
        )
    names = {path: _split_name(path.relative_to(folder), split.lower()) for path in files}
    if not any(names.values()):
        return files
    chosen = [path for path in files if names[path] == split.lower()]
    if not chosen and split.lower() in _SPLIT_WORDS:
        meant = _SPLIT_WORDS[split.lower()]
        chosen = [path for path in files if _SPLIT_WORDS.get(names[path] or "") == meant]
    if not chosen:
        names_of_files = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        splits = ", ".join(sorted({name for name in names.values() if name}))
        raise UserError(
            f"data source {str(folder)!r}: no file of split {split!r} among {names_of_files}; the "
            f"splits are {splits}; choose one with data.train_split or data.validation_split "
            "(other commands: --split)"
        )
    return chosen


def _list_files(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield the files below a folder with one of ``suffixes``; follow links, each folder once."""
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
                if path.suffix in suffixes:
                    yield path


def _cannot_list(error: OSError) -> NoReturn:
    reason = f"cannot be read: {error.strerror}"
    raise UserError(f"data source {str(error.filename)!r}: {reason}") from None


def _split_name(path: Path, split: str) -> str | None:
    """Return the name of the split of a file in a folder, in lower case; None without one.

    Args:
        path: path below the folder.
        split: a split, in lower case, which may have a name of its own, such as ``train_sft``.

    Example:
        >>> [_split_name(Path(name), "train") for name in ("val/a.jsonl", "chats-train.jsonl")]
        ['val', 'train']
        >>> _split_name(Path("train_sft-00000-of-00002.parquet"), "train")
        'train_sft'
    """
    parts = [part.lower() for part in path.parts]
    file = next(i for i, part in enumerate(parts) if Path(part).suffix in READABLE)
    folders, stem = parts[:file][::-1], Path(parts[file]).stem
    for name in folders:
        if name == split or name in _SPLIT_WORDS:
            return name
    # A digit ends a word of _SPLIT_WORDS (train1), but not a split of another name (fold1, fold10).
    words = "|".join(_SPLIT_WORDS)
    word = re.compile(rf"(?<![^-_. 0-9])({re.escape(split)}(?![^-_. ])|(?:{words})(?![^-_. 0-9]))")
    shard = _SHARD.match(stem)
    if shard and word.search(shard[1]):
        return shard[1]
    matches = (word.search(name) for name in (stem, *folders))
    return next((match[0] for match in matches if match), None)


def _read_hub(
    source: Source, required: Sequence[str], optional: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    name, split = source.name, source.split
    rows = load_hub(name, source.subset, split, source.revision)
    require_columns(rows.column_names, required, f"{name} ({split})")
    if optional is not None:
        columns = [*required, *(column for column in optional if column in rows.column_names)]
        rows = rows.select_columns(columns)
    for number, row in enumerate(rows):
        yield f"{name} ({split}), row {number}", row
