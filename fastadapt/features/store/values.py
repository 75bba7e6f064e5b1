"""What the columns of a store's tables may hold: names, places that exist, lists that match.

A reader takes a unit, a token or a text by its number, and a number that is not there would be
another's row, or an ``IndexError``. Whoever reads rows of a table asks here first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastadapt.errors import UserError
from fastadapt.features.store.schema import REGIONS, SAMPLES, TENTHS

#: Columns of numbers that count from 0, and those that must be finite, in whatever table they are.
_FROM_0: tuple[str, ...] = ("count", "rank", "text", "position", "token", "start", "tokens")
_FROM_0 += ("priority",)
_FROM_0 += ("histogram", "by_domain", "by_region", "by_tenth", "promoted", "suppressed", "shown")
_FROM_0 += ("positives", "negatives", "true_positives", "true_negatives")
_FINITE: tuple[str, ...] = ("density", "max", "mean", "norm", "value", "values")
_FINITE += ("promoted_logits", "suppressed_logits", "target", "base")
_NOT_NEGATIVE: tuple[str, ...] = (
    "density",
    "max",
    "mean",
    "norm",
    "value",
    "values",
    "target",
    "base",
)
#: Lists of a row that have the same length.
_ALIKE: Mapping[str, Sequence[Sequence[str]]] = {
    "examples": [("tokens", "values")],
    "lens": [
        ("promoted", "promoted_logits", "promoted_tokens"),
        ("suppressed", "suppressed_logits", "suppressed_tokens"),
    ],
    "texts": [("tokens", "regions")],
}


def require_valid(path: Path, table: str, rows: pa.Table, **limits: Any) -> None:
    """Raise ``UserError`` for the first of :func:`wrong_values`, naming file and column."""
    for wrong in wrong_values(table, rows, **limits):
        raise UserError(f"{path}: {wrong}; collect or judge the features again")


def wrong_values(
    table: str,
    rows: pa.Table,
    *,
    shape: tuple[int, int] | None = None,
    n_tokens: int | None = None,
    n_texts: int | None = None,
    domains: Sequence[str] | None = None,
    n_bins: int | None = None,
) -> Iterator[str]:
    """What is wrong with values of a table's rows, a line for each column.

    Args:
        table: its name.
        rows: some or all of its columns, without null where its schema has none.
        shape: layers and units of a layer; not looked at if not given, and so are the next ones.
        n_tokens: of the vocabulary.
        n_texts: of the store.
        domains: of the store's manifest.
        n_bins: of histograms.
    """
    tops: dict[str, int | None] = {}
    if "layer" in rows.column_names and shape is not None:
        tops = {"layer": shape[0], "feature": shape[1]}
    tops |= {"text": n_texts} if table == "examples" else {}
    tops |= dict.fromkeys(("token", "tokens", "promoted", "suppressed"), n_tokens)
    tops["regions"] = len(REGIONS)
    for name in rows.column_names:
        column = rows[name]
        values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if (name in tops or name in _FROM_0) and pa.types.is_integer(values.type):
            yield from _outside(name, values, tops.get(name))
        if name in _FINITE and pa.types.is_floating(values.type):
            yield from _not_numbers(name, values, name in _NOT_NEGATIVE)
    known: dict[str, Collection[str] | None] = {"sample": SAMPLES, "variant": SAMPLES}
    known |= {"region": REGIONS, "domain": domains}
    for name, names in known.items():
        if name in rows.column_names and names is not None:
            yield from _unknown(name, rows[name], names)
    for names in _ALIKE.get(table, ()):
        there = [name for name in names if name in rows.column_names]
        for name in there[1:]:
            if not np.array_equal(_lengths(rows[name]), _lengths(rows[there[0]])):
                yield f"the column {name!r}: expected lists as long as {there[0]!r} has"
    fixed = {"by_region": len(REGIONS), "by_tenth": TENTHS, "histogram": n_bins}
    fixed["by_domain"] = None if domains is None else len(domains)
    for name, length in fixed.items():
        if name in rows.column_names and length is not None and len(rows):
            odd = np.flatnonzero(_lengths(rows[name]) != length)
            if len(odd):
                found = _lengths(rows[name])[odd[0]]
                yield f"the column {name!r}: expected lists of {length}, got one of {found}"
    if {"position", "start", "tokens"} <= set(rows.column_names):
        at = _ints(rows["position"]) - _ints(rows["start"])
        if np.any((at < 0) | (at >= _lengths(rows["tokens"]))):
            yield "the column 'position': expected a place in the window of 'tokens' from 'start'"


def unsorted(rows: pa.Table, *keys: str) -> Iterator[str]:
    """A line where rows are not sorted by the keys, or two have the same."""
    if len(rows) < 2:
        return
    columns = [_ints(rows[key]) for key in keys]
    before = np.zeros(len(rows) - 1, bool)
    equal = np.ones(len(rows) - 1, bool)
    for column in columns:
        before |= equal & (column[:-1] < column[1:])
        equal &= column[:-1] == column[1:]
    if not before.all():
        at = int(np.flatnonzero(~before)[0]) + 1
        yield f"the columns {', '.join(keys)}: expected distinct rows, sorted; row {at} is not"


# --- parts ----------------------------------------------------------------------------------------


def _outside(name: str, values: pa.ChunkedArray, top: int | None) -> Iterator[str]:
    if len(values) == 0:
        return
    ends = pc.min_max(values).as_py()
    low, high = ends["min"], ends["max"]
    if low < 0 or (top is not None and high >= top):
        expected = "0 or more" if top is None else f"0 to {top - 1:,}"
        yield f"the column {name!r}: expected {expected}, got {low if low < 0 else high:,}"


def _not_numbers(name: str, values: pa.ChunkedArray, from_0: bool) -> Iterator[str]:
    found = values.to_numpy()
    odd = found[~np.isfinite(found)]
    if len(odd):
        yield f"the column {name!r}: expected finite numbers, got {odd[0]}"
    elif from_0 and len(found) and found.min() < 0:
        yield f"the column {name!r}: expected 0 or more, got {found.min()}"


def _unknown(name: str, column: pa.ChunkedArray, names: Collection[str]) -> Iterator[str]:
    odd = [value for value in pc.unique(column).to_pylist() if value is not None]
    odd = sorted(set(odd) - set(names))
    if odd:
        expected = ", ".join(map(repr, names)) or "no value"
        yield f"the column {name!r}: expected {expected:.200}; got {odd[0]!r:.80}"


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.list_value_length(column).to_numpy())


def _ints(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_string(column.type):
        found = {value: i for i, value in enumerate(SAMPLES)}
        return np.array([found.get(value, -1) for value in column.to_pylist()], dtype=np.int64)
    return np.asarray(column.to_numpy()).astype(np.int64)
