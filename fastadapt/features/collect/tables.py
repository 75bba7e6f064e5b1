"""Write the tables of a store from statistics, with one layer in memory at a time."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from fastadapt.errors import RunError, UserError
from fastadapt.features.collect import exact_sums
from fastadapt.features.collect.feature_stats import FeatureStats
from fastadapt.features.collect.scale_sums import scales_of
from fastadapt.features.collect.topk_buffer import POSITION_BITS
from fastadapt.features.store.regions import THINKING
from fastadapt.features.store.scales import shares_in_base
from fastadapt.features.store.schema import (
    EXAMPLES,
    FEATURES,
    REGIONS,
    SAMPLES,
    SCALES,
    TEXTS,
)
from fastadapt.features.store.store import list_column, write_pieces
from fastadapt.features.store.values import require_valid
from fastadapt.io.parquet import open_parquet, read_group


class Texts(NamedTuple):
    """Columns of the finished table of texts: ``[n]`` each."""

    path: Path
    numbers: np.ndarray  #: int64, number of each row's conversation in the source; ascending.
    domains: np.ndarray  #: strings or None.
    lengths: np.ndarray  #: int64, tokens.
    groups: np.ndarray  #: int64, row group of each row.
    digest: str  #: SHA-256 of the tokens, in order.

    @property
    def tokens(self) -> int:
        """Number of tokens of all texts."""
        return int(self.lengths.sum())


def write_texts(parts: Sequence[Path], path: Path) -> Texts:
    """Join the texts of shards into one table, its rows numbered from 0.

    Args:
        parts: files written by :func:`~fastadapt.features.collect.texts.prepare`.
        path: file of the table.

    Raises:
        RunError: the table cannot be written.
    """
    numbers: list[int] = []
    domains: list[str | None] = []
    lengths: list[np.ndarray] = []
    groups: list[int] = []
    sha256 = hashlib.sha256()

    def rows() -> Iterator[pa.Table]:
        for group, table in enumerate(heapq.merge(*map(_groups, parts), key=_first)):
            start = len(numbers)
            numbers.extend(table["text"].to_pylist())
            domains.extend(table["domain"].to_pylist())
            tokens = table["tokens"].combine_chunks()
            lengths.append(np.diff(tokens.offsets.to_numpy()))
            groups.extend([group] * len(table))
            sha256.update(lengths[-1].astype("<i8").tobytes())
            sha256.update(tokens.values.to_numpy().astype("<i4").tobytes())
            row = pa.array(range(start, len(numbers)), pa.int32())
            yield table.set_column(0, TEXTS.field("text"), row)

    write_pieces(rows(), path, TEXTS)
    return Texts(
        path,
        np.array(numbers, dtype=np.int64),
        np.array(domains, dtype=object),
        np.concatenate(lengths) if lengths else np.zeros(0, np.int64),
        np.array(groups, dtype=np.int64),
        sha256.hexdigest(),
    )


def _groups(path: Path) -> Iterator[pa.Table]:
    with open_parquet(path, TEXTS) as file:
        for group in range(file.num_row_groups):
            table = read_group(path, file, group, TEXTS)
            require_valid(path, "texts", table)
            yield table


def _first(table: pa.Table) -> int:
    return int(table["text"][0].as_py())


def write_units(
    stats: FeatureStats, texts: Texts, domains: Sequence[str], folder: Path
) -> list[Path]:
    """Write the tables of a kind of unit: ``features``, ``examples``, and ``scales`` if collected.

    Returns:
        The paths of the tables.

    Raises:
        RunError: a table cannot be written.
    """
    paths = [folder / f"{name}.parquet" for name in ("features", "examples")]
    every = range(stats.n_layers)
    total, n_domains = texts.tokens, len(domains)
    write_pieces((_unit_rows(stats, i, total, n_domains) for i in every), paths[0], FEATURES)
    write_pieces((_example_rows(stats, i, texts) for i in every), paths[1], EXAMPLES)
    if stats.scales is not None:
        # Each text's first token is not read.
        counted = total - len(texts.numbers)
        paths.append(folder / "scales.parquet")
        write_pieces((_scale_rows(stats, i, counted) for i in every), paths[2], SCALES)
    return paths


def _unit_rows(stats: FeatureStats, layer: int, tokens: int, n_domains: int) -> pa.Table:
    F = stats.n_features
    rows = slice(layer * F, (layer + 1) * F)
    counts = stats.counts[rows].cpu().numpy()
    by_slot = counts.sum(1)
    by_region, by_tenth = by_slot[:, : len(REGIONS)].copy(), by_slot[:, len(REGIONS) :]
    by_region[:, THINKING] += by_tenth.sum(1)
    count = by_slot.sum(1)
    total = exact_sums.totals(stats.sums[rows].cpu()).numpy()
    strongest = stats.examples["top"].value[rows, 0].cpu().numpy()
    return pa.table(
        {
            "layer": np.full(F, layer, np.int32),
            "feature": np.arange(F, dtype=np.int32),
            "count": count,
            "density": count / tokens,
            "max": strongest,
            "mean": (total / np.maximum(count, 1)).astype(np.float32),
            "norm": stats.norms[rows].cpu().numpy(),
            "histogram": list_column(stats.histogram[rows].cpu().numpy()),
            "by_domain": list_column(counts.sum(2)[:, :n_domains]),
            "by_region": list_column(by_region),
            "by_tenth": list_column(by_tenth),
        }
    )


def _scale_rows(stats: FeatureStats, layer: int, n_tokens: int) -> pa.Table:
    assert stats.scales is not None
    units = slice(layer * stats.n_features, (layer + 1) * stats.n_features)
    fitted = zip(
        ("base", "target", "difference"),
        scales_of(stats.scales.sums[units].cpu(), n_tokens),
        strict=True,
    )
    scales = {f"{name}_scale": values.numpy() for name, values in fitted}
    scales["base_share"] = shares_in_base(scales["base_scale"], scales["target_scale"])
    features = np.flatnonzero(np.isfinite(scales["base_scale"]))
    positions = stats.scales.tokens[units].cpu().numpy()
    return pa.table(
        {
            "layer": np.full(len(features), layer, np.int32),
            "feature": features.astype(np.int32),
            **{name: values[features] for name, values in scales.items()},
            "positions": positions[features],
        }
    )


class _Examples(NamedTuple):
    """The examples of a layer in the order of the table: ``[m]`` each, windows ``[m, W]``."""

    feature: np.ndarray
    sample: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    position: np.ndarray
    value: np.ndarray
    priority: np.ndarray
    window: np.ndarray


def _examples(stats: FeatureStats, layer: int, texts: Texts) -> _Examples:
    F = stats.n_features
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _Examples._fields}
    units = torch.arange(layer * F, (layer + 1) * F)
    for sample, name in enumerate(SAMPLES):
        examples = stats.examples[name].candidates(units.to(stats.counts.device))
        feature = examples.unit.cpu() - layer * F
        place = examples.place.cpu()
        number, position = place >> POSITION_BITS, place & (2**POSITION_BITS - 1)
        columns = (
            feature,
            torch.full_like(feature, sample),
            torch.arange(len(feature)) - torch.searchsorted(feature, feature),
            torch.from_numpy(_rows_of(texts, number.numpy(), position.numpy())),
            position,
            examples.value,
            stats.priorities(layer, feature, number, position),
            examples.window,
        )
        for column, into in zip(columns, parts.values(), strict=True):
            into.append(column.cpu().numpy())
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    order = np.lexsort((joined["rank"], joined["sample"], joined["feature"]))
    return _Examples(**{name: column[order] for name, column in joined.items()})


def _rows_of(texts: Texts, number: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return the row of each conversation's text; raise if text or position does not exist."""
    row = np.searchsorted(texts.numbers, number)
    exists = row < len(texts.numbers)
    # Assigning through the mask narrows it: each check reads only rows that passed the last.
    exists[exists] &= texts.numbers[row[exists]] == number[exists]
    exists[exists] &= position[exists] < texts.lengths[row[exists]]
    if not exists.all():
        first = int(np.flatnonzero(~exists)[0])
        raise UserError(
            f"the snapshot (state.safetensors) has an activation at token {position[first]} of "
            f"conversation {number[first]}, which {texts.path} does not have; collect the "
            "features again (--overwrite)"
        )
    return row


def _example_rows(stats: FeatureStats, layer: int, texts: Texts) -> pa.Table:
    examples, before = _examples(stats, layer, texts), stats.config.before
    start = np.maximum(examples.position - before, 0)
    end = np.minimum(examples.position + stats.config.after + 1, texts.lengths[examples.row])
    lengths = end - start
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens, regions = _windows(texts, examples.row, start, lengths, examples.position)
    # A window's column 0 is token position - before, which may lie outside the text.
    width = examples.window.shape[1]
    first = np.arange(len(start)) * width + start - (examples.position - before)
    values = examples.window.reshape(-1)[_ranges(first, lengths)]
    return pa.table(
        {
            "layer": np.full(len(start), layer, np.int32),
            "feature": examples.feature.astype(np.int32),
            "sample": np.array(SAMPLES, dtype=object)[examples.sample],
            "rank": examples.rank.astype(np.int32),
            "text": examples.row.astype(np.int32),
            "position": examples.position.astype(np.int32),
            "value": examples.value,
            "token": tokens[offsets[:-1] + examples.position - start],
            "region": np.array(REGIONS, dtype=object)[regions],
            "domain": pa.array(texts.domains[examples.row], pa.string()),
            "start": start.astype(np.int32),
            "tokens": pa.ListArray.from_arrays(offsets, tokens),
            "values": pa.ListArray.from_arrays(offsets, values),
            "priority": examples.priority,
        }
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges ``starts[i], ..., starts[i] + lengths[i] - 1`` of all i."""
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()))


def _windows(
    texts: Texts, row: np.ndarray, start: np.ndarray, lengths: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated tokens of windows, and the region of each window's activation."""
    tokens = np.empty(int(lengths.sum()), dtype=np.int32)
    regions = np.empty(len(row), dtype=np.int8)
    place = np.cumsum(lengths) - lengths
    group = texts.groups[row]
    columns = pa.schema([TEXTS.field(name) for name in ("tokens", "regions")])
    with open_parquet(texts.path, columns) as file:
        for number in np.unique(group):
            members = np.flatnonzero(group == number)  # windows into this row group
            table = read_group(texts.path, file, int(number), columns)
            texts_of_group = table["tokens"].combine_chunks()
            text = row[members] - np.searchsorted(texts.groups, number)
            offset = texts_of_group.offsets.to_numpy()[text]
            source = _ranges(offset + start[members], lengths[members])
            target = _ranges(place[members], lengths[members])
            tokens[target] = texts_of_group.values.to_numpy()[source]
            regions_of_group = table["regions"].combine_chunks().values.to_numpy()
            regions[members] = regions_of_group[offset + position[members]]
    return tokens, regions


def check_fires(stats: FeatureStats, texts: Texts, source: str) -> None:
    """Raise ``RunError`` if no feature or neuron of ``stats`` is active on any token."""
    if not bool(stats.counts.any()):
        raise RunError(
            f"nothing fires: none of the {stats.n_layers} x {stats.n_features} features or neurons "
            f"of kind {stats.kind} is active on any of the {texts.tokens} tokens of {source}; pass "
            "other texts (--data)"
        )


def unit_shapes(stats_by_kind: Mapping[Any, FeatureStats]) -> dict[str, dict[str, int]]:
    """Return the layers, and units per layer, of each kind: ``units`` of the manifest."""
    return {
        kind: {"n_layers": stats.n_layers, "n_features": stats.n_features}
        for kind, stats in stats_by_kind.items()
    }
