"""What a store says of the units of one layer, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastadapt.errors import UserError
from fastadapt.features.site.shards import NONE, integers
from fastadapt.features.store.schema import REGIONS, SAMPLES, TENTHS, Kind
from fastadapt.features.store.store import Store

#: Tables of what judges said, beside the collected ones; shown on the page of a unit.
JUDGED = ("descriptions", "scores", "classes", "overlap")
_THINKING = REGIONS.index("thinking")
#: Columns of an example that the pages show.
_SHOWN = (
    *("feature", "sample", "text", "position", "value", "region", "domain"),
    *("start", "tokens", "values"),
)
_NO_BYTE = 255  # of a column of u8: no entry here


@dataclass(frozen=True)
class Layer:
    """The units of a layer.

    Attributes:
        index: columns of the list: an entry per unit, promoted tokens ``[F, K]``.
        detail: columns of the units' pages that are matrices, an entry or row per unit.
        examples: columns of the units' examples; the three kinds of entries are told apart by
            their number: of ``example_*`` one per example, of ``window_*`` one per token, of
            ``fires_*`` one per token at which the unit is not 0.
        first: ``[F + 1]``, each unit's first example, and the number of all.
        notes: of the units that judges spoke of, their rows by table.
    """

    index: dict[str, np.ndarray]
    detail: dict[str, np.ndarray]
    examples: dict[str, np.ndarray]
    first: np.ndarray
    notes: dict[int, dict[str, list[dict[str, Any]]]]


def read_layer(
    store: Store, kind: Kind, layer: int, domains: Sequence[str], classes: Sequence[Sequence[Any]]
) -> Layer:
    """The units of a layer.

    Args:
        domains: of the store.
        classes: (class, subclass) of the kind, as :func:`class_names` gives them.

    Raises:
        UserError: a table cannot be read, or has units that the layer has not.
    """
    n = store.shape(kind)[1]
    rows = store.read("features", kind, layer=layer)
    where = rows["feature"].to_numpy()

    def column(name: str, dtype: str) -> np.ndarray:
        out = np.zeros(n, dtype)
        out[where] = rows[name].to_numpy()
        return out

    by_region = _matrix(rows["by_region"], where, n, "<f8", 0)
    index = {
        "count": column("count", "<f8"),
        "density": column("density", "<f4"),
        "max": column("max", "<f4"),
        "region": np.where(by_region.sum(1) > 0, by_region.argmax(1), _NO_BYTE).astype("<u1"),
    }
    detail = {"mean": column("mean", "<f4"), "norm": column("norm", "<f4")}
    for name in ("histogram", "by_domain", "by_region", "by_tenth"):
        detail[name] = integers(_matrix(rows[name], where, n, "<f8", 0))
    if store.has("lens", kind):
        lens = store.read("lens", kind, layer=layer)
        where = lens["feature"].to_numpy()
        index["promoted"] = _matrix(lens["promoted"], where, n, "<u4", NONE)
        detail["suppressed"] = _matrix(lens["suppressed"], where, n, "<u4", NONE)
        for name in ("promoted_logits", "suppressed_logits"):
            detail[name] = _matrix(lens[name], where, n, "<f4", 0)
    notes = _notes(store, kind, layer)
    index["class"] = np.full(n, _NO_BYTE, "<u1")
    for unit, said in notes.items():
        if "classes" in said:
            chosen = said["classes"][0]
            index["class"][unit] = classes.index([chosen["class"], chosen["subclass"]])
    first, examples = _examples(store, kind, layer, domains)
    return Layer(index, detail, examples, first, notes)


def described(notes: dict[int, dict[str, list[dict[str, Any]]]]) -> tuple[np.ndarray, list[str]]:
    """Units with a description, and it: made of the strongest examples if there are several."""
    units = sorted(unit for unit, said in notes.items() if "descriptions" in said)
    chosen = [
        min(notes[unit]["descriptions"], key=lambda row: SAMPLES.index(row["variant"]))
        for unit in units
    ]
    return np.array(units, "<u4"), [row["description"] for row in chosen]


def class_names(store: Store, kind: Kind) -> list[list[Any]]:
    """Every (class, subclass) of a kind, sorted.

    Raises:
        UserError: there are more than a byte can tell apart.
    """
    if not store.has("classes", kind):
        return []
    names = ["class", "subclass"]
    rows = store.read("classes", kind, columns=names).group_by(names).aggregate([])
    found = sorted(
        ([row["class"], row["subclass"]] for row in rows.to_pylist()),
        key=lambda pair: (pair[0], pair[1] or ""),
    )
    if len(found) > _NO_BYTE:
        raise UserError(f"{store.folder}: {len(found)} classes of {kind} units, at most 255 fit")
    return found


def totals(store: Store, domains: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of the store's texts by region, by tenth of the thinking, by domain."""
    by_region, by_tenth = np.zeros(len(REGIONS), np.int64), np.zeros(TENTHS, np.int64)
    by_domain = dict.fromkeys(domains, 0)
    texts = store.read("texts", columns=["domain", "regions"])
    flat, begins = _flat(texts["regions"])
    for domain, begin, end in zip(texts["domain"].to_pylist(), begins, begins[1:], strict=False):
        regions = flat[begin:end]
        by_region += np.bincount(regions, minlength=len(REGIONS))
        thinking = int((regions == _THINKING).sum())
        if thinking:
            tenths = np.arange(thinking) * TENTHS // thinking
            by_tenth += np.bincount(tenths, minlength=TENTHS)
        if domain in by_domain:
            by_domain[domain] += regions.size
    return {
        "region": by_region.tolist(),
        "tenth": by_tenth.tolist(),
        "domain": list(by_domain.values()),
    }


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Entries of all lists, and ``[rows + 1]`` where each begins."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def _matrix(
    column: pa.ChunkedArray, where: np.ndarray, n: int, dtype: str, empty: float
) -> np.ndarray:
    """Lists as the rows ``where`` of ``[n, longest]``, filled up with ``empty``."""
    if len(column) == 0:
        return np.full((n, 0), empty, dtype)
    flat, offsets = _flat(column)
    lengths = np.diff(offsets)
    out = np.full((n, int(lengths.max())), empty, dtype)
    within = np.arange(flat.size) - np.repeat(offsets[:-1], lengths)
    out[np.repeat(where, lengths), within] = flat
    return out


def _notes(store: Store, kind: Kind, layer: int) -> dict[int, dict[str, list[dict[str, Any]]]]:
    notes: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for table in JUDGED:
        if not store.has(table, kind):
            continue
        rows = store.read(table, kind, layer=layer)
        for row in rows.to_pylist():
            said = notes.setdefault(row.pop("feature"), {}).setdefault(table, [])
            del row["layer"]
            # NaN is no JSON: a share of nothing is none.
            said.append({key: None if value != value else value for key, value in row.items()})
    return notes


def _examples(
    store: Store, kind: Kind, layer: int, domains: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    n = store.shape(kind)[1]
    if not store.has("examples", kind):
        return np.zeros(n + 1, np.int64), {}
    rows = store.read("examples", kind, layer=layer, columns=_SHOWN)
    units = rows["feature"].to_numpy()
    if np.any(np.diff(units) < 0):
        raise UserError(f"{store.path('examples', kind)} is not sorted by feature")
    tokens, begins = _flat(rows["tokens"])
    values, others = _flat(rows["values"])
    if not np.array_equal(begins, others):
        raise UserError(f"{store.path('examples', kind)}: tokens and values differ in length")
    fires = np.flatnonzero(values)
    before = np.searchsorted(fires, begins)  # of each example's first token
    of_example = np.repeat(np.arange(len(rows)), np.diff(before))
    return np.searchsorted(units, np.arange(n + 1)), {
        "example_sample": _codes(rows["sample"], SAMPLES),
        "example_region": _codes(rows["region"], REGIONS),
        "example_domain": _codes(rows["domain"], domains),
        **{
            f"example_{name}": rows[name].to_numpy().astype(dtype)
            for name, dtype in (
                ("text", "<u4"),
                ("position", "<u4"),
                ("start", "<u4"),
                ("value", "<f4"),
            )
        },
        "example_tokens": np.diff(begins).astype("<u4"),
        "example_fires": np.diff(before).astype("<u4"),
        "window_token": tokens.astype("<u4"),
        "fires_at": (fires - begins[of_example]).astype("<u4"),
        "fires_value": values[fires].astype("<f4"),
    }


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    found = pc.index_in(column.combine_chunks(), pa.array(names, pa.string()))
    return found.fill_null(_NO_BYTE).to_numpy(zero_copy_only=False).astype("<u1")


def cut(layer: Layer, low: int, high: int) -> dict[str, np.ndarray]:
    """The columns of the pages of units ``low`` to ``high - 1``."""
    out = {name: column[low:high].reshape(-1) for name, column in layer.detail.items()}
    begin, end = int(layer.first[low]), int(layer.first[high])
    out["examples"] = np.diff(layer.first[low : high + 1]).astype("<u4")
    edges = {"example": (begin, end)}
    for name, counted in (("window", "example_tokens"), ("fires", "example_fires")):
        if counted in layer.examples:
            lengths = layer.examples[counted]
            start = int(lengths[:begin].sum(dtype=np.int64))
            edges[name] = (start, start + int(lengths[begin:end].sum(dtype=np.int64)))
    for name, column in layer.examples.items():
        start, stop = edges[name.split("_")[0]]
        out[name] = column[start:stop]
    return out


def parts(n_features: int, span: int) -> Iterator[tuple[int, int, int]]:
    """(number, first unit, end) of the shards of a layer."""
    for part, low in enumerate(range(0, n_features, span)):
        yield part, low, min(low + span, n_features)
