"""A source read once from end to end, with all columns, from any place on; never held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastadapt.data.sources import (
    Cursor,
    find_files,
    read_files,
    reading_hub,
    require_columns,
)
from fastadapt.errors import RunError
from fastadapt.io.atomic import digest_of_input
from fastadapt.io.documents import Count, DocumentError, check
from fastadapt.io.names import typed_path


class Stream:
    """Rows of a source in its order.

    Args:
        source: file, folder or hub id, as in ``fastadapt.data.sources.read_rows``; a dataset of
            the hub is streamed, thus neither cached nor ever on this disk as a whole.
        split: of the hub's dataset or of the folder.
        revision: branch, tag or commit on the hub; what it stands for is looked up once.
        required: columns that each row has.
        optional: columns whose values are given where there are any.

    Attributes:
        identity: what the rows follow from, as JSON: names and sizes of the files, or the commit
            of the hub's dataset.
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
        if columns is not None:  # else known with the first row, which says the same
            require_columns(columns, self._required, f"{self._source} ({self._split})")
        self.identity = {"dataset": self._source, "split": self._split, "revision": commit}

    def rows(self, start: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where each row stands and its columns, from ``start`` (a ``cursor()``) on.

        Raises:
            UserError: a file is not as it must be; it names the place.
            RunError: the hub stopped answering.
        """
        self._cursor = start
        if self._files is None:
            yield from self._hub_rows(start)
            return
        place = (0, 0, 0) if start is None else self._place(start)
        for record in read_files(self._files, self._required, self._optional, place):
            self._cursor = record.after
            yield record.where, record.values

    def _place(self, start: Any) -> Cursor:
        """``start`` as a cursor; it was read from a journal."""
        try:
            check(start, tuple[Count, Count, Count], "cursor")
            first, offset, _ = start
            n, files = len(self._sizes), self._files or ()
            if first >= n:
                raise DocumentError(f"cursor: expected one of {n} files, got {first}")
            if files[first].suffix == ".jsonl" and offset > self._sizes[first]:
                size = self._sizes[first]
                raise DocumentError(f"cursor: expected at most {size} bytes, got {offset}")
        except DocumentError as error:
            raise RunError(f"The journal's {error}; begin again with --overwrite") from None
        return start[0], start[1], start[2]

    def _hub_rows(self, start: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        from huggingface_hub.errors import HfHubHTTPError

        wanted = {*self._required, *self._optional}
        if start is not None:
            self._hub.load_state_dict(start)
        where = f"{self._source} ({self._split})"
        try:
            # Closed by hand: readers ahead in other threads outlive an iterator that is only left.
            with closing(iter(self._hub)) as rows:
                for row in rows:
                    require_columns(row, self._required, where)
                    yield where, {key: value for key, value in row.items() if key in wanted}
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"data source {self._source!r}: the hub stopped answering: {reason}. "
                "--resume goes on from the last row that was kept."
            ) from error

    def cursor(self) -> Any:
        """JSON: the place after the row that was given last."""
        return self._hub.state_dict() if self._files is None else self._cursor

    @property
    def fraction(self) -> float | None:
        """How much of the source has been given, by bytes; None where no one knows."""
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
        """``identity``, with the SHA-256 of each file; the hub's commit is such a hash itself."""
        if self._files is None:
            return self.identity
        described = zip(self.identity["files"], self._files, strict=True)
        return {
            "files": [{**known, "sha256": digest_of_input(path)[1]} for known, path in described]
        }
