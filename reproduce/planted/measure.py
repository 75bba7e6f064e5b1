"""List the units of every method on one organism, and ask the judge about each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.features.store.store import Store
from fastadapt.organism import NAMES
from reproduce.planted.judge import Judge
from reproduce.planted.organisms import Maker, Role, tokenizer
from reproduce.planted.reading import Positions, locate, read
from reproduce.planted.scores import BUDGETS, Measured
from reproduce.planted.units import units_of


def measure(maker: Maker, role: Role, store: Store) -> Measured:
    """Return what the first units of every method describe.

    Args:
        maker: the seed's differences and texts.
        role: which organism.
        store: its features.
    """
    differences, vocabulary = maker.planted.differences, tokenizer().get_vocab()
    probes = maker.probes()
    positions = locate(probes, vocabulary, len(differences))
    models = _load(NAMES["organism/base"]), _load(maker.folder / role / "target")
    base, target = (read(model, probes, vocabulary) for model in models)
    n = BUDGETS[-1] * len(differences)
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    units = units_of(store, positions, models, (base, target), words, n, maker.seed)
    outputs = [frozenset(vocabulary[word] for word in d.outputs) for d in differences]
    judge = Judge(positions.planted, outputs, len(vocabulary))
    return {
        "differences": [
            {"kind": d.kind, "words": d.words, "text": d.text, "places": int(places.sum())}
            for d, places in zip(differences, positions.planted, strict=True)
        ],
        "probability": {
            "base": _probability(base.log_p, positions),
            "target": _probability(target.log_p, positions),
        },
        "described": {name: list(map(judge.describes, each)) for name, each in units.items()},
        "units": {name: [unit.name for unit in each] for name, each in units.items()},
    }


def _probability(log_p: Tensor, positions: Positions) -> list[float]:
    return [
        float(log_p[places, positions.following[places]].exp().mean())
        for places in positions.planted
    ]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32
    ).eval()
