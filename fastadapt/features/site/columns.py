"""Reads one layer's features or neurons as flat columns, for the data files of the pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastadapt.errors import UserError
from fastadapt.features.site.shards import NONE, integers
from fastadapt.features.store.ranking import contributions
from fastadapt.features.store.scales import COLUMNS, origins
from fastadapt.features.store.schema import REGIONS, SAMPLES, TENTHS, Kind
from fastadapt.features.store.store import Store

#: Tables that are added to a store after collection, shown on the page of a unit.
JUDGED = ("descriptions", "scores", "classes", "overlap", "effects")
_THINKING = REGIONS.index("thinking")
#: Columns of an example on the page of a unit.
_SHOWN = (
    *("feature", "sample", "text", "position", "value", "region", "domain"),
    *("start", "tokens", "values"),
)
_NO_BYTE = 255  # missing value of a u8 column


@dataclass(frozen=True)
class Layer:
    """Data of the F units (features or neurons) of a layer for their pages: one array per quantity.

    Attributes:
        index: columns of the list: ``[F]``, and ``promoted`` tokens ``[F, K]``.
        detail: columns of the units' pages, ``[F]`` or ``[F, n]``.
        examples: columns of the units' examples: ``example_*`` with one entry per example,
            ``window_*`` with one per token, ``fires_*`` with one per token at which the unit is not
            0.
        first: ``[F + 1]``: index of each unit's first example, then the number of examples.
        notes: rows of the tables ``JUDGED`` by unit and table.
    """

    index: dict[str, np.ndarray]
    detail: dict[str, np.ndarray]
    examples: dict[str, np.ndarray]
    first: np.ndarray
    notes: dict[int, dict[str, list[dict[str, Any]]]]


def read_layer(
    store: Store, kind: Kind, layer: int, domains: Sequence[str], classes: Sequence[Sequence[Any]]
) -> Layer:
    """Read the units (features or neurons) of one layer of a store.

    Args:
        store: the store.
        kind: kind of the units.
        layer: index of the layer.
        domains: domains of the store's texts.
        classes: pairs (class, subclass) of the kind, see :func:`class_names`.

    Raises:
        UserError: a table cannot be read, is not sorted, or has a unit that the layer does not
            have.
    """
    n = store.shape(kind)[1]
    rows = store.read("features", kind, layer=layer)
    units = rows["feature"].to_numpy()

    def column(name: str, dtype: str) -> np.ndarray:
        return _spread(rows[name].to_numpy(), units, n, dtype, 0)

    by_region = _matrix(rows["by_region"], units, n, "<f8", 0)
    contribution = _spread(contributions(rows), units, n, "<f4", 0)
    index = {
        "contribution": contribution,
        "count": column("count", "<f8"),
        "density": column("density", "<f4"),
        "max": column("max", "<f4"),
        "region": np.where(by_region.sum(1) > 0, by_region.argmax(1), _NO_BYTE).astype("<u1"),
    }
    detail = {"mean": column("mean", "<f4"), "norm": column("norm", "<f4")}
    for name in ("histogram", "by_domain", "by_region", "by_tenth"):
        detail[name] = integers(_matrix(rows[name], units, n, "<f8", 0))
    if store.has("lens", kind):
        lens = store.read("lens", kind, layer=layer)
        units = lens["feature"].to_numpy()
        index["promoted"] = _matrix(lens["promoted"], units, n, "<u4", NONE)
        detail["suppressed"] = _matrix(lens["suppressed"], units, n, "<u4", NONE)
        for name in ("promoted_logits", "suppressed_logits"):
            detail[name] = _matrix(lens[name], units, n, "<f4", 0)
    if store.has("scales", kind):
        scales = store.read("scales", kind, layer=layer)
        units = scales["feature"].to_numpy()
        origin = origins(*(scales[name].to_numpy() for name in COLUMNS))
        index["origin"] = _spread(origin, units, n, "<u1", _NO_BYTE)
        index["base_share"] = _spread(scales["base_share"].to_numpy(), units, n, "<f4", np.nan)
        for name in ("base_scale", "target_scale", "difference_scale"):
            detail[name] = _spread(scales[name].to_numpy(), units, n, "<f4", np.nan)
    notes = _notes(store, kind, layer)
    index["class"] = np.full(n, _NO_BYTE, "<u1")
    index["effect"] = np.full(n, -np.inf, "<f4")  # not measured: sorted last
    for unit, tables in notes.items():
        if "effects" in tables:
            index["effect"][unit] = tables["effects"][0]["delta_kl"]
        if "classes" in tables:
            row = tables["classes"][0]
            index["class"][unit] = classes.index([row["class"], row["subclass"]])
    first, examples = _examples(store, kind, layer, domains)
    return Layer(index, detail, examples, first, notes)


def select_descriptions(
    notes: dict[int, dict[str, list[dict[str, Any]]]],
) -> tuple[np.ndarray, list[str]]:
    """Return the units with a description, and one description of each.

    Of several descriptions, the one from the first variant in ``SAMPLES`` is selected.
    """
    units = sorted(unit for unit, tables in notes.items() if "descriptions" in tables)
    rows = [
        min(notes[unit]["descriptions"], key=lambda row: SAMPLES.index(row["variant"]))
        for unit in units
    ]
    return np.array(units, "<u4"), [row["description"] for row in rows]


def class_names(store: Store, kind: Kind) -> list[list[Any]]:
    """Return the pairs (class, subclass) that judges gave to units of a kind, sorted.

    Raises:
        UserError: the kind has more than 255 pairs, the most that a byte can encode.
    """
    if not store.has("classes", kind):
        return []
    names = ["class", "subclass"]
    rows = store.read("classes", kind, columns=names).group_by(names).aggregate([])
    pairs = sorted(
        ([row["class"], row["subclass"]] for row in rows.to_pylist()),
        key=lambda pair: (pair[0], pair[1] or ""),
    )
    if len(pairs) > _NO_BYTE:
        raise UserError(
            f"{store.folder}: expected at most {_NO_BYTE} classes of {kind} units, got {len(pairs)}"
        )
    return pairs


def totals(store: Store, domains: Sequence[str]) -> dict[str, list[int]]:
    """Count the tokens of the store's texts by region, by tenth of the thinking and by domain."""
    by_region, by_tenth = np.zeros(len(REGIONS), np.int64), np.zeros(TENTHS, np.int64)
    by_domain = dict.fromkeys(domains, 0)
    texts = store.read("texts", columns=["domain", "regions"])
    flat, begins = _flatten(texts["regions"])
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


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a column of lists, end to end, and the offsets of the lists."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def _spread(values: np.ndarray, rows: np.ndarray, n: int, dtype: str, empty: float) -> np.ndarray:
    """Return ``[n]`` with ``values`` at ``rows``, and ``empty`` elsewhere."""
    out = np.full(n, empty, dtype)
    out[rows] = values
    return out


def _matrix(
    column: pa.ChunkedArray, rows: np.ndarray, n: int, dtype: str, empty: float
) -> np.ndarray:
    """Return ``[n, longest]`` with the lists of ``column`` as ``rows``, padded with ``empty``."""
    if len(column) == 0:
        return np.full((n, 0), empty, dtype)
    flat, offsets = _flatten(column)
    lengths = np.diff(offsets)
    out = np.full((n, int(lengths.max())), empty, dtype)
    within = np.arange(flat.size) - np.repeat(offsets[:-1], lengths)  # index in its list
    out[np.repeat(rows, lengths), within] = flat
    return out


def _notes(store: Store, kind: Kind, layer: int) -> dict[int, dict[str, list[dict[str, Any]]]]:
    notes: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for table in JUDGED:
        if not store.has(table, kind):
            continue
        rows = store.read(table, kind, layer=layer)
        for row in rows.to_pylist():
            entries = notes.setdefault(row.pop("feature"), {}).setdefault(table, [])
            del row["layer"]
            # JSON has no NaN, which is the value of a share of zero tokens.
            entries.append({key: None if value != value else value for key, value in row.items()})
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
        raise UserError(
            f"{store.path('examples', kind)}: expected rows sorted by feature; collect again"
        )
    tokens, begins = _flatten(rows["tokens"])
    values, value_begins = _flatten(rows["values"])
    if not np.array_equal(begins, value_begins):
        raise UserError(
            f"{store.path('examples', kind)}: expected as many values as tokens in every row; "
            "collect the features again"
        )
    fires = np.flatnonzero(values)
    first_fire = np.searchsorted(fires, begins)  # [rows + 1]: offsets of the examples in `fires`
    example = np.repeat(np.arange(len(rows)), np.diff(first_fire))  # of each entry of `fires`
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
        "example_fires": np.diff(first_fire).astype("<u4"),
        "window_token": tokens.astype("<u4"),
        "fires_at": (fires - begins[example]).astype("<u4"),
        "fires_value": values[fires].astype("<f4"),
    }


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return the index in ``names`` of each entry, ``_NO_BYTE`` for other texts."""
    indices = pc.index_in(column.combine_chunks(), pa.array(names, pa.string()))
    return indices.fill_null(_NO_BYTE).to_numpy(zero_copy_only=False).astype("<u1")


def cut(layer: Layer, low: int, high: int) -> dict[str, np.ndarray]:
    """Return the flat columns that the pages of units ``low`` to ``high - 1`` need."""
    out = {name: column[low:high].reshape(-1) for name, column in layer.detail.items()}
    begin, end = int(layer.first[low]), int(layer.first[high])
    out["examples"] = np.diff(layer.first[low : high + 1]).astype("<u4")
    edges = {"example": (begin, end)}  # range of entries by the prefix of the columns' names
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
    """Yield (index, first unit, end) of each shard (data file of the pages) of a layer.

    Example:
        >>> list(parts(100, 64))
        [(0, 0, 64), (1, 64, 100)]
    """
    for part, low in enumerate(range(0, n_features, span)):
        yield part, low, min(low + span, n_features)
