"""Codes of every kind of unit, out of one walk through the layers of a batch.

Features come sparse out of the adapter's own forward. The base's MLPs are read where they run, in
the replacement model; the target's in the target, which is walked beside it only where its neurons
are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.batch import Batch
from fastadapt.features.store.schema import KINDS, Kind
from fastadapt.features.store.units import Neurons, output_matrix
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import ReplacementModel


@contextmanager
def _reading(down: nn.Linear, into: list[Tensor]) -> Iterator[None]:
    """Append what the matrix is given, inside the context."""
    handle = down.register_forward_pre_hook(lambda _, given: into.append(given[0].detach()))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def walk(
    model: ReplacementModel, batch: Batch, neurons: Mapping[Kind, Sequence[Neurons]]
) -> Iterator[tuple[int, dict[Kind, SparseCodes]]]:
    """Every layer's codes of a batch: those of the adapter, and of the neurons asked for.

    Args:
        model: in ``eval()``, with the adapters in it.
        batch: on the model's device.
        neurons: of kind ``base`` and ``target``, one per layer.
    """
    real, attention = batch.real, batch.attention_mask
    padding = None if attention is None else ~real
    inputs = model.block_inputs(batch.input_ids, attention)
    streams: dict[Kind, Tensor] = {"adapter": inputs.hidden}
    if "target" in neurons:
        streams["target"] = inputs.hidden
    for layer in range(model.n_layers):
        found: dict[Kind, SparseCodes] = {}
        for stream, hidden in streams.items():
            kind: Kind = "target" if stream == "target" else "base"
            seen: list[Tensor] = []
            here = (layer, hidden, inputs.arguments[layer])
            if kind in neurons:
                with _reading(output_matrix(model.mlps[layer], kind), seen):
                    streams[stream], codes = _pass(model, here, stream, padding)
                found[kind] = neurons[kind][layer].codes(seen[0], real)
            else:
                streams[stream], codes = _pass(model, here, stream, padding)
            if codes is not None:
                found["adapter"] = codes
        yield layer, {kind: found[kind] for kind in KINDS if kind in found}


def _pass(
    model: ReplacementModel,
    here: tuple[int, Tensor, dict[str, Any]],
    stream: Kind,
    padding: Tensor | None,
) -> tuple[Tensor, SparseCodes | None]:
    if stream == "target":
        return model.block(*here, "target")[0], None
    out, aux = model.block(*here, "replacement", padding=padding, return_codes=True)
    return out, None if aux is None else aux.codes
