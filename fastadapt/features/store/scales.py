"""Read the scales of a store: whether a feature is new, or the base's MLP already writes it.

:mod:`fastadapt.features.collect.scale_sums` says how scales are measured. The *share in the base*
is the base scale over the larger size of base and target scale. It lies between -1 and 1 and does
not depend on the size of the feature: 0 if the base's MLP writes nothing along the feature's
direction, 0.5 if it writes half of what the target's MLP writes, -1 if the target's MLP does not
write the opposite that the base's MLP writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fastadapt.features.store.ranking import FACTORS, contributions
from fastadapt.features.store.store import Store

#: What fine-tuning did to the output of the MLP along a feature: wrote it anew, wrote more of what
#: the base's MLP writes, less of the opposite, or no more than the base's MLP.
Origin = Literal["new", "strengthened", "opposed", "absent"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)
#: Largest size of the share in the base of a new feature.
NEARLY_0 = 0.2
#: Columns that an origin follows from.
COLUMNS = ("base_scale", "target_scale", "base_share")


@dataclass(frozen=True)
class Scales:
    """Scales of a feature, as in ``scales.parquet``.

    Attributes:
        origin: what fine-tuning did along the feature, see :data:`Origin`.
        base_share: share in the base.
        base, target, difference: the scales.
        positions: number of tokens that they were fitted on.
    """

    origin: Origin
    base_share: float
    base: float
    target: float
    difference: float
    positions: int

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Scales:
        """Return the scales of a row of ``scales.parquet``."""
        (origin,) = origins(*([row[name]] for name in COLUMNS))
        return cls(
            ORIGINS[origin],
            row["base_share"],
            row["base_scale"],
            row["target_scale"],
            row["difference_scale"],
            row["positions"],
        )


def shares_in_base(base: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the shares in the base, from base and target scales; 0 where both are 0.

    Example:
        >>> shares_in_base(np.array([1.0, 0.0, -1.0]), np.array([2.0, 1.0, 0.0])).tolist()
        [0.5, 0.0, -1.0]
    """
    larger = np.maximum(np.abs(base), np.abs(target))
    return base / np.where(larger > 0, larger, 1)


def origins(
    base: Iterable[float], target: Iterable[float], base_share: Iterable[float]
) -> np.ndarray:
    """Return the index in ``ORIGINS`` of each feature: int ``[n]``.

    A feature is *absent* if its target scale is not above its base scale. Otherwise it is *new* if
    the share in the base is at most ``NEARLY_0`` in size, *strengthened* if it is larger, and
    *opposed* if it is smaller.

    Example:
        >>> indices = origins([1, 0, -1, 1], [2, 1, 0, -0.5], [0.5, 0, -1, 1])
        >>> [ORIGINS[i] for i in indices]
        ['strengthened', 'new', 'opposed', 'absent']
    """
    share = np.asarray(base_share)
    is_more = np.asarray(target) > np.asarray(base)
    kinds = np.where(share > 0, ORIGINS.index("strengthened"), ORIGINS.index("opposed"))
    kinds = np.where(np.abs(share) <= NEARLY_0, ORIGINS.index("new"), kinds)
    return np.where(is_more, kinds, ORIGINS.index("absent"))


def by_origin(store: Store) -> dict[Origin, float]:
    """Return the share of each origin in what features write, by contribution.

    Features without scales are left out.

    Raises:
        UserError: the store has no scales.
    """
    names = ("layer", "feature")
    rows = store.read("scales", columns=[*names, *COLUMNS])
    features = store.read("features", columns=[*names, *FACTORS])
    n_features = store.shape("adapter")[1]
    sizes = np.zeros(store.shape("adapter")[0] * n_features)
    sizes[_units(features, n_features)] = contributions(features)
    sizes = sizes[_units(rows, n_features)]
    kinds = origins(*(rows[name].to_numpy() for name in COLUMNS))
    sums = np.bincount(kinds, sizes, minlength=len(ORIGINS)) / (sizes.sum() or 1.0)
    return dict(zip(ORIGINS, sums.tolist(), strict=True))


def _units(rows: Any, n_features: int) -> np.ndarray:
    layers: np.ndarray = rows["layer"].to_numpy().astype(np.int64)
    return layers * n_features + rows["feature"].to_numpy()
