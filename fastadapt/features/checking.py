"""Check a whole store: every file against the manifest, every row against other tables.

Other readers check only the rows that they read. This one reads every table, with one row group in
memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastadapt.errors import UserError
from fastadapt.features.autointerp.judgements import JSON, read_judgements
from fastadapt.features.store.schema import EDGES, MANIFEST, SHARED, TABLES, Kind
from fastadapt.features.store.sets import FOLDER, list_sets
from fastadapt.features.store.store import Store
from fastadapt.features.store.values import unsorted, wrong_values
from fastadapt.io.names import has_file
from fastadapt.io.parquet import open_parquet, read_group

_MOST_LINES = 8  # reported per file


@dataclass
class Checked:
    """Result of checking one file of a store.

    Attributes:
        name: path within the store's folder.
        rows: rows of a table, or features of a set; None for other files.
        hashed: whether the manifest has the file's size and SHA-256.
        wrong: a line for each defect; empty if the file is sound.
        note: a remark that is not a defect.
    """

    name: str
    rows: int | None = None
    hashed: bool = False
    wrong: list[str] = field(default_factory=list)
    note: str = ""


def check_store(store: Store) -> list[Checked]:
    """Check every file of a store; defects are returned, not raised.

    Args:
        store: opened with ``complete=False``; otherwise opening raises for missing files.
    """
    files = {name: Checked(name, hashed=True) for name in sorted(store.manifest["files"])}
    for name, checked in files.items():
        path = store.folder / name
        try:
            if not has_file(path):
                checked.wrong.append("the file is missing")
                continue
            store.check_file(path)
        except UserError as error:
            checked.wrong.append(str(error).removeprefix(f"{path} "))
    if tuple(store.manifest["edges"]) != EDGES:
        line = f"edges: expected the {len(EDGES)} edges of this version's histograms, got others"
        files[MANIFEST] = Checked(MANIFEST, wrong=[line])
    # Tokens and texts first: their rows bound the indices of the other tables.
    known: dict[str, int] = {}
    lengths = np.zeros(0, np.int64)
    tables: list[tuple[str, Kind]] = [("tokens", "adapter"), ("texts", "adapter")]
    tables += [(table, kind) for kind in store.kinds for table in TABLES]
    for table, kind in tables:
        name = store.path(table, kind).relative_to(store.folder).as_posix()
        if not store.has(table, kind):
            required = table in (*SHARED, "features")
            if required and name not in files:
                files[name] = Checked(name, wrong=["the file is missing"])
            continue
        checked = files.setdefault(name, Checked(name))
        reader = _Reader(store, table, kind, known, lengths)
        try:
            for line in reader.lines():
                if line not in checked.wrong and len(checked.wrong) < _MOST_LINES:
                    checked.wrong.append(line)
        except UserError as error:
            checked.wrong.append(str(error).removeprefix(f"{store.path(table, kind)}: "))
            continue
        checked.rows = known[table] = reader.rows
        if table == "texts":
            lengths = reader.lengths
    return [*files.values(), *_others(store)]


class _Reader:
    """Checks one table of a store, one row group at a time."""

    def __init__(
        self, store: Store, table: str, kind: Kind, known: dict[str, int], lengths: np.ndarray
    ) -> None:
        self._store, self._table, self._kind = store, table, kind
        self._n_tokens, self._text_lengths = known.get("tokens"), lengths
        self.rows = 0
        self.lengths = np.zeros(0, np.int64)

    def lines(self) -> Iterator[str]:
        """Yield a line for each defect of the table, in the order of its rows."""
        table, store = self._table, self._store
        schema = SHARED[table] if table in SHARED else TABLES[table]
        path = store.path(table, self._kind)
        before: pa.Table | None = None
        keys = [name for name in ("layer", "feature", "sample", "rank") if name in schema.names]
        if table not in ("features", "examples", "lens", "overlap", "effects", "scales"):
            keys = []  # with several judges, units occur more than once
        limits = {**store.limits(self._kind), "n_tokens": self._n_tokens}
        lengths = []
        with open_parquet(path, schema) as file:
            for group in range(file.num_row_groups):
                rows = read_group(path, file, group, schema)
                yield from wrong_values(table, rows, **limits)
                if keys:
                    last = rows if before is None else pa.concat_tables([before, rows])
                    yield from unsorted(last.select(keys), *keys)
                    before = rows.slice(len(rows) - 1) if len(rows) else before
                check = _CHECKS.get(table)
                if check is not None:
                    yield from check(self, rows)
                if table == "texts":
                    lengths.append(pc.list_value_length(rows["tokens"]).to_numpy())
                self.rows += len(rows)
        self.lengths = np.concatenate([self.lengths, *lengths]).astype(np.int64)
        yield from self._counts()

    def _counts(self) -> Iterator[str]:
        data = self._store.manifest["data"]
        n_layers, n_features = self._store.shape(self._kind) if self._table in TABLES else (0, 0)
        expected = {"features": n_layers * n_features, "texts": data["texts"]}
        if self._table == "lens":
            expected["lens"] = n_layers * n_features
        if (n := expected.get(self._table)) is not None and self.rows != n:
            yield f"expected {n:,} rows, as the manifest says; got {self.rows:,}"
        if self._table == "texts" and (total := int(self.lengths.sum())) != data["tokens"]:
            yield f"the column 'tokens': the manifest says {data['tokens']:,} tokens, got {total:,}"

    # --- checks of single tables ------------------------------------------------------------------

    def _check_numbers(self, rows: pa.Table) -> Iterator[str]:
        name = "text" if self._table == "texts" else "token"
        if not np.array_equal(rows[name].to_numpy(), np.arange(len(rows)) + self.rows):
            yield f"the column {name!r}: expected the number of its row"

    def _check_features(self, rows: pa.Table) -> Iterator[str]:
        count = rows["count"].to_numpy()
        tokens = self._store.manifest["data"]["tokens"]
        if not np.allclose(rows["density"].to_numpy() * tokens, count, rtol=1e-6, atol=0):
            yield "the column 'density': expected 'count' over the manifest's tokens"
        for name in ("histogram", "by_region"):
            parts = pc.list_parent_indices(rows[name]).to_numpy()
            sums = np.bincount(parts, pc.list_flatten(rows[name]).to_numpy(), len(rows))
            if not np.array_equal(sums, count):
                yield f"the column {name!r}: expected lists that sum to 'count'"

    def _check_examples(self, rows: pa.Table) -> Iterator[str]:
        text, position = rows["text"].to_numpy(), rows["position"].to_numpy()
        n = len(self._text_lengths)
        if not n or not len(rows) or text.min() < 0 or text.max() >= n:
            return  # wrong_values reports it, or the texts cannot be read
        if np.any(position >= self._text_lengths[text]):
            yield "the column 'position': expected a place in its text"
        offset = position - rows["start"].to_numpy()
        lengths = pc.list_value_length(rows["tokens"]).to_numpy()
        same = np.array_equal(lengths, pc.list_value_length(rows["values"]).to_numpy())
        if not same or np.any((offset < 0) | (offset >= lengths)):
            return  # wrong_values reports it
        index = np.cumsum(lengths) - lengths + offset  # into the flattened lists
        for one, many in (("token", "tokens"), ("value", "values")):
            expected = pc.list_flatten(rows[many]).to_numpy()[index]
            if not np.array_equal(expected, rows[one].to_numpy()):
                yield f"the column {one!r}: expected what {many!r} has at 'position'"


_CHECKS: dict[str, Callable[[_Reader, pa.Table], Iterator[str]]] = {
    "tokens": _Reader._check_numbers,
    "texts": _Reader._check_numbers,
    "features": _Reader._check_features,
    "examples": _Reader._check_examples,
}


def _others(store: Store) -> Iterator[Checked]:
    for entry in list_sets(store) if "adapter" in store.manifest["units"] else []:
        name = f"{FOLDER}/{entry['name']}.json"
        if "broken" in entry:
            yield Checked(name, wrong=[str(entry["broken"])])
        else:
            note = "of another adapter: select it again" if entry["stale"] else ""
            yield Checked(name, entry["size"], note=note)
    if os.path.lexists(store.folder / JSON):
        checked = Checked(JSON)
        try:
            read_judgements(store)
        except UserError as error:
            checked.wrong.append(str(error))
        yield checked
