"""Numbers with intervals out of the arrays of output faithfulness and partial replacement.

Every interval is over texts (:mod:`fastadapt.evaluation.statistics`), as plain dicts for JSON:
``{"mean", "low", "high"}``, null where nothing counts. KL and top-1 error are means over positions,
those of all texts together; NMSE is a mean over texts, as in the objective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.faithfulness.outputs import Measured
from fastadapt.evaluation.faithfulness.partial_replacement import FAMILIES, Family, Partial
from fastadapt.evaluation.faithfulness.texts import REGIONS, Text, region_of
from fastadapt.evaluation.statistics import BootstrapConfig, ratio

_SHARE = (0.0, 1.0)
_POSITIVE = (0.0, math.inf)


def summarise_output(
    measured: Mapping[str, Measured],
    texts: Sequence[Text],
    answers: Sequence[int],
    config: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """Output faithfulness and NMSE of each student.

    Args:
        measured: by student's name, over ``texts``.
        answers: where each text's answer starts
            (:func:`fastadapt.evaluation.faithfulness.texts.answer_starts`).

    Returns:
        By student: ``kl, top1_error``; ``regions`` (``prompt, thinking, answer``) and ``domains``,
        each with ``kl, top1_error, positions``; ``by_position``: ``edges`` (bin i holds the
        positions from ``edges[i]`` to before ``edges[i+1]``) and the ``kl`` and ``top1_error`` of
        each bin; ``nmse_per_layer`` and ``nmse_token_per_layer``, after the embeddings and every
        block, each also as ``..._without_first``, which leaves the first token out, or null for
        another model; ``l0``, or null.
    """
    regions = torch.cat(
        [
            region_of(len(text.ids), text.prompt_length, start)
            for text, start in zip(texts, answers, strict=True)
        ]
    )
    domains = sorted({text.domain for text in texts if text.domain is not None})
    of_domain = {d: torch.tensor([text.domain == d for text in texts]) for d in domains}
    edges = _edges(max(len(text.ids) - 1 for text in texts))
    told: dict[str, Any] = {}
    for name, arrays in measured.items():
        sums = _Sums(arrays, len(texts), config)
        bins = torch.bucketize(arrays.position, torch.tensor(edges[1:]), right=True)
        told[name] = {
            **sums.intervals(),
            "regions": {r: sums.counted(regions == i) for i, r in enumerate(REGIONS)},
            "domains": {d: sums.counted(None, of_domain[d]) for d in domains},
            "by_position": {"edges": edges, **sums.binned(bins, len(edges) - 1)},
            **_nmse(arrays, config),
            "l0": arrays.l0,
        }
    return told


def summarise_partial(
    measured: Mapping[str, Partial], config: BootstrapConfig | None = None
) -> dict[str, Any]:
    """KL of every partial replacement, per student.

    Returns:
        By student: ``first`` and ``last`` (L+1 intervals, of 0..L layers), ``single`` (L),
        ``block_passes``; ``top1_error`` with the same three; ``excess``: the same three for the KL
        beyond that of the full replacement, paired, and ``worst``, the largest mean of those that
        are not it; ``within_full``, whether none of the means lies above 0.
    """
    told: dict[str, Any] = {}
    for name, partial in measured.items():
        full = partial.kl["first"][:, -1:]
        beyond = {family: _curve(partial, partial.kl[family] - full, config) for family in FAMILIES}
        parts = [*beyond["first"][:-1], *beyond["last"][:-1]]
        parts += beyond["single"] if len(beyond["single"]) > 1 else []
        worst = max(parts, key=lambda interval: interval["mean"])
        told[name] = {
            **{
                family: _curve(partial, partial.kl[family], config, _POSITIVE)
                for family in FAMILIES
            },
            "block_passes": partial.block_passes,
            "top1_error": {
                family: _curve(partial, partial.wrong[family], config, _SHARE)
                for family in FAMILIES
            },
            "excess": {**beyond, "worst": worst},
            "within_full": worst["mean"] <= 0,
        }
    return told


def gaps(a: Measured, b: Measured, config: BootstrapConfig | None = None) -> dict[str, Any]:
    """``a`` minus ``b``, paired by text: intervals of ``kl`` and ``top1_error``.

    The gap is outside its interval where ``low`` is above 0, or ``high`` below.
    """
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
    """Each student against the next of ``names``, which is expected to be nearer to the target.

    Returns:
        Per pair of neighbours: ``above`` and ``below`` (names), their gaps ``kl`` and
        ``top1_error``, and ``holds``: ``yes``, the gap in top-1 error lies wholly above 0; ``tie``,
        0 is in its interval; ``no``, it lies below; or None, too few texts to tell.
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
    """KL of ``a`` minus that of ``b``, paired by text, at each point of a family's curve."""
    told: list[dict[str, Any]] = _curve(a, a.kl[family] - b.kl[family], config)
    return told


class _Sums:
    """Per-text sums of one student, over chosen positions."""

    def __init__(self, arrays: Measured, n: int, config: BootstrapConfig | None) -> None:
        self.text, self.n, self.config = arrays.text, n, config
        self.values = {"kl": arrays.kl.double(), "top1_error": _wrong(arrays)}
        self.bounds = {"kl": _POSITIVE, "top1_error": _SHARE}

    def intervals(
        self, positions: Tensor | None = None, texts: Tensor | None = None
    ) -> dict[str, Any]:
        """Of some positions (bool ``[P]``) and texts (bool ``[n]``); of all where None is given."""
        weight = torch.ones_like(self.text) if positions is None else positions
        chosen = slice(None) if texts is None else texts
        counts = _per_text(weight, self.text, self.n)[chosen]
        told: dict[str, Any] = {}
        for key, value in self.values.items():
            sums = _per_text(value * weight, self.text, self.n)[chosen]
            told[key] = ratio(sums, counts, bounds=self.bounds[key], config=self.config).plain()
        return told

    def counted(self, positions: Tensor | None, texts: Tensor | None = None) -> dict[str, Any]:
        """The same, and how many positions these are."""
        chosen = torch.ones_like(self.text, dtype=torch.bool) if positions is None else positions
        if texts is not None:
            chosen = chosen & texts[self.text]
        return {**self.intervals(positions, texts), "positions": int(chosen.sum())}

    def binned(self, bins: Tensor, n_bins: int) -> dict[str, Any]:
        """Of every bin, given the bin of each position."""
        cell = bins * self.n + self.text
        counts = _per_text(torch.ones_like(cell), cell, n_bins * self.n).view(n_bins, self.n)
        told: dict[str, Any] = {}
        for key, value in self.values.items():
            sums = _per_text(value, cell, n_bins * self.n).view(n_bins, self.n)
            told[key] = ratio(sums, counts, bounds=self.bounds[key], config=self.config).plain()
        return told


def _per_text(values: Tensor, text: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add_(0, text, values.double())


def _wrong(arrays: Measured) -> Tensor:
    return (~arrays.agrees).double()


def _edges(positions: int) -> list[int]:
    """0, 1, 2, 4, 8, ...: bins that double, the last one cut at the number of positions."""
    edges = [0]
    while edges[-1] < positions:
        edges.append(min(positions, max(1, 2 * edges[-1])))
    return edges


def _nmse(arrays: Measured, config: BootstrapConfig | None) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for key, values in (("nmse", arrays.nmse), ("nmse_token", arrays.token_nmse)):
        for i, suffix in enumerate(("", "_without_first")):
            curve = None
            if values is not None:
                per_layer = values[:, i].T
                ones = torch.ones(len(values))
                curve = ratio(per_layer, ones, bounds=_POSITIVE, config=config).plain()
            told[f"{key}_per_layer{suffix}"] = curve
    return told


def _curve(
    partial: Partial,
    sums: Tensor,
    config: BootstrapConfig | None,
    bounds: tuple[float, float] | None = None,
) -> Any:
    return ratio(sums.T, partial.positions, bounds=bounds, config=config).plain()
