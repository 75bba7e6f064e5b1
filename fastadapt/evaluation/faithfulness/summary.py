"""Summarises arrays of output faithfulness and partial replacement as numbers with intervals.

Every interval is over texts (:mod:`fastadapt.evaluation.statistics`). Intervals are dicts for JSON,
``{"mean", "low", "high"}``, with null for values that are not defined. KL and top-1 error are means
over the positions of all texts. NMSE is a mean over texts, as in the objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.faithfulness.outputs import Measured
from fastadapt.evaluation.faithfulness.partial_replacement import FAMILIES, Family, Partial
from fastadapt.evaluation.faithfulness.texts import REGIONS, Text, region_of
from fastadapt.evaluation.seeds import difference_over_seeds, over_seeds
from fastadapt.evaluation.statistics import BootstrapConfig, ratio

_SHARE = (0.0, 1.0)
_POSITIVE = (0.0, math.inf)
_BOUNDS = {"kl": _POSITIVE, "top1_error": _SHARE}


def summarise_output(
    measured: Mapping[str, Measured],
    texts: Sequence[Text],
    answers: Sequence[int],
    config: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """Summarise the output faithfulness and NMSE of each model.

    Args:
        measured: arrays by name of the model, over ``texts``.
        texts: the texts.
        answers: start of each text's answer, see
            :func:`fastadapt.evaluation.faithfulness.texts.answer_starts`.
        config: settings of the intervals.

    Returns:
        A dict by name of the model, each with:

        - ``kl`` (nats) and ``top1_error``;
        - ``regions`` (``prompt, thinking, answer``) and ``domains``, each with ``kl``,
          ``top1_error`` and ``positions``;
        - ``by_position``: ``edges``, and ``kl`` and ``top1_error`` per bin. Bin i holds the
          positions from ``edges[i]`` up to, not including, ``edges[i+1]``;
        - ``nmse_per_layer`` and ``nmse_token_per_layer``, after the embeddings and every block, and
          both with the suffix ``_without_first``, without the first token; null for the base;
        - ``l0``, or null without features.
    """
    regions = torch.cat(
        [
            region_of(len(text.ids), text.prompt_length, start)
            for text, start in zip(texts, answers, strict=True)
        ]
    )
    domains = sorted({text.domain for text in texts if text.domain is not None})
    in_domain = {d: torch.tensor([text.domain == d for text in texts]) for d in domains}
    edges = doubling_edges(max(len(text.ids) - 1 for text in texts))
    summary: dict[str, Any] = {}
    for name, arrays in measured.items():
        sums = _Sums(arrays, len(texts), config)
        bins = torch.bucketize(arrays.position, torch.tensor(edges[1:]), right=True)
        summary[name] = {
            **sums.intervals(),
            "regions": {r: sums.with_count(regions == i) for i, r in enumerate(REGIONS)},
            "domains": {d: sums.with_count(None, in_domain[d]) for d in domains},
            "by_position": {"edges": edges, **sums.by_bin(bins, len(edges) - 1)},
            **_nmse(arrays, config),
            "l0": arrays.l0,
        }
    return summary


def summarise_partial(
    measured: Mapping[str, Partial], config: BootstrapConfig | None = None
) -> dict[str, Any]:
    """Summarise the KL and top-1 error of every partial replacement, per model.

    Returns:
        A dict by name of the model, each with:

        - ``first`` and ``last`` (L+1 intervals of the KL in nats, of 0..L layers) and ``single``
          (L intervals);
        - ``block_passes``;
        - ``top1_error`` with the same three keys;
        - ``excess`` with the same three keys: KL minus that of the full replacement, paired by
          text; and ``worst``: the largest of them, without the full replacement itself;
        - ``within_full``: whether no mean excess is above 0.
    """
    summary: dict[str, Any] = {}
    for name, partial in measured.items():
        full = partial.kl["first"][:, -1:]
        excess = {family: _curve(partial, partial.kl[family] - full, config) for family in FAMILIES}
        candidates = [*excess["first"][:-1], *excess["last"][:-1]]
        candidates += excess["single"] if len(excess["single"]) > 1 else []
        worst = max(candidates, key=lambda interval: interval["mean"])
        summary[name] = {
            **{
                family: _curve(partial, partial.kl[family], config, _POSITIVE)
                for family in FAMILIES
            },
            "block_passes": partial.block_passes,
            "top1_error": {
                family: _curve(partial, partial.wrong[family], config, _SHARE)
                for family in FAMILIES
            },
            "excess": {**excess, "worst": worst},
            "within_full": worst["mean"] <= 0,
        }
    return summary


def gaps(a: Measured, b: Measured, config: BootstrapConfig | None = None) -> dict[str, Any]:
    """Return intervals of ``a`` minus ``b``, paired by text, of ``kl`` and ``top1_error``."""
    n = int(a.text.max()) + 1
    counts = _per_text(torch.ones_like(a.kl), a.text, n)
    values = {"kl": a.kl.double() - b.kl.double(), "top1_error": _wrong(a) - _wrong(b)}
    return {
        key: ratio(_per_text(value, a.text, n), counts, config=config).plain()
        for key, value in values.items()
    }


def order(
    measured: Mapping[str, Measured],
    names: Sequence[str],
    config: BootstrapConfig | None = None,
) -> list[dict[str, Any]]:
    """Compare each model with the next of ``names``, which is expected to be nearer to the target.

    Returns:
        A dict per pair of neighbours: the names ``above`` and ``below``, their gaps ``kl`` and
        ``top1_error``, and ``holds``: ``yes`` if the interval of the gap in top-1 error is above 0,
        ``tie`` if it has 0 in it, ``no`` if it is below 0, None if it is not defined.
    """
    pairs = []
    for above, below in pairwise(names):
        gap = gaps(measured[above], measured[below], config)
        low, high = gap["top1_error"]["low"], gap["top1_error"]["high"]
        holds = None
        if low is not None and high is not None:
            holds = "yes" if low > 0 else "no" if high < 0 else "tie"
        pairs.append({"above": above, "below": below, **gap, "holds": holds})
    return pairs


def partial_gaps(
    a: Partial, b: Partial, family: Family, config: BootstrapConfig | None = None
) -> list[dict[str, Any]]:
    """Return intervals of the KL of ``a`` minus ``b``, paired by text, for every n of a family."""
    curve: list[dict[str, Any]] = _curve(a, a.kl[family] - b.kl[family], config)
    return curve


def output_groups(
    measured: Mapping[str, Measured], groups: Mapping[str, Sequence[str]], level: float
) -> dict[str, Any]:
    """Summarise groups of runs that differ by their seed only, over seeds and texts.

    Args:
        measured: arrays by name of the model.
        groups: names of the runs by name of the group.
        level: confidence level.

    Returns:
        ``groups``: a dict per group with ``name``, ``runs``, ``l0`` (the runs' mean, or None),
        ``kl`` and ``top1_error``; and ``differences`` of every two groups: ``above``, ``below``,
        and their ``kl`` and ``top1_error``, above minus below.
    """
    sums = {
        name: {
            key: torch.stack([_text_sums(measured[run])[key] for run in runs]) for key in _BOUNDS
        }
        for name, runs in groups.items()
    }
    counts = {name: _text_sums(measured[runs[0]])["positions"] for name, runs in groups.items()}
    l0s = {name: [measured[run].l0 for run in runs] for name, runs in groups.items()}
    return {
        "groups": [
            {
                "name": name,
                "runs": list(runs),
                "l0": None if None in l0s[name] else sum(l0s[name]) / len(runs),  # type: ignore[arg-type]
                **{
                    key: over_seeds(sums[name][key], counts[name], bounds=b, level=level).plain()
                    for key, b in _BOUNDS.items()
                },
            }
            for name, runs in groups.items()
        ],
        "differences": [
            {
                "above": a,
                "below": b,
                **{
                    key: difference_over_seeds(
                        sums[a][key], sums[b][key], (counts[a], counts[b]), level=level
                    ).plain()
                    for key in _BOUNDS
                },
            }
            for a, b in combinations(groups, 2)
        ],
    }


def partial_groups(
    first: Sequence[Partial], second: Sequence[Partial], family: Family, level: float
) -> list[dict[str, Any]]:
    """Return intervals of the KL of one group of runs minus another's, over seeds and texts."""
    a, b = (torch.stack([run.kl[family].T for run in runs], 1) for runs in (first, second))
    counts = first[0].positions, second[0].positions
    curve: list[dict[str, Any]] = difference_over_seeds(a, b, counts, level=level).plain()
    return curve


def _text_sums(arrays: Measured) -> dict[str, Tensor]:
    """Return sums over each text's positions: of the KL, of top-1 errors, and their number."""
    n = int(arrays.text.max()) + 1
    values = {"kl": arrays.kl.double(), "top1_error": _wrong(arrays)}
    values["positions"] = torch.ones_like(values["kl"])
    return {key: _per_text(value, arrays.text, n) for key, value in values.items()}


class _Sums:
    """Intervals of one model over selected positions, from sums per text."""

    def __init__(self, arrays: Measured, n: int, config: BootstrapConfig | None) -> None:
        self.text, self.n, self.config = arrays.text, n, config
        self.values = {"kl": arrays.kl.double(), "top1_error": _wrong(arrays)}

    def intervals(
        self, positions: Tensor | None = None, texts: Tensor | None = None
    ) -> dict[str, Any]:
        """Return intervals over positions (bool ``[P]``) of texts (bool ``[n]``); None: all."""
        weight = torch.ones_like(self.text) if positions is None else positions
        selected = slice(None) if texts is None else texts
        counts = _per_text(weight, self.text, self.n)[selected]
        sums = {k: _per_text(v * weight, self.text, self.n) for k, v in self.values.items()}
        return {key: self._interval(key, sums[key][selected], counts) for key in sums}

    def with_count(self, positions: Tensor | None, texts: Tensor | None = None) -> dict[str, Any]:
        """Return :meth:`intervals` with the number of positions as ``positions``."""
        selected = torch.ones_like(self.text, dtype=torch.bool) if positions is None else positions
        if texts is not None:
            selected = selected & texts[self.text]
        return {**self.intervals(positions, texts), "positions": int(selected.sum())}

    def by_bin(self, bins: Tensor, n_bins: int) -> dict[str, Any]:
        """Return the intervals of every bin, given the bin of each position."""
        cell = bins * self.n + self.text  # one cell per pair of bin and text
        shape = (n_bins, self.n)
        counts = _per_text(torch.ones_like(cell), cell, n_bins * self.n).view(shape)
        return {
            key: self._interval(key, _per_text(value, cell, n_bins * self.n).view(shape), counts)
            for key, value in self.values.items()
        }

    def _interval(self, key: str, sums: Tensor, counts: Tensor) -> Any:
        return ratio(sums, counts, bounds=_BOUNDS[key], config=self.config).plain()


def _per_text(values: Tensor, text: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add_(0, text, values.double())


def _wrong(arrays: Measured) -> Tensor:
    return (~arrays.agrees).double()


def doubling_edges(positions: int) -> list[int]:
    """Return 0, 1, 2, 4, 8, ...: edges of bins that double, the last one at ``positions``.

    Example:
        >>> doubling_edges(5)
        [0, 1, 2, 4, 5]
    """
    edges = [0]
    while edges[-1] < positions:
        edges.append(min(positions, max(1, 2 * edges[-1])))
    return edges


def _nmse(arrays: Measured, config: BootstrapConfig | None) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for key, values in (("nmse", arrays.nmse), ("nmse_token", arrays.token_nmse)):
        for i, suffix in enumerate(("", "_without_first")):
            curve = None
            if values is not None:
                per_layer = values[:, i].T
                ones = torch.ones(len(values))
                curve = ratio(per_layer, ones, bounds=_POSITIVE, config=config).plain()
            curves[f"{key}_per_layer{suffix}"] = curve
    return curves


def _curve(
    partial: Partial,
    sums: Tensor,
    config: BootstrapConfig | None,
    bounds: tuple[float, float] | None = None,
) -> Any:
    return ratio(sums.T, partial.positions, bounds=bounds, config=config).plain()
