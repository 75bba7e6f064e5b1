"""Run the target and several students through the layers side by side, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import Aux
from fastadapt.batch import Batch
from fastadapt.models.replacement import Mode, ReplacementModel


class Stream(NamedTuple):
    """Mode and adapters of a student's blocks; None stands for the model's current adapters."""

    mode: Mode
    adapters: nn.ModuleList | None = None


@contextmanager
def carrying(model: ReplacementModel, adapters: nn.ModuleList | None) -> Iterator[None]:
    """Replace the model's adapters inside the context; None keeps the current adapters."""
    before = model.adapters
    if adapters is not None:
        model.set_adapters(adapters)
    try:
        yield
    finally:
        model.set_adapters(before)


def final_norm(model: ReplacementModel, hidden: Tensor, stream: Stream) -> Tensor:
    """Apply the model's last norm, with the stream's mode and adapters."""
    with carrying(model, stream.adapters):
        return model.final_norm(hidden, stream.mode)


class Passed(NamedTuple):
    """Hidden states ``[B, T, D]`` of all streams after one block, and each student's aux."""

    layer: int
    target: Tensor
    students: list[Tensor]
    aux: list[Aux | None]


@torch.no_grad()
def side_by_side(
    model: ReplacementModel, batch: Batch, streams: Sequence[Stream]
) -> Iterator[Passed]:
    """Yield the hidden states of the target and of every student after each layer.

    Each stream's block gets the states of the same stream. The model's adapters are restored at the
    end. The batch must be on the model's device.
    """
    real = batch.real
    inputs = model.block_inputs(batch.input_ids, batch.model_mask)
    padding = None if batch.attention_mask is None else ~real
    h, students = inputs.hidden, [inputs.hidden] * len(streams)
    with carrying(model, None):
        for layer in range(model.n_layers):
            arguments = inputs.arguments[layer]
            h, _ = model.block(layer, h, arguments, "target")
            aux: list[Aux | None] = []
            for s, (mode, adapters) in enumerate(streams):
                if adapters is not None:
                    model.set_adapters(adapters)
                students[s], block_aux = model.block(
                    layer, students[s], arguments, mode, mask=real, padding=padding
                )
                aux.append(block_aux)
            model.reshard_layer(layer)
            yield Passed(layer, h, list(students), aux)
