"""Stream the rows of a source in a single pass that can be resumed at any row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastadapt.data.formats import Cursor, read_files, require_columns
from fastadapt.data.sources import find_files, reading_hub
from fastadapt.errors import RunError
from fastadapt.io.atomic import digest_of_input
from fastadapt.io.documents import Count, DocumentError, check
from fastadapt.io.names import typed_path


class SourceStream:
    """Rows of a source in order.

    Args:
        source: file, folder or hub id, see ``fastadapt.data.sources.Source``. A dataset of the
            hub is streamed, not downloaded.
        split: split of the hub's dataset or of the folder.
        revision: branch, tag or commit on the hub. The commit is resolved once.
        required: columns that each row must have.
        optional: columns to read if the source has them.

    Attributes:
        identity: what identifies the rows, as JSON: names and sizes of the files, or the commit of
            the hub's dataset.
    """

    def __init__(
        self,
        source: str,
        *,
        split: str,
        revision: str | None,
        required: Sequence[str],
        optional: Sequence[str] = (),
    ) -> None:
        self._source, self._split = source, split
        self._required, self._optional = tuple(required), tuple(optional)
        self._files = find_files(source, split)
        self._cursor: Any = None
        self._hub: Any = None
        if self._files is not None:
            root = typed_path(source, "data source")
            names = [f.relative_to(root) if f != root else Path(f.name) for f in self._files]
            self._sizes = [path.stat().st_size for path in self._files]
            self.identity: dict[str, Any] = {
                "files": [
                    {"name": name.as_posix(), "bytes": size}
                    for name, size in zip(names, self._sizes, strict=True)
                ]
            }
        else:
            self._open_hub(revision)

    def _open_hub(self, revision: str | None) -> None:
        import datasets
        from huggingface_hub import HfApi

        with reading_hub(self._source, self._split, revision):
            commit = HfApi().dataset_info(self._source, revision=revision).sha
            self._hub = datasets.load_dataset(
                self._source, split=self._split, revision=commit, streaming=True
            )
        columns = self._hub.column_names
        if columns is not None:  # None: unknown until the first row, which is checked too
            require_columns(columns, self._required, f"{self._source} ({self._split})")
        self.identity = {"dataset": self._source, "split": self._split, "revision": commit}

    def rows(self, start: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield location and columns of each row from ``start``, a value of :meth:`cursor`.

        Raises:
            UserError: a file has a malformed row or lacks a column.
            RunError: the hub stopped answering.
        """
        self._cursor = start
        if self._files is None:
            yield from self._hub_rows(start)
            return
        cursor = (0, 0, 0) if start is None else self._check_cursor(start)
        for record in read_files(self._files, self._required, self._optional, cursor):
            self._cursor = record.after
            yield record.where, record.values

    def _check_cursor(self, start: Any) -> Cursor:
        """Return ``start``, which comes from a file, as a cursor; raise if it fits no file."""
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
        from huggingface_hub.errors import HfHubHTTPError

        wanted = {*self._required, *self._optional}
        if start is not None:
            self._hub.load_state_dict(start)
        where = f"{self._source} ({self._split})"
        try:
            # An iterator that is not closed leaves the reader threads of Arrow running, which abort
            # the process at its end.
            with closing(iter(self._hub)) as rows:
                for row in rows:
                    require_columns(row, self._required, where)
                    yield where, {key: value for key, value in row.items() if key in wanted}
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"data source {self._source!r}: the hub stopped answering: {reason}. "
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
