"""Check the values of a store's tables: names, indices in range, lists of equal length.

Readers index units, tokens and texts by number. An index out of range would give the row of a
different unit or an ``IndexError``, so readers of a table check its rows here first.
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

#: Columns of integers from 0, and of finite numbers, in any table.
_FROM_0: tuple[str, ...] = ("count", "rank", "text", "position", "token", "start", "tokens")
_FROM_0 += ("priority",)
_FROM_0 += ("histogram", "by_domain", "by_region", "by_tenth", "promoted", "suppressed", "shown")
_FROM_0 += ("positions",)
_FROM_0 += ("positives", "negatives", "true_positives", "true_negatives")
_NOT_NEGATIVE: tuple[str, ...] = ("density", "max", "mean", "norm", "value", "values")
_NOT_NEGATIVE += ("target", "base", "accuracy")
_SIGNED: tuple[str, ...] = ("promoted_logits", "suppressed_logits", "delta_kl")
_SIGNED += ("base_share", "base_scale", "target_scale", "difference_scale")
_FINITE = (*_NOT_NEGATIVE, *_SIGNED)
#: Columns of each table whose lists have equal lengths in a row.
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
    """Yield a line for each column with impossible values. Limits not given are not checked.

    Args:
        table: name of the table.
        rows: any columns of the table, without null where its schema has none.
        shape: layers, and units per layer.
        n_tokens: size of the vocabulary.
        n_texts: texts of the store.
        domains: domains of the store's manifest.
        n_bins: bins of histograms.
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
        present = [name for name in names if name in rows.column_names]
        for name in present[1:]:
            if not np.array_equal(_lengths(rows[name]), _lengths(rows[present[0]])):
                yield f"the column {name!r}: expected lists as long as those of {present[0]!r}"
    fixed = {"by_region": len(REGIONS), "by_tenth": TENTHS, "histogram": n_bins}
    fixed["by_domain"] = None if domains is None else len(domains)
    for name, length in fixed.items():
        if name in rows.column_names and length is not None and len(rows):
            odd = np.flatnonzero(_lengths(rows[name]) != length)
            if len(odd):
                wrong = _lengths(rows[name])[odd[0]]
                yield f"the column {name!r}: expected lists of {length}, got one of {wrong}"
    if {"position", "start", "tokens"} <= set(rows.column_names):
        offset = _ints(rows["position"]) - _ints(rows["start"])
        if np.any((offset < 0) | (offset >= _lengths(rows["tokens"]))):
            yield "the column 'position': expected a place in the window of 'tokens' from 'start'"


def unsorted(rows: pa.Table, *keys: str) -> Iterator[str]:
    """Yield a line if rows are not sorted by the keys, or two rows have equal keys."""
    if len(rows) < 2:
        return
    columns = [_ints(rows[key]) for key in keys]
    # Lexicographic: row i is before row i + 1 if, at the first key that differs, it is smaller.
    before = np.zeros(len(rows) - 1, bool)
    equal = np.ones(len(rows) - 1, bool)
    for column in columns:
        before |= equal & (column[:-1] < column[1:])
        equal &= column[:-1] == column[1:]
    if not before.all():
        row = int(np.flatnonzero(~before)[0]) + 1
        yield f"the columns {', '.join(keys)}: expected distinct rows, sorted; row {row} is not"


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
    numbers = values.to_numpy()
    if name == "accuracy":  # NaN: the share of no texts
        numbers = numbers[~np.isnan(numbers)]
    odd = numbers[~np.isfinite(numbers)]
    if len(odd):
        yield f"the column {name!r}: expected finite numbers, got {odd[0]}"
    elif from_0 and len(numbers) and numbers.min() < 0:
        yield f"the column {name!r}: expected 0 or more, got {numbers.min()}"


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
        order = {value: i for i, value in enumerate(SAMPLES)}
        return np.array([order.get(value, -1) for value in column.to_pylist()], dtype=np.int64)
    return np.asarray(column.to_numpy()).astype(np.int64)
