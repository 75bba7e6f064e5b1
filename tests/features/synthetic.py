"""Random stores of any size, written column by column without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastadapt.features.store.schema import (
    CLASSES,
    DESCRIPTIONS,
    EDGES,
    EXAMPLES,
    FEATURES,
    LENS,
    REGIONS,
    SCALES,
    SCORES,
    TENTHS,
    TEXTS,
    TOKENS,
)
from fastadapt.features.store.store import Store, write_manifest, write_table

BEFORE, AFTER = 50, 20
DOMAINS = ("code", "math", "science")
_WORDS = (  # noqa: SIM905
    "wait so the of to and is in that we have this can be let me think but check again maybe "
    "number sum equals first then if not actually therefore answer value x y n function return "
    "because which one two three solve equation both sides hmm however product length step"
).split()


@dataclass(frozen=True)
class Size:
    """Size of a synthetic store.

    Attributes:
        top, uniform: examples of each unit that fires.
        full: layers with 20 and 10 examples instead.
        described, classed: units per layer with a description or a class.
    """

    n_layers: int = 28
    n_features: int = 8192
    top: int = 3
    uniform: int = 2
    full: tuple[int, ...] = ()
    texts: int = 400
    text_tokens: int = 2000
    vocabulary: int = 151_936
    described: int = 100
    classed: int = 250


def write_synthetic(folder: Path, size: Size) -> Store:
    """Write a random store of adapter features, with the shapes and sizes of a real one."""
    rng = np.random.default_rng(0)
    strings = [
        f"{' ' if i % 3 else ''}{_WORDS[i % len(_WORDS)]}{'' if i < 150 else i // 150}"
        for i in range(size.vocabulary)
    ]
    strings[7], strings[9] = "\n", "\n\n"
    # Token frequencies follow Zipf's law.
    zipf = (size.vocabulary ** rng.random((size.texts, size.text_tokens)) - 1).astype(np.int32)
    bounds = np.array([1, 2, 160, 161, 162, int(size.text_tokens * 0.85)])
    bounds = np.append(bounds, [bounds[-1] + 1, size.text_tokens])
    regions = np.repeat(np.arange(len(REGIONS)), np.diff(bounds, prepend=0)).astype(np.int8)
    domains = [DOMAINS[i % 3] for i in range(size.texts)]
    write_table(
        pa.table(
            {
                "text": np.arange(size.texts, dtype=np.int32),
                "id": [f"{domains[i]}-{i:05d}" for i in range(size.texts)],
                "domain": domains,
                "tokens": _lists(zipf.reshape(-1), np.full(size.texts, size.text_tokens)),
                "regions": _lists(np.tile(regions, size.texts), np.full(size.texts, len(regions))),
            }
        ),
        folder / "texts.parquet",
        TEXTS,
    )
    token = np.arange(size.vocabulary, dtype=np.int32)
    write_table(pa.table({"token": token, "string": strings}), folder / "tokens.parquet", TOKENS)
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    schemas = {"features": FEATURES, "examples": EXAMPLES, "lens": LENS, "scales": SCALES}
    writers = {
        name: pq.ParquetWriter(adapter / f"{name}.parquet", schema, compression="zstd")
        for name, schema in schemas.items()
    }
    total = size.texts * size.text_tokens
    for layer in range(size.n_layers):
        features, examples = _layer(rng, layer, size, zipf, regions, total)
        lens = _lens(rng, layer, size, strings)
        scales = _scales(rng, layer, np.flatnonzero(features["count"].to_numpy()))
        for name, rows in zip(schemas, (features, examples, lens, scales), strict=True):
            rows = rows.select(schemas[name].names).cast(schemas[name])
            writers[name].write_table(rows, row_group_size=8192)
    for writer in writers.values():
        writer.close()
    _judged(rng, adapter, size)
    files = [folder / "texts.parquet", folder / "tokens.parquet"]
    write_manifest(
        folder,
        {
            "run": "runs/synthetic",
            "adapter": "0" * 64,
            "pair": {"target": "synthetic/target", "base": "synthetic/base"},
            "data": {
                "source": "drawn at random",
                "digest": "0" * 64,
                "texts": size.texts,
                "tokens": total,
            },
            "domains": list(DOMAINS),
            "settings": {"top": 20, "uniform": 10, "before": BEFORE, "after": AFTER, "seed": 0},
            "units": {"adapter": {"n_layers": size.n_layers, "n_features": size.n_features}},
            "lens": {"demeaned": True},
            "edges": list(EDGES),
            "versions": {},
        },
        [*files, *(adapter / f"{name}.parquet" for name in schemas)],
    )
    return Store.open(folder)


def _lists(flat: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _spread(counts: np.ndarray, weights: np.ndarray) -> pa.ListArray:
    """Split counts into integers by weights ``[F, n]``. The largest share gets the remainder."""
    shares = np.floor(counts[:, None] * weights / weights.sum(1, keepdims=True)).astype(np.int64)
    largest = weights.argmax(1)
    shares[np.arange(len(counts)), largest] += counts - shares.sum(1)
    return _lists(shares.reshape(-1), np.full(len(counts), weights.shape[1]))


def _layer(
    rng: np.random.Generator,
    layer: int,
    size: Size,
    texts: np.ndarray,
    regions: np.ndarray,
    total: int,
) -> tuple[pa.Table, pa.Table]:
    n = size.n_features
    # From one token in a hundred thousand to one in ten; one unit of thirty never.
    counts = np.maximum(1, total * 10 ** rng.uniform(-5, -1, n)).astype(np.int64)
    counts[rng.random(n) < 0.033] = 0
    fires = counts > 0
    scale = np.where(fires, 2 ** rng.normal(0, 1.5, n), 0).astype(np.float32)
    bins = np.arange(len(EDGES) + 1)
    centre = 20 + 2 * np.log2(np.maximum(scale, 1e-6)) - 4
    features = pa.table(
        {
            "layer": np.full(n, layer, np.int32),
            "feature": np.arange(n, dtype=np.int32),
            "count": counts,
            "density": counts / total,
            "max": scale,
            "mean": scale * 0.3,
            "norm": rng.uniform(0.5, 1.5, n).astype(np.float32),
            "histogram": _spread(counts, np.exp(-((bins - centre[:, None]) ** 2) / 8) + 1e-12),
            "by_domain": _spread(counts, rng.random((n, len(DOMAINS))) ** 3 + 1e-3),
            "by_region": _spread(counts, rng.random((n, len(REGIONS))) ** 6 + 1e-6),
            "by_tenth": _spread(counts, rng.random((n, TENTHS)) + 0.2),
        }
    )
    top, uniform = (20, 10) if layer in size.full else (size.top, size.uniform)
    rank = np.r_[np.arange(top), np.arange(uniform)]
    units, column = np.nonzero(rank < counts[:, None])  # at most as many examples as activations
    is_top, rank = column < top, rank[column]
    text = rng.integers(0, len(texts), units.size)
    position = rng.integers(0, texts.shape[1], units.size)
    value = scale[units] * np.where(is_top, 1 - rank / 60, rng.random(units.size) * 0.9 + 0.05)
    start = np.maximum(0, position - BEFORE)
    lengths = np.minimum(texts.shape[1], position + AFTER + 1) - start
    row = np.repeat(np.arange(units.size), lengths)  # example of each token of the windows
    within = np.arange(row.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    token = start[row] + within
    values = np.where(rng.random(row.size) < 0.06, rng.random(row.size) * value[row], 0)
    values = np.where(token == position[row], value[row], values).astype(np.float32)
    examples = pa.table(
        {
            "layer": np.full(units.size, layer, np.int32),
            "feature": units.astype(np.int32),
            "sample": np.where(is_top, "top", "uniform"),
            "rank": rank.astype(np.int32),
            "text": text.astype(np.int32),
            "position": position.astype(np.int32),
            "value": value.astype(np.float32),
            "token": texts[text, position],
            "region": np.array(REGIONS)[regions[position]],
            "domain": np.array(DOMAINS)[text % 3],
            "start": start.astype(np.int32),
            "tokens": _lists(texts[text[row], token], lengths),
            "values": _lists(values, lengths),
            "priority": rng.integers(0, 2**56, units.size),
        }
    )
    return features, examples


def _lens(rng: np.random.Generator, layer: int, size: Size, strings: Sequence[str]) -> pa.Table:
    n, k = size.n_features, min(10, size.vocabulary // 2)
    ids = (size.vocabulary ** rng.random((n, 2 * k)) - 1).astype(np.int32)
    logits = np.sort(rng.gamma(2, 0.5, (n, 2 * k)).astype(np.float32))[:, ::-1]
    words = pa.array(strings)
    columns: dict[str, object] = {
        "layer": np.full(n, layer, np.int32),
        "feature": np.arange(n, dtype=np.int32),
    }
    for name, part, sign in (("promoted", slice(0, k), 1), ("suppressed", slice(k, 2 * k), -1)):
        flat, lengths = ids[:, part].reshape(-1), np.full(n, k)
        columns[name] = _lists(flat, lengths)
        columns[f"{name}_logits"] = _lists(sign * logits[:, part].reshape(-1), lengths)
        offsets = pa.array(np.arange(0, n * k + 1, k, dtype=np.int32))
        columns[f"{name}_tokens"] = pa.ListArray.from_arrays(offsets, words.take(pa.array(flat)))
    return pa.table(columns)


def _scales(rng: np.random.Generator, layer: int, units: np.ndarray) -> pa.Table:
    """Return scales of all units but every seventh."""
    units = units[units % 7 > 0]
    base, target = rng.normal(size=(2, len(units)))
    return pa.table(
        {
            "layer": np.full(len(units), layer, np.int32),
            "feature": units.astype(np.int32),
            "base_share": base / np.maximum(abs(base), abs(target)),
            "base_scale": base,
            "target_scale": target,
            "difference_scale": rng.normal(1, 0.5, len(units)),
            "positions": np.full(len(units), 9),
        }
    )


def _judged(rng: np.random.Generator, adapter: Path, size: Size) -> None:
    descriptions, scores, classes = [], [], []
    kinds = [("language", None), ("domain", "math"), ("domain", "code"), ("reasoning", "output")]
    for layer in range(size.n_layers):
        drawn = rng.permutation(size.n_features)
        for feature in drawn[: size.described].tolist():
            unit = {"layer": layer, "feature": feature, "variant": "top", "judge": "made"}
            words = " ".join(_WORDS[i] for i in rng.integers(0, len(_WORDS), 6))
            text = f"fires on {words}, feature {layer} of {feature}"
            descriptions.append({**unit, "description": text, "shown": [0, 1, 2]})
            right = rng.integers(2, 6, 2).tolist()
            counts = {"true_positives": right[0], "true_negatives": right[1]}
            counts |= {"positives": 5, "negatives": 5, "accuracy": sum(right) / 10}
            scores.append({**unit, **counts})
        for feature in drawn[: size.classed].tolist():
            name, sub = kinds[int(rng.integers(len(kinds)))]
            row = {"layer": layer, "feature": feature, "judge": "made"}
            classes.append({**row, "class": name, "subclass": sub, "reason": "drawn at random"})
    for name, rows, schema in (
        ("descriptions", descriptions, DESCRIPTIONS),
        ("scores", scores, SCORES),
        ("classes", classes, CLASSES),
    ):
        if rows:
            table = pa.Table.from_pylist(rows, schema=schema)
            write_table(table, adapter / f"{name}.parquet", schema)
