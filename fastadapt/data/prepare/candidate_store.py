"""The texts of candidates on the disk, and a journal from which a killed reading goes on.

Two files that are only appended to. ``rows`` holds each candidate's row, as JSON, compressed.
``journal`` has a line for each candidate and each row that is too long, and after every so many
rows of the source a line that commits all before it, with what is needed to read on. Whatever
follows the last committed line, in either file, was cut short by a kill and is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

import msgspec
from typing_extensions import TypedDict

from fastadapt.data.prepare.selection import Candidate, Shortlist, row_key
from fastadapt.errors import RunError
from fastadapt.io.atomic import cannot_write, disk_errors, open_appended
from fastadapt.io.documents import Count, DocumentError, Positive, check, parse_line
from fastadapt.io.names import has_file

ROWS, JOURNAL = "rows", "journal"
_CODEC = "zstd"
#: What the message of a full disk ends with.
GO_ON = "What was read is kept: go on with --resume."

#: Lines of the journal; see :class:`fastadapt.data.prepare.selection.Candidate`.
_TooLong = tuple[Count, str]
_Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
_Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Kept = tuple[Count, str, _Hash, _Hash, _Tokens, Count, Positive, _Tokens]


Turn = TypedDict("Turn", {"from": str | None, "value": str})


class Row(TypedDict):
    """A row that was kept, as it is written; see :mod:`fastadapt.data.prepare.filter_pass`."""

    conversations: list[Turn]
    domain: str
    source: str | None
    difficulty: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None


class _Counts(TypedDict):
    domains: dict[str, Count]
    left_out: dict[str, Count]


class _Commit(TypedDict):
    read: Count
    cursor: Any
    done: bool
    counts: _Counts
    bytes: Count


class Spool:
    """Candidates and counts of a reading in progress.

    Args:
        folder: of the two files; what they hold already is taken up.
        seed: of the order, from which keys follow.
        shortlist: filled with the candidates.

    Attributes:
        read: rows of the source that are done with.
        cursor: ``Stream.cursor()`` after them.
        counts: rows of each domain, and rows left out by reason.
        done: whether the source has been read to its end.
    """

    def __init__(self, folder: Path, seed: int, shortlist: Shortlist) -> None:
        self._folder, self._seed, self._shortlist = folder, seed, shortlist
        self.read, self.cursor, self.done = 0, None, False
        self.counts: dict[str, Counter[str]] = {"domains": Counter(), "left_out": Counter()}
        self._lines: list[str] = []
        self._packed: list[bytes] = []
        try:
            kept, self._size = self._take_up(folder / JOURNAL)
            with ExitStack() as opened:  # closed where the other one cannot be opened
                self._journal = opened.enter_context(_open(folder / JOURNAL, kept))
                self._rows = opened.enter_context(_open(folder / ROWS, self._size))
                opened.pop_all()
        except OSError as error:
            raise RunError(cannot_write(folder, error, GO_ON)) from error

    def _take_up(self, path: Path) -> tuple[int, int]:
        """Replay the committed part of a journal; its bytes, and those of ``rows``."""
        kept = size = place = end = 0
        pending: list[Any] = []
        if not has_file(path):
            return 0, 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place += len(line)
                where = f"{path}, line {number}"
                try:
                    entry = parse_line(line, where)
                except DocumentError:
                    break  # cut short; so is what may follow
                first = pending[-1][0] + 1 if pending else self.read
                end = self._check(entry, first, end, where)
                if isinstance(entry, list):
                    pending.append(entry)
                    continue
                for one in pending:
                    self._enter(one)
                pending = []
                self.read, self.cursor, self.done = entry["read"], entry["cursor"], entry["done"]
                self.counts = {name: Counter(counts) for name, counts in entry["counts"].items()}
                kept, size = place, entry["bytes"]
        return kept, size

    def _check(self, entry: Any, first: int, end: int, where: str) -> int:
        """Refuse an entry that no reading writes.

        Args:
            entry: of a line.
            first: row of the source that the entry can be of, or be read up to.
            end: bytes of ``rows`` before it; those with it are returned.
            where: file and line.
        """
        is_list = isinstance(entry, list)
        schema = (_TooLong if len(entry) == 2 else _Kept) if is_list else _Commit
        try:
            check(entry, schema, where)
            if is_list:
                if not self._shortlist.knows(entry[1]):
                    raise DocumentError(f"{where}: no such domain: {entry[1]!r:.40}")
                if entry[0] < first:
                    have = f"{first} rows are read before it"
                    raise DocumentError(f"{where}: row {entry[0]}: expected a later one, {have}")
            elif entry["read"] < first:
                raise DocumentError(f"{where}: read: expected {first} or more")
            begins = entry["bytes"] if not is_list else entry[5] if len(entry) > 2 else end
            if begins != end:
                raise DocumentError(f"{where}: expected {end} bytes of {ROWS}, got {begins}")
        except DocumentError as error:
            raise RunError(f"{error}; begin again with --overwrite") from None
        return end + (entry[6] if is_list and len(entry) > 2 else 0)

    def _enter(self, entry: list[Any]) -> None:
        row, domain = entry[:2]
        key = row_key(self._seed, row)
        if len(entry) == 2:
            self._shortlist.add_too_long(domain, key)
        else:
            self._shortlist.add(Candidate(key, row, domain, *entry[2:]))

    def keep(
        self, row: int, domain: str, hashes: tuple[str, str], tokens: int, values: Any
    ) -> None:
        """Take in a candidate with its row of the source."""
        import pyarrow as pa

        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
        packed = pa.compress(text, codec=_CODEC, asbytes=True)
        self._note([row, domain, *hashes, tokens, self._size, len(packed), len(text)])
        self._packed.append(packed)
        self._size += len(packed)

    def too_long(self, row: int, domain: str) -> None:
        """Note a row that has too many tokens."""
        self._note([row, domain])

    def _note(self, entry: list[Any]) -> None:
        self._lines.append(json.dumps(entry, ensure_ascii=False))
        self._enter(entry)

    def commit(self, read: int, cursor: Any, *, done: bool = False) -> None:
        """Return once all rows up to ``read`` are done with for good."""
        self.read, self.cursor, self.done = read, cursor, done
        entry = {
            "read": read,
            "cursor": cursor,
            "done": done,
            "counts": self.counts,
            "bytes": self._size,
        }
        lines = [*self._lines, json.dumps(entry, ensure_ascii=False)]
        with disk_errors(self._folder, GO_ON):
            _append(self._rows, b"".join(self._packed))
            _append(self._journal, "".join(line + "\n" for line in lines).encode())
        self._lines, self._packed = [], []

    def text(self, candidate: Candidate) -> dict[str, Any]:
        """The row that was kept with a candidate."""
        import pyarrow as pa

        packed = os.pread(self._rows.fileno(), candidate.size, candidate.offset)
        path = self._folder / ROWS
        try:
            text = pa.decompress(
                packed, decompressed_size=candidate.unpacked, codec=_CODEC, asbytes=True
            )
            row: dict[str, Any] = parse_line(text, str(path), Row)
        except (pa.ArrowException, OSError, DocumentError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{path} is damaged ({reason}); begin again with --overwrite") from error
        return row

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._journal.close()


def _open(path: Path, size: int) -> FileIO:
    """The file, cut off after ``size`` bytes; unbuffered, so that nothing is written by closing."""
    with ExitStack() as opened:
        file = opened.enter_context(open_appended(path))
        there = os.fstat(file.fileno()).st_size
        if there < size:
            raise RunError(
                f"{path} has {there} bytes, and its journal speaks of {size}: begin again with "
                "--overwrite"
            )
        file.truncate(size)
        opened.pop_all()
    return file


def _append(file: FileIO, data: bytes) -> None:
    """Write all of it and return once it is on the disk."""
    left = memoryview(data)
    while left:
        left = left[os.write(file.fileno(), left) :]
    os.fsync(file.fileno())
