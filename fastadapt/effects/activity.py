"""Read the activity of sets of features at places of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.evaluation.contrast.measure import Quantity
from fastadapt.features.collect.layer_codes import walk
from fastadapt.features.store.sets import FeatureSet
from fastadapt.models.replacement import ReplacementModel


def activity_of(model: ReplacementModel, sets: Sequence[FeatureSet]) -> Quantity:
    """Return the activity of each set: the sum of ``a_i·‖W_dec_i‖`` over its features.

    Args:
        model: replacement model whose adapters are those of the run; the model of the reader is
            its transformers model.
        sets: sets of features of the run's adapter, K in number.

    Returns:
        The quantity, of width K; 0 where no feature of a set is active.
    """
    members = torch.zeros(len(sets), model.n_layers, model.n_features, dtype=torch.bool)
    for i, features in enumerate(sets):
        for layer, feature in features:
            members[i, layer, feature] = True

    @torch.no_grad()
    def compute(_: Any, batch: Batch, positions: Sequence[Sequence[int]]) -> Tensor:
        n_rows, length = batch.input_ids.shape
        total = torch.zeros(n_rows * length, len(sets), dtype=torch.float64)
        adapter: Any
        for layer, by_kind in walk(model, batch, {}):
            codes = by_kind["adapter"]
            adapter = model.adapters[layer]
            norms = adapter.W_dec.double().norm(dim=1)[codes.features]
            sizes = (codes.values.double() * norms).cpu()
            belongs = members[:, layer, codes.features.cpu()].T
            total.index_add_(0, codes.tokens.cpu(), sizes[:, None] * belongs)
        rows = [row * length + p for row, each in enumerate(positions) for p in each]
        return total[rows]

    return Quantity(("activity", tuple(s.digest() for s in sets)), len(sets), compute)
