"""Ablate features or rank components at single positions of a text, in the free-running model.

An ablated activation is subtracted from the output of its layer's MLP, and every later part
computes with the change: in the stream ``replacement`` the base's MLPs and the adapters, in the
stream ``target`` the target's own MLPs. In the stream ``ranks`` an ablated component is subtracted
from the output of its linear layer, in the target. Copies of the text with different ablations run
as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.graphs.attribution import Leaves, Target
from fastadapt.graphs.linear.trace import Trace
from fastadapt.graphs.linear.units import Units
from fastadapt.models.adapted_mlp import AdaptedMLP
from fastadapt.models.replacement import Mode, ReplacementModel
from fastadapt.models.sources.low_rank import LowRankLinear


@dataclass(frozen=True)
class Surgery:
    """Removals of features, or of rank components, in copies of one text, a set per copy.

    Attributes:
        sets: indices of leaves, one tensor per copy.
        keep: subtract the units that are *not* in the set.
        held: only the base's MLPs react to the change: what the trace's MLPs add to their outputs,
            features included, stays that of the trace. For rank components, the components that are
            nodes stay those of the trace, and all else reacts.
    """

    sets: Sequence[Tensor]
    keep: bool = False
    held: bool = False


@torch.no_grad()
def run(model: ReplacementModel, ids: Tensor, target: Target, mode: Mode) -> Tensor:
    """Return a target's value in copies of a text, ``[copies]``, in the free-running model.

    Args:
        model: the replacement model.
        ids: ``[copies, T]``.
        target: the quantity, of the MLP's input of a layer or of the final state.
        mode: which model.
    """
    inputs = model.block_inputs(ids, None)
    hidden, given = inputs.hidden, []
    with ExitStack() as stack:
        if target.layer is not None:
            hook = model.mlps[target.layer].register_forward_pre_hook(
                lambda _, args: given.append(args[0])
            )
            stack.callback(hook.remove)
        for layer, arguments in enumerate(inputs.arguments):
            hidden, _ = model.block(layer, hidden, arguments, mode)
            model.reshard_layer(layer)
    state = model.final_norm(hidden, mode) if target.layer is None else given[0]
    return target.measure(state[:, target.position])


def run_changed(trace: Trace, leaves: Leaves, target: Target, surgery: Surgery) -> Tensor:
    """Run the graph's model with each set of leaves ablated; return the values ``[sets]``."""
    with _operating(trace, surgery, leaves):
        ids = trace.ids.expand(len(surgery.sets), -1)
        return run(trace.model, ids, target, trace.mode)


@contextmanager
def _operating(trace: Trace, surgery: Surgery, leaves: Leaves) -> Iterator[None]:
    """Change the outputs of MLPs, or of low-rank layers, inside the context."""
    model, n_tokens = trace.model, trace.n_tokens
    if trace.stream == "ranks":
        with _operating_ranks(trace, surgery, leaves):
            yield
        return
    per_layer: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    for copy, indices in enumerate(surgery.sets):
        for layer in range(model.n_layers):
            mine = indices[leaves.layer[indices] == layer]
            token = copy * n_tokens + leaves.position[mine]
            per_layer[layer].append(token * model.n_features + leaves.feature[mine])
    with ExitStack() as stack:
        for layer, mlp in enumerate(model.mlps):
            keys = torch.cat(per_layer[layer]).to(model.device)
            hook = partial(_operate, trace, layer, keys, surgery)
            stack.callback(mlp.register_forward_hook(hook).remove)
        yield


@contextmanager
def _operating_ranks(trace: Trace, surgery: Surgery, leaves: Leaves) -> Iterator[None]:
    """Change the outputs of low-rank layers inside the context."""
    modules = {
        (layer, linear.name): linear.module
        for layer, of_layer in enumerate(trace.linears)
        for linear in of_layer
    }
    with ExitStack() as stack:
        for units, rows in leaves.groups:
            drop = torch.zeros(len(surgery.sets), rows.stop - rows.start, dtype=torch.bool)
            for copy, indices in enumerate(surgery.sets):
                mine = indices[(indices >= rows.start) & (indices < rows.stop)]
                drop[copy, mine - rows.start] = True
            drop ^= surgery.keep
            # All components of a layer are units at every token.
            by_token = drop.view(len(drop), trace.n_tokens, -1).to(trace.embedding.device)
            hook = partial(_operate_ranks, units, by_token, surgery.held)
            stack.callback(modules[units.layer, units.name].register_forward_hook(hook).remove)
        yield


def _operate_ranks(
    units: Units, drop: Tensor, held: bool, module: LowRankLinear, args: Any, out: Tensor
) -> Tensor:
    """Return a low-rank layer's output ``[copies, T, out]`` without some of its components.

    Args:
        units: the layer's components.
        drop: bool ``[copies, T, r]``.
        held: the values that stay are those of the trace.
        module: the layer.
        args, out: of its call.
    """
    x = args[0]
    if not held:
        return out - (x @ units.encoder.T * drop) @ units.decoder
    values = units.codes.values.view(drop.shape[1:])
    changed = module.scaled(nn.functional.linear(x, module.weight))
    if module.bias is not None:
        changed = changed + module.bias
    return changed + torch.where(drop, 0, values) @ units.decoder


def _operate(
    trace: Trace,
    layer: int,
    keys: Tensor,
    surgery: Surgery,
    mlp: AdaptedMLP,
    args: Any,
    out: Tensor,
) -> Tensor:
    """Return an MLP's output without the features of ``keys``, or without all others."""
    adapter: Any = mlp.adapter
    x = args[0]
    copies, n_tokens = x.shape[:2]
    if surgery.held:
        added = trace.mlp_out[layer] - mlp.base(trace.mlp_in[layer])
        out = mlp.base(x) + added
        (codes,) = (u.codes for u in trace.units if (u.kind, u.layer) == ("feature", layer))
        first = torch.arange(copies, device=x.device)[:, None] * n_tokens
        tokens = (first + codes.tokens).flatten()
        features, values = codes.features.repeat(copies), codes.values.repeat(copies)
    else:
        _, aux = adapter(x, return_codes=True)
        tokens, features, values = aux.codes
    drop = torch.isin(tokens * adapter.n_features + features, keys) ^ surgery.keep
    flat = out.reshape(-1, out.shape[-1]).clone()
    rows = adapter.W_dec[features[drop]] * -values[drop, None]
    return flat.index_add_(0, tokens[drop], rows).view_as(out)
