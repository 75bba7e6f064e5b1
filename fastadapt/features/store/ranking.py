"""Rank units (features or neurons) by the size of what they write to the residual stream.

The *contribution* of a unit is its density × mean activation × norm of its output row: the mean
norm, over all tokens, of what the unit adds to the residual stream. It is read from the collected
statistics. The effect on the output, ΔKL, is measured by ablation for the strongest units
(:mod:`fastadapt.effects.ablation`); lists keep the order of contributions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fastadapt.features.store.schema import Kind
from fastadapt.features.store.store import Store

#: Columns of ``features.parquet`` that a contribution is computed from.
FACTORS = ("density", "mean", "norm")


class Ranked(NamedTuple):
    """A feature or neuron, its contribution (density × mean × norm), and its share of the sum."""

    layer: int
    feature: int
    contribution: float
    share: float


def contributions(rows: pa.Table) -> np.ndarray:
    """Return density × mean × norm of each row of ``features.parquet``: float64 ``[rows]``.

    Example:
        >>> contributions(pa.table({"density": [0.5], "mean": [3.0], "norm": [2.0]})).tolist()
        [3.0]
    """
    density, mean, norm = (rows[name].to_numpy().astype(np.float64) for name in FACTORS)
    return density * mean * norm


def strongest(store: Store, kind: Kind = "adapter", n: int | None = None) -> list[Ranked]:
    """Return the units that fired, the largest contribution first, equal ones by number.

    Args:
        store: the store of features.
        kind: kind of the units.
        n: largest number of units; None for all.

    Raises:
        UserError: the store has no such units.
    """
    store.shape(kind)
    rows = store.read("features", kind, columns=["layer", "feature", *FACTORS])
    sizes = contributions(rows)
    layers, numbers = rows["layer"].to_numpy(), rows["feature"].to_numpy()
    order = np.lexsort((numbers, layers, -sizes))
    order = order[sizes[order] > 0][:n]
    total = sizes.sum()
    return [
        Ranked(int(layers[i]), int(numbers[i]), float(sizes[i]), float(sizes[i] / total))
        for i in order
    ]


def by_layer(store: Store, kind: Kind = "adapter") -> list[float]:
    """Return each layer's share of all contributions of a kind; 0 if no unit fired."""
    rows = store.read("features", kind, columns=["layer", *FACTORS])
    sizes = np.bincount(
        rows["layer"].to_numpy(), contributions(rows), minlength=store.shape(kind)[0]
    )
    shares: list[float] = (sizes / (sizes.sum() or 1.0)).tolist()
    return shares
