"""Compare contrasts with the gate on and off: what the marker of the gated pair adds.

The texts with and without the marker are different, so the two groups are independent samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.evaluation.contrast.places import Place, Rows
from fastadapt.evaluation.contrast.summary import Contrast
from fastadapt.evaluation.statistics import (
    BootstrapConfig,
    Intervals,
    difference,
    paired_difference,
)


def gate_effects(
    contrasts: Mapping[str, Contrast],
    references: Mapping[str, str],
    places: Sequence[Place],
    rows: Rows,
    n_texts: int,
    config: BootstrapConfig | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the effect of the gated pair's marker on each model's contrast, with intervals.

    Args:
        contrasts: contrast by model; column 0 is the set of words.
        references: the model that a model is compared with; models without one are left out.
        places: the places.
        rows: their texts.
        n_texts: number of texts, those without places included.
        config: settings of the intervals.

    Returns:
        By model the interval ``contrast``: P(set) at labelled minus matched places with the gate
        on, minus the same with the gate off. With a reference also ``effect_on`` and
        ``effect_off``, P(set) of the reference minus P(set) of the model at labelled places, and
        their difference ``interaction``. Empty unless there are places with the gate on and off.
    """
    states = {place.gate for place in places}
    if states != {True, False}:
        return {}
    names = list(contrasts)
    labelled = torch.stack([each.labelled[:, 0] for each in contrasts.values()])
    matched = torch.stack([each.matched[:, 0] for each in contrasts.values()])
    index = {name: i for i, name in enumerate(names)}
    arms = [index[name] for name in references]
    before = [index[name] for name in references.values()]
    first, second = torch.cat([labelled, labelled[before]]), torch.cat([matched, labelled[arms]])
    on, off = (
        _differences(first, second, places, rows.text, n_texts, gate, config)
        for gate in (True, False)
    )
    gaps = difference(on, off).plain()
    result: dict[str, dict[str, Any]] = {name: {"contrast": gaps[index[name]]} for name in names}
    for i, name in enumerate(references, len(names)):
        result[name] |= {
            "effect_on": on.plain()[i],
            "effect_off": off.plain()[i],
            "interaction": gaps[i],
        }
    return result


def _differences(
    first: Tensor,
    second: Tensor,
    places: Sequence[Place],
    text: Tensor,
    n_texts: int,
    gate: bool,
    config: BootstrapConfig | None,
) -> Intervals:
    """Return the mean differences of values ``[M, N]`` in 0..1, over places with a gate's state."""
    chosen = torch.tensor([place.gate is gate for place in places])
    a, b = (
        each.new_zeros(len(each), n_texts).index_add_(1, text[chosen], each[:, chosen])
        for each in (first, second)
    )
    return paired_difference(a, b, torch.bincount(text[chosen], minlength=n_texts), config)
