"""Compare the activity of sets of features with the labels: recall, precision and ranking.

A set is active at a place if one of its features is. Each place counts once, also where several
labelled places share a matched place. S sites, n texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.contrast.places import Place, Rows, Site
from fastadapt.evaluation.contrast.summary import groups_of, kinds_of
from fastadapt.evaluation.statistics import BootstrapConfig, ratio

_SHARE = (0.0, 1.0)


def recognise(
    activity: Mapping[str, Tensor],
    places: Sequence[Place],
    rows: Rows,
    sites: Sequence[Site],
    n_texts: int,
    config: BootstrapConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Return how well each set's activity tells labelled places from matched places.

    Args:
        activity: by name, the activity ``[draws, S]`` of one set, or of several random sets, whose
            numbers are averaged.
        places: the places.
        rows: their rows among the sites.
        sites: the sites.
        n_texts: number of texts, those without places included.
        config: settings of the intervals, over texts.

    Returns:
        By name and kind of place, the intervals ``recall``, the share of labelled places at which
        the set is active; ``active_matched``, the same of matched places; ``precision``, the share
        of the active places that are labelled; ``ranking``, the probability that the activity at a
        labelled place is above that at one of its matched places, where equal ones count one half;
        and ``labelled_share``, the precision of a set that is active at random.
    """
    text = torch.tensor([t for t, _ in sites])
    result: dict[str, dict[str, Any]] = {name: {} for name in activity}
    for kind in kinds_of(places):
        chosen = torch.tensor([kind in groups_of(place) for place in places])
        labelled = rows.labelled[chosen]
        owned = chosen[rows.owner]
        matched = rows.matched[owned].unique()
        n_labelled, n_matched = (
            torch.bincount(text[each], minlength=n_texts).double() for each in (labelled, matched)
        )
        share = len(labelled) / (len(labelled) + len(matched))
        for name, values in activity.items():
            active = (values > 0).double().mean(0)
            hits, misses = (
                _by_text(active[each], text[each], n_texts) for each in (labelled, matched)
            )
            pairs = _wins(values, rows)[chosen]
            intervals = {
                "recall": ratio(hits, n_labelled, bounds=_SHARE, config=config),
                "active_matched": ratio(misses, n_matched, bounds=_SHARE, config=config),
                "precision": ratio(hits, hits + misses, bounds=_SHARE, config=config),
                "ranking": ratio(
                    _by_text(pairs, text[labelled], n_texts),
                    n_labelled,
                    bounds=_SHARE,
                    config=config,
                ),
            }
            plain = {key: value.plain() for key, value in intervals.items()}
            result[name][kind] = {**plain, "labelled_share": share}
    return result


def _by_text(values: Tensor, text: Tensor, n_texts: int) -> Tensor:
    return values.new_zeros(n_texts).index_add_(0, text, values)


def _wins(values: Tensor, rows: Rows) -> Tensor:
    """Return, per labelled place, the mean over draws and matched places of who is more active."""
    gap = values[:, rows.labelled][:, rows.owner] - values[:, rows.matched]
    wins = ((gap > 0).double() + 0.5 * (gap == 0).double()).mean(0)
    n = len(rows.labelled)
    counts = torch.bincount(rows.owner, minlength=n)
    return wins.new_zeros(n).index_add_(0, rows.owner, wins) / counts
