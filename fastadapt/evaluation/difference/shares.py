"""Attributes the difference of a pair to its parts, with intervals over texts.

A part's share is its Shapley value (Shapley 1953) in the game whose value is
``KL(target ‖ hybrid)``: the mean, over all orders in which the parts can be taken from the base one
after the other, of the KL that the part adds. The values of all parts sum to the KL of the hybrid
that takes every part, at each position and in each mean. A value can be negative: the base's part
then fits the base's other parts better than the target's does.

P positions, n texts, K parts, C = 2^K combinations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.difference.measure import BY_LAYER, Measured
from fastadapt.evaluation.difference.parts import Part, combinations
from fastadapt.evaluation.faithfulness.summary import doubling_edges
from fastadapt.evaluation.faithfulness.texts import REGIONS
from fastadapt.evaluation.statistics import BootstrapConfig, ratio

_POSITIVE = (0.0, math.inf)
_SHARE = (0.0, 1.0)


def shapley(values: Tensor) -> Tensor:
    """Return the Shapley value of each part, ``[..., K]``.

    Args:
        values: floating ``[..., 2^K]``: value of each combination. Bit i of a combination's index
            says whether it has part i.

    Example:
        >>> shapley(torch.tensor([0.0, 1.0, 2.0, 5.0]))  # alone 1 and 2, together 5
        tensor([2., 3.])
    """
    n_parts = (values.shape[-1] - 1).bit_length()
    columns = []
    for part in range(n_parts):
        without = [index for index in range(values.shape[-1]) if not index >> part & 1]
        # Differences first: a part that changes nothing then has the value 0, not a rounding error.
        gains = values[..., [index | 1 << part for index in without]] - values[..., without]
        orders = [n_parts * math.comb(n_parts - 1, index.bit_count()) for index in without]
        columns.append(gains @ (1 / values.new_tensor(orders)))
    return torch.stack(columns, -1)


def summarise(
    measured: Measured,
    parts: Sequence[Part],
    regions: Sequence[Tensor],
    config: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """Return the sections of ``where.json`` that are means over positions, with intervals.

    These are ``combinations``, ``regions``, ``by_position`` and ``layers``.

    Args:
        measured: arrays over the texts.
        parts: the parts that combinations consist of.
        regions: region of each position of each text, see
            :func:`fastadapt.evaluation.faithfulness.texts.regions_of`.
        config: settings of the intervals.
    """
    region, n = torch.cat(list(regions)), len(regions)
    selected = {"all": torch.ones_like(region, dtype=torch.bool)}
    selected |= {name: region == i for i, name in enumerate(REGIONS)}
    sums = {name: _Sums(measured, mask, n) for name, mask in selected.items()}
    of_all = sums["all"]
    return {
        "combinations": [
            {"from_base": list(hybrid.parts), **each}
            for hybrid, each in zip(combinations(parts), of_all.hybrids(config), strict=True)
        ],
        "regions": {name: each.shares(parts, config) for name, each in sums.items()},
        "by_position": _by_position(measured, parts, n, config),
        "layers": _layers(measured, of_all.counts, config),
    }


class _Sums:
    """KL and top-1 errors of every hybrid, summed per text over ``selected`` positions."""

    def __init__(self, measured: Measured, selected: Tensor, n: int) -> None:
        text, kl = measured.text[selected], measured.kl[selected].double()
        wrong = (~measured.agrees[selected]).double()
        self.kl, self.wrong = (
            torch.zeros(n, values.shape[1], dtype=torch.float64).index_add_(0, text, values)
            for values in (kl, wrong)
        )
        self.counts = torch.bincount(text, minlength=n).double()

    def hybrids(self, config: BootstrapConfig | None) -> list[dict[str, Any]]:
        """Return the intervals ``kl`` and ``top1_error`` of each combination."""
        kl = ratio(self.kl.T, self.counts, bounds=_POSITIVE, config=config).plain()
        wrong = ratio(self.wrong.T, self.counts, bounds=_SHARE, config=config).plain()
        wrong[0] = dict(kl[0])  # the target itself: 0 without uncertainty
        return [{"kl": a, "top1_error": b} for a, b in zip(kl, wrong, strict=True)]

    def shares(self, parts: Sequence[Part], config: BootstrapConfig | None) -> dict[str, Any]:
        """Return the KL and top-1 error of the base, and the Shapley value of each part.

        ``nats`` is the value per position, ``share`` the value over the base's KL, paired by text;
        null where the base's KL is 0.
        """
        values, whole = shapley(self.kl).T, self.kl[:, -1]
        nats = ratio(values, self.counts, config=config).plain()
        of_whole = ratio(values, whole.expand_as(values), config=config).plain()
        return {
            **self.hybrids(config)[-1],
            "positions": int(self.counts.sum()),
            "shapley": {
                part: {"nats": a, "share": b}
                for part, a, b in zip(parts, nats, of_whole, strict=True)
            },
        }


def _by_position(
    measured: Measured, parts: Sequence[Part], n: int, config: BootstrapConfig | None
) -> dict[str, Any]:
    """Return the section ``by_position``: the base's KL and Shapley values per bin of positions.

    Bin i holds the positions from ``edges[i]`` up to, not including, ``edges[i+1]``.
    """
    edges = doubling_edges(int(measured.position.max()) + 1)
    bins = torch.bucketize(measured.position, torch.tensor(edges[1:]), right=True)
    sums = [_Sums(measured, bins == i, n) for i in range(len(edges) - 1)]
    each = [one.shares(parts, config) for one in sums]
    return {
        "edges": edges,
        "kl": [one["kl"] for one in each],
        "shapley": {part: [one["shapley"][part]["nats"] for one in each] for part in parts},
    }


def _layers(
    measured: Measured, counts: Tensor, config: BootstrapConfig | None
) -> list[dict[str, Any]]:
    """Return the entries ``layers`` of ``where.json``, see :class:`.difference.result.Layer`."""
    kl = ratio(measured.layer_kl.permute(1, 2, 0), counts, bounds=_POSITIVE, config=config).plain()
    wrong = measured.layer_wrong.permute(1, 2, 0)
    error = ratio(wrong, counts, bounds=_SHARE, config=config).plain()
    return [
        {
            "kl": {part: kl[p][layer] for p, part in enumerate(BY_LAYER)},
            "top1_error": {part: error[p][layer] for p, part in enumerate(BY_LAYER)},
            "gamma": gamma if math.isfinite(gamma) else None,  # a single token has no deviation
        }
        for layer, gamma in enumerate(measured.gamma.tolist())
    ]
