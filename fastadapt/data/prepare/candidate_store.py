"""Store the candidates of an unfinished pass over the source, so that the pass can be resumed.

The ledger (:mod:`fastadapt.io.ledger`) has three fingerprints:

====================  ====================  ====================================================
fingerprint           part                  value
====================  ====================  ====================================================
``candidate``         row of the source     domain, hashes, tokens, bytes and marks of a candidate;
                                            domain and reason of a refused row
``progress``          0                     rows read, cursor, counts
``text``              row of the source     the row as compressed JSON
====================  ====================  ====================================================
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
#: Files of an unfinished pass that an earlier version of this library wrote.
OLD = ("journal", "rows")
_CODEC = "zstd"
#: Last sentence of the message of a failed write.
RESUME_ADVICE = "Rows read so far are saved; resume with --resume."
_RESTART = "Start again with --overwrite."


class CandidateStore:
    """Candidates and counts of an unfinished pass over the source, stored in a ledger.

    Args:
        folder: folder of the ledger. An existing ledger is loaded.
        seed: seed of the keys, which order the rows.
        shortlist: receives the candidates of the ledger.

    Attributes:
        read: number of rows of the source that were processed.
        cursor: ``SourceStream.cursor()`` after these rows.
        counts: rows of each domain, and rows left out by reason.
        done: whether the source was read to its end.

    Raises:
        RunError: the ledger is damaged, cannot be written, or was written by an earlier version.
    """

    def __init__(self, folder: Path, seed: int, shortlist: Shortlist) -> None:
        self._seed, self._shortlist = seed, shortlist
        self.read, self.cursor, self.done = 0, None, False
        self.counts: dict[str, Counter[str]] = {"domains": Counter(), "left_out": Counter()}
        self._entries: list[tuple[str, int, bytes]] = []
        for name in OLD:
            if has_file(folder / name):
                message = f"{folder / name} was written by an earlier version of fastadapt in"
                raise RunError(f"{message} a different format. {_RESTART}")
        self._ledger = Ledger(folder / LEDGER, RESUME_ADVICE, _RESTART)
        try:
            self._load()
        except BaseException:
            self._ledger.close()
            raise

    def _load(self) -> None:
        """Load progress and candidates from the ledger."""
        if (text := self._ledger.get("progress", 0)) is not None:
            entry = json.loads(text)
            self.read, self.cursor, self.done = entry["read"], entry["cursor"], entry["done"]
            self.counts = {name: Counter(counts) for name, counts in entry["counts"].items()}
        for row, text in self._ledger.parts("candidate"):
            self._add_to_shortlist(row, json.loads(text))

    def _add_to_shortlist(self, row: int, values: list[Any]) -> None:
        key = row_key(self._seed, row)
        if len(values) == 2:
            self._shortlist.refuse(values[0], key, values[1])
        else:
            self._shortlist.add(Candidate(key, row, *values))

    def add(
        self,
        row: int,
        domain: str,
        hashes: tuple[str, str],
        tokens: int,
        values: Any,
        *,
        marked: bool = False,
    ) -> None:
        """Add a candidate to the shortlist; :meth:`commit` stores the candidate.

        Args:
            row: row of the source, counted from 0.
            domain: domain of the row.
            hashes: hash of the prompt, and hash of the conversation.
            tokens: tokens of the rendered conversation.
            values: columns to write, as JSON.
            marked: whether what was said holds a marker or another special token.
        """
        import pyarrow as pa

        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
        packed = pa.compress(text, codec=_CODEC, asbytes=True)
        self._entries.append(("text", row, packed))
        self._append(row, [domain, *hashes, tokens, len(text), marked])

    def refuse(self, row: int, domain: str, reason: str) -> None:
        """Record a row that is too long or cannot be rendered. :meth:`commit` stores it."""
        self._append(row, [domain, reason])

    def _append(self, row: int, values: list[Any]) -> None:
        self._entries.append(("candidate", row, _to_json(values)))
        self._add_to_shortlist(row, values)

    def commit(self, read: int, cursor: Any, *, done: bool = False) -> None:
        """Write the added rows and the progress to the disk.

        Args:
            read: number of rows of the source that were processed.
            cursor: ``SourceStream.cursor()`` after these rows.
            done: whether the source was read to its end.

        Raises:
            RunError: the ledger cannot be written.
        """
        self.read, self.cursor, self.done = read, cursor, done
        progress = {"read": read, "cursor": cursor, "done": done, "counts": self.counts}
        self._ledger.add([*self._entries, ("progress", 0, _to_json(progress))])
        self._entries = []

    def text(self, candidate: Candidate) -> dict[str, Any]:
        """Return the stored columns of a candidate's row, as JSON values."""
        import pyarrow as pa

        packed = self._ledger.get("text", candidate.row)
        if packed is None:
            raise RunError(f"{self._ledger.path} lacks the text of row {candidate.row}. {_RESTART}")
        text = pa.decompress(
            packed, decompressed_size=candidate.unpacked, codec=_CODEC, asbytes=True
        )
        row: dict[str, Any] = json.loads(text)
        return row

    def __enter__(self) -> CandidateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
