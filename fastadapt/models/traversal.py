"""Target and students side by side through the layers of one pair, with no gradient."""

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
    """How a student's blocks are called: in which mode, and with which adapters.

    ``adapters`` are those that the model carries where None is given.
    """

    mode: Mode
    adapters: nn.ModuleList | None = None


@contextmanager
def carrying(model: ReplacementModel, adapters: nn.ModuleList | None) -> Iterator[None]:
    """Let the model carry other adapters inside the context (None: those it has)."""
    before = model.adapters
    if adapters is not None:
        model.carry(adapters)
    try:
        yield
    finally:
        model.carry(before)


def final_norm(model: ReplacementModel, hidden: Tensor, stream: Stream) -> Tensor:
    """The norm before the head that goes with a stream's last block."""
    with carrying(model, stream.adapters):
        return model.final_norm(hidden, stream.mode)


class Passed(NamedTuple):
    """Where a block left the streams: ``[B, T, D]`` each, and the aux of those that have one."""

    layer: int
    target: Tensor
    students: list[Tensor]
    aux: list[Aux | None]


@torch.no_grad()
def side_by_side(
    model: ReplacementModel, batch: Batch, streams: Sequence[Stream]
) -> Iterator[Passed]:
    """Walk the layers once, the target and every student free-running beside it.

    The model carries at the end what it carried before. The batch is on the model's device.
    """
    real, attention = batch.real, batch.attention_mask
    inputs = model.block_inputs(batch.input_ids, attention)
    padding = None if attention is None else ~real
    h, students = inputs.hidden, [inputs.hidden] * len(streams)
    with carrying(model, None):
        for layer in range(model.n_layers):
            arguments = inputs.arguments[layer]
            h, _ = model.block(layer, h, arguments, "target")
            aux: list[Aux | None] = []
            for s, (mode, adapters) in enumerate(streams):
                if adapters is not None:
                    model.carry(adapters)
                students[s], of_block = model.block(
                    layer, students[s], arguments, mode, mask=real, padding=padding
                )
                aux.append(of_block)
            model.leave(layer)
            yield Passed(layer, h, list(students), aux)
