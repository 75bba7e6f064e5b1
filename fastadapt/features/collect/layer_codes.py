"""Codes of features and of MLP neurons, from one pass of a batch through the layers.

Features come as sparse codes from the adapter's own forward. The base's neurons are read in the
replacement model. The target's neurons are read in the target, which runs beside the replacement
model only if these neurons are requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.features.store.schema import KINDS, Kind
from fastadapt.features.store.units import Neurons, output_matrix
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.block_inputs import record_module_inputs
from fastadapt.models.replacement import Mode, ReplacementModel


@torch.no_grad()
def walk(
    model: ReplacementModel, batch: Batch, neurons: Mapping[Kind, Sequence[Neurons]]
) -> Iterator[tuple[int, dict[Kind, SparseCodes]]]:
    """Yield each layer with the batch's codes, of the adapter and of the requested neurons.

    Args:
        model: replacement model in ``eval()``, with its adapters.
        batch: on the model's device.
        neurons: neurons to read, by kind ``base`` and ``target``; one entry per layer.
    """
    real, attention = batch.real, batch.attention_mask
    padding = None if attention is None else ~real
    inputs = model.block_inputs(batch.input_ids, attention)
    streams: dict[Mode, Tensor] = {"replacement": inputs.hidden}
    if "target" in neurons:
        streams["target"] = inputs.hidden
    for layer in range(model.n_layers):
        codes: dict[Kind, SparseCodes] = {}
        for stream, hidden in streams.items():
            kind: Kind = "target" if stream == "target" else "base"
            matrices = [output_matrix(model.mlps[layer], kind)] if kind in neurons else []
            options: dict[str, Any] = {}
            if stream == "replacement":
                options = {"padding": padding, "return_codes": True}
            with record_module_inputs(*matrices) as read:
                arguments = inputs.arguments[layer]
                streams[stream], aux = model.block(layer, hidden, arguments, stream, **options)
            if read:
                codes[kind] = neurons[kind][layer].codes(read[0], real)
            if aux is not None and aux.codes is not None:
                codes["adapter"] = aux.codes
        yield layer, {kind: codes[kind] for kind in KINDS if kind in codes}
