"""The candidates of a reading in progress, in a ledger from which a killed reading goes on.

The ledger (:mod:`fastadapt.io.ledger`) has three fingerprints; parts are rows of the source but for
the one of ``progress``:

====================  ==========================================================================
``candidate``         domain, hashes, tokens and bytes of a candidate; the domain of a long row
``progress``          part 0: rows read, cursor, counts
``text``              the row of a candidate as JSON, compressed
====================  ==========================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastadapt.data.prepare.selection import Candidate, Shortlist, row_key
from fastadapt.errors import RunError
from fastadapt.io.ledger import Ledger
from fastadapt.io.names import has_file

LEDGER = "candidates.sqlite"
#: Files of a reading that an earlier version began.
OLD = ("journal", "rows")
_CODEC = "zstd"
#: What the message of a full disk ends with.
GO_ON = "What was read is kept: go on with --resume."
_AGAIN = "Begin again with --overwrite."


class Spool:
    """Candidates and counts of a reading in progress.

    Args:
        folder: of the ledger, whose contents are taken up.
        seed: of the order, from which keys follow.
        shortlist: filled with the candidates.

    Attributes:
        read: rows of the source that are done with.
        cursor: ``Stream.cursor()`` after them.
        counts: rows of each domain, and rows left out by reason.
        done: whether the source has been read to its end.

    Raises:
        RunError: the ledger is damaged, cannot be written, or is of an earlier version.
    """

    def __init__(self, folder: Path, seed: int, shortlist: Shortlist) -> None:
        self._seed, self._shortlist = seed, shortlist
        self.read, self.cursor, self.done = 0, None, False
        self.counts: dict[str, Counter[str]] = {"domains": Counter(), "left_out": Counter()}
        self._entries: list[tuple[str, int, bytes]] = []
        for name in OLD:
            if has_file(folder / name):
                raise RunError(f"{folder / name} is of an earlier version. {_AGAIN}")
        self._ledger = Ledger(folder / LEDGER, GO_ON, _AGAIN)
        try:
            self._take_up()
        except BaseException:
            self._ledger.close()
            raise

    def _take_up(self) -> None:
        """Read progress and candidates of the ledger."""
        if (text := self._ledger.get("progress", 0)) is not None:
            entry = json.loads(text)
            self.read, self.cursor, self.done = entry["read"], entry["cursor"], entry["done"]
            self.counts = {name: Counter(counts) for name, counts in entry["counts"].items()}
        for row, text in self._ledger.parts("candidate"):
            self._enter(row, json.loads(text))

    def _enter(self, row: int, values: list[Any]) -> None:
        key = row_key(self._seed, row)
        if len(values) == 1:
            self._shortlist.add_too_long(values[0], key)
        else:
            self._shortlist.add(Candidate(key, row, *values))

    def keep(
        self, row: int, domain: str, hashes: tuple[str, str], tokens: int, values: Any
    ) -> None:
        """Take in a candidate with its row of the source."""
        import pyarrow as pa

        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
        packed = pa.compress(text, codec=_CODEC, asbytes=True)
        self._entries.append(("text", row, packed))
        self._note(row, [domain, *hashes, tokens, len(text)])

    def too_long(self, row: int, domain: str) -> None:
        """Note a row that has too many tokens."""
        self._note(row, [domain])

    def _note(self, row: int, values: list[Any]) -> None:
        self._entries.append(("candidate", row, _packed(values)))
        self._enter(row, values)

    def commit(self, read: int, cursor: Any, *, done: bool = False) -> None:
        """Return once all rows up to ``read`` are done with for good."""
        self.read, self.cursor, self.done = read, cursor, done
        progress = {"read": read, "cursor": cursor, "done": done, "counts": self.counts}
        self._ledger.add([*self._entries, ("progress", 0, _packed(progress))])
        self._entries = []

    def text(self, candidate: Candidate) -> dict[str, Any]:
        """Return the row of a candidate."""
        import pyarrow as pa

        packed = self._ledger.get("text", candidate.row)
        if packed is None:
            raise RunError(f"{self._ledger.path} has no text of row {candidate.row}. {_AGAIN}")
        text = pa.decompress(
            packed, decompressed_size=candidate.unpacked, codec=_CODEC, asbytes=True
        )
        row: dict[str, Any] = json.loads(text)
        return row

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


def _packed(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
