"""Ablate features at single positions of a text, in the free-running model.

An ablated activation is subtracted from the output of its adapter, and every later part computes
with the change. Copies of the text with different ablations run as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastadapt.graphs.attribution import Leaves, Target
from fastadapt.models.replacement import Mode, ReplacementModel


@dataclass(frozen=True)
class Surgery:
    """Changes of adapters' outputs in copies of one text, a set of features per copy.

    Attributes:
        sets: indices of leaves, one tensor per copy.
        keep: subtract the features that are *not* in the set.
        held: adapters do not react to the change: their other activations stay those of the trace.
    """

    sets: Sequence[Tensor]
    keep: bool = False
    held: bool = False


@torch.no_grad()
def run(
    model: ReplacementModel,
    ids: Tensor,
    target: Target,
    mode: Mode = "replacement",
    surgery: Surgery | None = None,
    leaves: Leaves | None = None,
) -> Tensor:
    """Return a target's value in each copy of a text, ``[copies]``, in the free-running model."""
    copies = 1 if surgery is None else len(surgery.sets)
    inputs = model.block_inputs(ids.expand(copies, -1), None)
    hidden, given = inputs.hidden, []
    with ExitStack() as stack:
        if surgery is not None:
            assert leaves is not None
            stack.enter_context(_operating(model, surgery, leaves, len(ids)))
        if target.layer is not None:
            hook = model.mlps[target.layer].register_forward_pre_hook(
                lambda _, args: given.append(args[0])
            )
            stack.callback(hook.remove)
        for layer, arguments in enumerate(inputs.arguments):
            hidden, _ = model.block(layer, hidden, arguments, mode, return_codes=True)
            model.reshard_layer(layer)
    state = model.final_norm(hidden, mode) if target.layer is None else given[0]
    return target.measure(state[:, target.position])


@contextmanager
def _operating(
    model: ReplacementModel, surgery: Surgery, leaves: Leaves, n_tokens: int
) -> Iterator[None]:
    """Change the adapters' outputs inside the context."""
    n = model.n_features
    per_layer: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    for copy, indices in enumerate(surgery.sets):
        for layer in range(model.n_layers):
            mine = indices[leaves.layer[indices] == layer]
            token = copy * n_tokens + leaves.position[mine]
            per_layer[layer].append(token * n + leaves.feature[mine])
    with ExitStack() as stack:
        for layer, mlp in enumerate(model.mlps):
            keys = torch.cat(per_layer[layer]).to(model.device)
            rows = slice(leaves.first[layer], leaves.first[layer + 1])
            held = None
            if surgery.held:
                held = tuple(
                    part[rows].to(model.device)
                    for part in (leaves.position, leaves.feature, leaves.activation)
                )
            hook = partial(_operate, keys, surgery.keep, held)
            stack.callback(mlp.adapter.register_forward_hook(hook).remove)
        yield


def _operate(
    keys: Tensor, keep: bool, held: tuple[Tensor, ...] | None, adapter: Any, args: Any, result: Any
) -> Any:
    """Return an adapter's result without the features of ``keys``, or without all others."""
    out, aux = result
    copies, n_tokens = out.shape[:2]
    if held is None:
        tokens, features, values = aux.codes
    else:
        position, feature, activation = held
        tokens = (torch.arange(copies).to(out.device)[:, None] * n_tokens + position).flatten()
        features, values = feature.repeat(copies), activation.repeat(copies).to(out)
        out = adapter.decoder_bias().expand_as(out)
        out = _plus(out, tokens, features, values, adapter.W_dec)
    drop = torch.isin(tokens * adapter.n_features + features, keys) ^ keep
    return _plus(out, tokens[drop], features[drop], -values[drop], adapter.W_dec), aux


def _plus(out: Tensor, tokens: Tensor, features: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    flat = out.reshape(-1, out.shape[-1]).clone()
    return flat.index_add_(0, tokens, W_dec[features] * values[:, None]).view_as(out)
