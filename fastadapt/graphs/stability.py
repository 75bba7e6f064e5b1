"""How much the strongest features of graphs change when the text is sampled or worded differently.

Graphs of several texts are in groups: responses sampled to the same prompt, or paraphrases of one
prompt. The features that the graphs have in common are compared within groups and between them.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.graphs.schema import GraphFile
from fastadapt.io.atomic import disk_errors, make_folder, replacing

Unit = tuple[int, int]


@dataclass(frozen=True)
class Fingerprint:
    """The features, or rank components, of one text's graph.

    Attributes:
        group: texts of one group are resamples or paraphrases of each other.
        top: the strongest features, as (layer, number), whatever their positions.
        active: all features that the graph's file holds.
    """

    group: str
    top: frozenset[Unit]
    active: frozenset[Unit]

    @classmethod
    def of_graph(cls, group: str, document: GraphFile, n: int) -> Fingerprint:
        """Return the ``n`` features, or rank components, of most influence over all positions."""
        influence: dict[Unit, float] = {}
        for node in document["nodes"]:
            if node["kind"] in ("feature", "rank component"):
                unit = (node["layer"], node["feature"])
                influence[unit] = influence.get(unit, 0.0) + node["influence"]
        order = sorted(influence, key=lambda unit: (-influence[unit], unit))
        return cls(group, frozenset(order[:n]), frozenset(influence))


class Agreement(NamedTuple):
    """Mean Jaccard index over pairs of texts, with ends of its 95% interval over texts.

    ``chance`` is that of as many features drawn uniformly from each graph's file.
    """

    name: str
    pairs: int
    jaccard: tuple[float, float, float]
    chance: float


def jaccard(a: frozenset[Unit], b: frozenset[Unit]) -> float:
    """Return the share of the features of both sets that are in each of them; nan for empty sets.

    Example:
        >>> jaccard(frozenset([(0, 1), (0, 2)]), frozenset([(0, 2), (3, 4)]))
        0.3333333333333333
    """
    return len(a & b) / len(a | b) if a | b else math.nan


def stability(
    graphs: Sequence[Fingerprint], *, resamples: int = 1000, seed: int = 0
) -> list[Agreement]:
    """Return the agreement within groups, and between texts of different groups.

    A bootstrap sample draws the texts with replacement. Pairs of a text with itself do not count,
    nor pairs of texts whose graphs both have no features. A comparison without pairs is left out.

    Args:
        graphs: two texts or more.
        resamples: bootstrap samples.
        seed: seed of the bootstrap and of the random features.

    Raises:
        UserError: fewer than two texts, or no graph with features.
    """
    if len(graphs) < 2:
        raise UserError(
            f"--stability: expected graphs of two texts or more, got {len(graphs)}; give --prompts "
            "with several files, or more numbers to --place"
        )
    if not any(graph.top for graph in graphs):
        raise UserError(
            f"--stability: expected graphs with features, got {len(graphs)} without any; give "
            "other texts"
        )
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    drawn = [frozenset(draw.sample(sorted(graph.active), len(graph.top))) for graph in graphs]
    n = len(graphs)
    index = torch.tensor([sorted({g.group for g in graphs}).index(g.group) for g in graphs])
    same = index[:, None] == index[None]
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = _pairwise([graph.top for graph in graphs])
    chance = _pairwise(drawn)
    defined = scores.isfinite()
    counts = torch.stack(
        [
            torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n)
            for _ in range(resamples)
        ]
    ).double()
    agreements = []
    for name, mask in (("same group", same & upper), ("other groups", ~same & upper)):
        mask &= defined
        pairs = int(mask.sum())
        if pairs:
            values = _means(scores, mask, counts)
            low, high = values.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
            mean = (float(scores[mask].mean()), low, high)
            agreements.append(Agreement(name, pairs, mean, float(chance[mask].mean())))
    return agreements


def _pairwise(sets: Sequence[frozenset[Unit]]) -> Tensor:
    return torch.tensor([[jaccard(a, b) for b in sets] for a in sets], dtype=torch.float64)


def _means(scores: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over pairs in each bootstrap sample; samples without pairs are left out."""
    weights = mask.double()
    total = torch.einsum("rn,nm,rm->r", counts, scores.where(mask, 0), counts)
    number = torch.einsum("rn,nm,rm->r", counts, weights, counts)
    return total[number > 0] / number[number > 0]


def save(
    folder: Path, top: int, agreements: Sequence[Agreement], graphs: Mapping[str, str]
) -> Path:
    """Write a comparison as JSON, named after its graphs; return the path.

    Args:
        folder: folder to write.
        top: number of features compared.
        agreements: the comparison.
        graphs: the group of each graph, by the name of its file.

    Raises:
        RunError: the file cannot be written.
    """
    document = {
        "kind": "stability of graphs",
        "top": top,
        "graphs": dict(graphs),
        "agreements": [agreement._asdict() for agreement in agreements],
    }
    key = json.dumps([top, sorted(graphs.items())]).encode()
    path = folder / f"{hashlib.sha256(key).hexdigest()[:12]}.json"
    with disk_errors(path):
        make_folder(folder)
        with replacing(path) as staged:
            staged.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    return path
