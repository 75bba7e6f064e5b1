"""Predicted against measured effects of ablating single features, over places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastadapt.effects.run import LoadedRun
from fastadapt.evaluation.statistics import ratio
from fastadapt.graphs.attribution import Leaves
from fastadapt.graphs.evidence import EvidenceConfig, Sample, measure_evidence
from fastadapt.graphs.linear.trace import Stream, record
from fastadapt.graphs.targets import contrast
from reproduce.graphs.places import places

#: The graph's prediction, and what it is compared with.
PREDICTORS = ("graph", "direct edge", "activation", "random")


def measure_effects(
    run: LoadedRun,
    n: int,
    config: EvidenceConfig,
    *,
    stream: Stream = "replacement",
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Return correlations of predicted and measured effects, with 95% intervals over places.

    At each place the difference of the target's and the hybrid's top token is explained. Places
    with fewer features than are ablated are left out.

    Args:
        run: a run with transcoders.
        n: number of places.
        config: ablations.
        stream: whose states are explained.
        progress: called with the number of measured places.
    """
    samples: dict[str, list[Sample]] = {"strongest": [], "random": []}
    returned = []
    for place in places(run, n, config.seed):
        trace = record(run.model, place.ids, stream=stream, rows=1)
        _, token, against, _ = place.difference
        target = contrast(trace, token, against, trace.n_tokens - 1)
        leaves = Leaves(trace)
        reach = leaves.layer[: leaves.n_features] < trace.n_layers
        if int(reach.sum()) < config.ablations:
            continue
        evidence = measure_evidence(trace, leaves, target, config)
        for sample in evidence.samples:
            samples[sample.name].append(sample)
        returned.append(evidence.returned)
        progress(len(returned))
    return {
        "stream": stream,
        "places": len(returned),
        "ablations": config.ablations,
        "returned": _mean(torch.tensor(returned)),
        "samples": [_summary(name, of_places) for name, of_places in samples.items()],
    }


def _summary(name: str, samples: list[Sample]) -> dict[str, Any]:
    """Return means over places, and the paired differences of the graph to each baseline."""
    summary: dict[str, Any] = {"name": name}
    for measure in ("spearman", "pearson"):
        values = torch.tensor(
            [[getattr(line, measure)[0] for line in sample.correlations] for sample in samples],
            dtype=torch.float64,
        )
        assert [line.predictor for line in samples[0].correlations] == list(PREDICTORS)
        means = {p: _mean(values[:, i]) for i, p in enumerate(PREDICTORS)}
        graph = values[:, 0]
        above = {p: _mean(graph - values[:, i]) for i, p in enumerate(PREDICTORS) if i}
        summary[measure] = {"mean": means, "graph minus": above}
    return summary


def _mean(values: torch.Tensor) -> Any:
    known = values[values.isfinite()]
    return ratio(known, torch.ones(len(known))).plain()
