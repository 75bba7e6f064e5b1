"""Stream the rows of a source in a single pass that can be resumed at any row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from fastadapt.data.formats import SUFFIXES, Cursor, OnBad, raise_bad, read_files, require_columns
from fastadapt.data.hub import hub_errors, reading_hub
from fastadapt.data.layouts import PEEKED, find_layout
from fastadapt.data.sources import Source, find_files
from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import digest_of_input
from fastadapt.io.documents import Count, DocumentError, check
from fastadapt.io.names import typed_path


class SourceStream:
    """Rows of a source in order.

    Args:
        source: the data set. A dataset of the hub is streamed, not downloaded; the commit of its
            revision is resolved once.
        optional: columns to read besides those of the content if the source has them.

    Attributes:
        identity: what identifies the rows, as JSON: names and sizes of the files, or the commit of
            the hub's dataset.
        columns: columns of the first rows.
        layout: what the columns hold.

    Raises:
        UserError: the source does not exist, cannot be read or has no row, or it has no column or
            several columns that may hold the data.
    """

    def __init__(self, source: Source, *, optional: Sequence[str] = ()) -> None:
        self._source = source
        self._files = find_files(source.name, source.split, source.subset)
        self._cursor: Any = None
        self._hub: Any = None
        if self._files is not None:
            root = typed_path(source.name, "data source")
            names = [f.relative_to(root) if f != root else Path(f.name) for f in self._files]
            self._sizes = [path.stat().st_size for path in self._files]
            self.identity: dict[str, Any] = {
                "files": [
                    {"name": name.as_posix(), "bytes": size}
                    for name, size in zip(names, self._sizes, strict=True)
                ]
            }
        else:
            self._open_hub()
        first = self._first_rows()
        self.columns = list(dict.fromkeys(name for row in first for name in row))
        self.layout = find_layout(first, source.columns, source.name)
        self._optional = tuple(dict.fromkeys((*self.layout.beside, *optional)))

    @property
    def _where(self) -> str:
        return f"{self._source.name} ({self._source.split})"

    def _open_hub(self) -> None:
        import datasets
        from huggingface_hub import HfApi

        name, split, revision = self._source.name, self._source.split, self._source.revision
        subset = () if self._source.subset is None else (self._source.subset,)
        with reading_hub(name, split, revision):
            commit = HfApi().dataset_info(name, revision=revision).sha
            self._hub = datasets.load_dataset(
                name, *subset, split=split, revision=commit, streaming=True
            )
        self.identity = {"dataset": name, "split": split, "revision": commit}
        if subset:
            self.identity["subset"] = subset[0]

    def _first_rows(self) -> list[dict[str, Any]]:
        """Return the first rows that can be read; raise the first error if there are none."""
        errors: list[UserError] = []
        if self._files is None:
            source = self._source
            with (
                reading_hub(source.name, source.split, source.revision),
                closing(iter(self._hub.take(PEEKED))) as stream,
            ):
                rows = list(stream)
        else:
            records = read_files(self._files, (), None, on_bad=errors.append)
            rows = [record.values for record in islice(records, PEEKED)]
        if not rows:
            empty = f"data source {self._source.name!r}: expected at least one row, got none"
            raise errors[0] if errors else UserError(empty)
        return rows

    def rows(
        self, start: Any = None, on_bad: OnBad = raise_bad
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield location and columns of each row.

        Args:
            start: a value of :meth:`cursor`, after which the rows begin; None: all rows.
            on_bad: called for a row that is malformed or lacks a column.

        Raises:
            UserError: a file cannot be read or lacks a column.
            RunError: the hub stopped answering.
        """
        self._cursor = start
        if self._files is None:
            yield from self._hub_rows(start)
            return
        cursor = (0, 0, 0) if start is None else self._check_cursor(start)
        wanted = self.layout.columns, self._optional
        for record in read_files(self._files, *wanted, cursor, on_bad=on_bad):
            self._cursor = record.after
            yield record.where, record.values

    def _check_cursor(self, start: Any) -> Cursor:
        """Return ``start``, read from saved progress, as a cursor; raise if it lies in no file."""
        try:
            check(start, tuple[Count, Count, Count], "cursor")
            first, offset, _ = start
            n, files = len(self._sizes), self._files or ()
            if first >= n:
                raise DocumentError(f"cursor: expected a file below {n}, got {first}")
            if files[first].suffix == ".jsonl" and offset > self._sizes[first]:
                size = self._sizes[first]
                raise DocumentError(f"cursor: expected at most {size} bytes, got {offset}")
        except DocumentError as error:
            raise RunError(f"Saved progress: {error}; start again with --overwrite") from None
        return start[0], start[1], start[2]

    def _hub_rows(self, start: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        wanted = {*self.layout.columns, *self._optional}
        if start is not None:
            self._hub.load_state_dict(start)
        try:
            # An iterator that is not closed leaves the reader threads of Arrow running, which abort
            # the process at its end.
            with closing(iter(self._hub)) as rows:
                for row in rows:
                    require_columns(row, self.layout.columns, self._where)
                    yield self._where, {key: value for key, value in row.items() if key in wanted}
        except hub_errors() as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"data source {self._source.name!r}: the hub stopped answering: {reason}. "
                "Rows read so far are saved; resume with --resume."
            ) from error

    def cursor(self) -> Any:
        """Return the position after the last row that was yielded, as JSON."""
        return self._hub.state_dict() if self._files is None else self._cursor

    @property
    def fraction(self) -> float | None:
        """Fraction of the source's bytes that were read; None if unknown."""
        if self._files is None or self._cursor is None:
            return None
        index, offset, _ = self._cursor
        path, size = self._files[index], self._sizes[index]
        if path.suffix not in SUFFIXES:
            return None  # the offset counts rows, whose number is unknown
        if path.suffix == ".parquet":
            from fastadapt.io.parquet import open_parquet

            with open_parquet(path) as file:
                offset = round(size * offset / max(file.metadata.num_rows, 1))
        return (sum(self._sizes[:index]) + offset) / max(sum(self._sizes), 1)

    def hashed(self) -> dict[str, Any]:
        """Return ``identity`` with the SHA-256 of each file; a commit of the hub needs none."""
        if self._files is None:
            return self.identity
        files = zip(self.identity["files"], self._files, strict=True)
        return {"files": [{**file, "sha256": digest_of_input(path)[1]} for file, path in files]}
