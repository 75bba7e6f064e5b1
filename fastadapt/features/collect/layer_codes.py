"""Codes of features and of MLP neurons, from one pass of a batch through the layers.

Features come as sparse codes from the adapter's own forward. The base's neurons are read in the
replacement model. The target's neurons are read in the target, which runs beside the replacement
model only if these neurons are requested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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


class Outputs(NamedTuple):
    """What three modules of a layer write on the same inputs, at N tokens: ``[N, D]`` each."""

    base: Tensor  #: the base's MLP.
    target: Tensor  #: the target's MLP.
    adapter: Tensor  #: the adapter alone, ``b_dec`` included.


@contextmanager
def record_outputs(model: ReplacementModel) -> Iterator[Callable[[int], Outputs]]:
    """Yield a function that returns the outputs of the layer that :func:`walk` yielded last.

    The inputs are those of the replacement model. The function runs the target's MLP on them; the
    other outputs are recorded.
    """
    seen: dict[str, Tensor] = {}

    def from_base(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(inputs=inputs[0], base=output)

    def from_adapter(_: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        seen.update(adapter=output[0])

    @torch.no_grad()
    def outputs_of(layer: int) -> Outputs:
        base, adapter = seen["base"], seen["adapter"]
        target = model.mlps[layer].target
        assert target is not None
        return Outputs(*(y.flatten(0, -2) for y in (base, target(seen["inputs"]), adapter)))

    handles = []
    try:
        for mlp in model.mlps:
            handles.append(mlp.base.register_forward_hook(from_base))
            handles.append(mlp.adapter.register_forward_hook(from_adapter))
        yield outputs_of
    finally:
        for handle in handles:
            handle.remove()
