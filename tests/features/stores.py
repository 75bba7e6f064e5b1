"""Small stores from plain loops over dense activations, as an oracle for the collection."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastadapt.features.store.schema import (
    EDGES,
    EXAMPLES,
    FEATURES,
    LENS,
    REGIONS,
    TENTHS,
    TEXTS,
    TOKENS,
)
from fastadapt.features.store.store import Store, write_manifest, write_table

BEFORE, AFTER = 50, 20


@dataclass(frozen=True)
class StoreText:
    """A text of a synthetic store.

    Attributes:
        tokens: ids.
        regions: index into ``REGIONS`` of each token.
        domain: of the text.
        id: default: ``text-N``.
    """

    tokens: Sequence[int]
    regions: Sequence[int]
    domain: str | None = None
    id: str | None = None


def rows_of(
    texts: Sequence[StoreText],
    activations: Sequence[np.ndarray],
    *,
    domains: Sequence[str],
    priority: Any,
    top: int = 20,
    uniform: int = 10,
    norms: np.ndarray | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of ``FEATURES`` and ``EXAMPLES``, by a loop over every activation.

    Args:
        texts: the texts.
        activations: float32 ``[L, T, F]`` of each text; active above 0.
        domains: in the order of ``by_domain``.
        priority: maps (layer, feature, text, position) to a non-negative integer.
        top, uniform: largest number of examples of each kind.
        norms: ``[L, F]``.
    """
    n_layers, _, n_features = activations[0].shape
    total = sum(len(text.tokens) for text in texts)
    features, examples = [], []
    for layer in range(n_layers):
        for feature in range(n_features):
            fires = [
                (float(a[layer, t, feature]), n, t)
                for n, a in enumerate(activations)
                for t in range(a.shape[1])
                if a[layer, t, feature] > 0
            ]
            by_domain, by_region, by_tenth = [0] * len(domains), [0] * len(REGIONS), [0] * TENTHS
            histogram = [0] * (len(EDGES) + 1)
            for value, n, t in fires:
                text = texts[n]
                if text.domain is not None:
                    by_domain[domains.index(text.domain)] += 1
                by_region[text.regions[t]] += 1
                thinking = [i for i, r in enumerate(text.regions) if REGIONS[r] == "thinking"]
                if t in thinking:
                    by_tenth[thinking.index(t) * TENTHS // len(thinking)] += 1
                histogram[sum(value > edge for edge in EDGES)] += 1
            features.append(
                {
                    "layer": layer,
                    "feature": feature,
                    "count": len(fires),
                    "density": len(fires) / total,
                    "max": max((v for v, _, _ in fires), default=0.0),
                    "mean": float(np.mean([v for v, _, _ in fires])) if fires else 0.0,
                    "norm": 1.0 if norms is None else float(norms[layer, feature]),
                    "histogram": histogram,
                    "by_domain": by_domain,
                    "by_region": by_region,
                    "by_tenth": by_tenth,
                }
            )
            strongest = sorted(fires, key=lambda f: (-f[0], f[1], f[2]))[:top]
            drawn = sorted(fires, key=lambda f: (-priority(layer, feature, f[1], f[2]), *f[1:]))
            for sample, selected in (("top", strongest), ("uniform", drawn[:uniform])):
                for rank, (value, n, t) in enumerate(selected):
                    text = texts[n]
                    start, end = max(0, t - BEFORE), min(len(text.tokens), t + AFTER + 1)
                    examples.append(
                        {
                            "layer": layer,
                            "feature": feature,
                            "sample": sample,
                            "rank": rank,
                            "text": n,
                            "position": t,
                            "value": value,
                            "token": text.tokens[t],
                            "region": REGIONS[text.regions[t]],
                            "domain": text.domain,
                            "start": start,
                            "tokens": list(text.tokens[start:end]),
                            "values": activations[n][layer, start:end, feature].tolist(),
                            "priority": priority(layer, feature, n, t),
                        }
                    )
    return features, examples


@dataclass
class StoreData:
    """A store of :func:`make_store`, and its sources."""

    store: Store
    texts: list[StoreText]
    activations: list[np.ndarray]
    strings: list[str]
    promoted: dict[tuple[int, int], list[int]] = field(default_factory=dict)


def make_store(
    folder: Path,
    texts: Sequence[StoreText],
    activations: Sequence[np.ndarray],
    strings: Sequence[str],
    *,
    promoted: dict[tuple[int, int], list[int]] | None = None,
    adapter: str = "0" * 64,
    run: str = "runs/made",
    pair: dict[str, Any] | None = None,
) -> StoreData:
    """Write a store of adapter features over given texts and activations.

    Args:
        texts, activations: see :func:`rows_of`.
        strings: the vocabulary.
        promoted: token ids that a feature promotes, strongest first; other features promote random
            tokens.
    """
    domains = sorted({text.domain for text in texts if text.domain is not None})
    n_layers, _, n_features = activations[0].shape

    def priority(*place: int) -> int:
        return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:7], "big")

    features, examples = rows_of(texts, activations, domains=domains, priority=priority)
    rng = np.random.default_rng(0)
    given, lens = dict(promoted or {}), []
    for layer in range(n_layers):
        for feature in range(n_features):
            drawn = [int(i) for i in rng.permutation(len(strings))[:20]]
            wanted = given.get((layer, feature), [])
            ids = ([*wanted, *(i for i in drawn if i not in wanted)])[:20]
            up, down = ids[:10], ids[10:]
            row: dict[str, Any] = {"layer": layer, "feature": feature}
            for name, chosen, sign in (("promoted", up, 1.0), ("suppressed", down, -1.0)):
                row[name] = chosen
                row[f"{name}_logits"] = [sign * (len(chosen) - i) for i in range(len(chosen))]
                row[f"{name}_tokens"] = [strings[i] for i in chosen]
            lens.append(row)
    text_rows = [
        {
            "text": n,
            "id": f"text-{n}" if text.id is None else text.id,
            "domain": text.domain,
            "tokens": list(text.tokens),
            "regions": list(text.regions),
        }
        for n, text in enumerate(texts)
    ]
    vocabulary = [{"token": i, "string": string} for i, string in enumerate(strings)]
    written = []
    for path, rows, schema in (
        (folder / "texts.parquet", text_rows, TEXTS),
        (folder / "tokens.parquet", vocabulary, TOKENS),
        (folder / "adapter" / "features.parquet", features, FEATURES),
        (folder / "adapter" / "examples.parquet", examples, EXAMPLES),
        (folder / "adapter" / "lens.parquet", lens, LENS),
    ):
        write_table(pa.Table.from_pylist(rows, schema=schema), path, schema)
        written.append(path)
    tokens = sum(len(text.tokens) for text in texts)
    write_manifest(
        folder,
        {
            "run": run,
            "adapter": adapter,
            "pair": pair or {"target": "made/target", "base": "made/base"},
            "data": {"source": "made", "digest": "0" * 64, "texts": len(texts), "tokens": tokens},
            "domains": domains,
            "settings": {"top": 20, "uniform": 10, "before": BEFORE, "after": AFTER, "seed": 0},
            "units": {"adapter": {"n_layers": n_layers, "n_features": n_features}},
            "lens": {"demeaned": True},
            "edges": list(EDGES),
            "versions": {},
        },
        written,
    )
    return StoreData(Store.open(folder), list(texts), list(activations), list(strings), given)
