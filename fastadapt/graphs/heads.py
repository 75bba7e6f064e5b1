"""Split edges by the last attention head on their paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.graphs.attribution import Leaves, Target, add_edges, cotangents_of
from fastadapt.graphs.backward import BlockGradients, walk
from fastadapt.graphs.trace import Trace
from fastadapt.graphs.units import HEADS


class HeadLoadings(NamedTuple):
    """Edges of some leaves into one target, by the last attention head on the path.

    ``heads.sum((1, 2)) + direct`` equals the edges.
    """

    heads: Tensor  #: real ``[n, L, H]``.
    direct: Tensor  #: real ``[n]``: paths through no head.


def head_loadings(
    trace: Trace, leaves: Leaves, target: Target, sources: Sequence[int] | Tensor
) -> HeadLoadings:
    """Split edges into a target by the last attention head that their paths pass.

    Every path from a leaf to the target has a last head, or none. The last head reads other
    positions and writes to the target's; after it a path stays in residual stream and MLPs. With
    held patterns the split is exact. It takes one backward pass per layer and R heads.

    Args:
        trace: a trace; :attr:`.trace.Trace.rows` heads share a backward pass.
        leaves: its leaves.
        target: the target.
        sources: indices of leaves, n of them.
    """
    sources = torch.as_tensor(sources, dtype=torch.int64)
    n_heads = int(trace.model.model.config.num_attention_heads)
    # What remains after all paths through a later head were taken away, by layer.
    left: dict[int, BlockGradients] = {}
    walk(trace, cotangents_of(trace, [target]), lambda grads: _store(left, grads))
    heads = torch.zeros(len(sources), trace.n_layers, n_heads, dtype=trace.embedding.dtype)
    for layer in sorted(left, reverse=True):
        into = left[layer].states[HEADS][0].unflatten(-1, (n_heads, -1))
        for first in range(0, n_heads, trace.rows):
            batch = range(first, min(first + trace.rows, n_heads))
            cotangent = into.new_zeros(len(batch), *into.shape)
            for row, head in enumerate(batch):
                cotangent[row, :, head] = into[:, head]
            rows = torch.zeros(len(batch), len(leaves), dtype=heads.dtype)

            def take(grads: BlockGradients, rows: Tensor = rows, layer: int = layer) -> None:
                add_edges(trace, leaves, rows, grads)
                _subtract(left[grads.layer], grads, layer)

            walk(trace, {(layer, HEADS): cotangent.flatten(-2)}, take)
            heads[:, layer, list(batch)] = rows[:, sources].T
    direct = torch.zeros(1, len(leaves), dtype=heads.dtype)
    for grads in left.values():
        add_edges(trace, leaves, direct, grads)
    return HeadLoadings(heads, direct[0, sources])


def _store(left: dict[int, BlockGradients], grads: BlockGradients) -> None:
    """Store a copy: autograd returns one tensor for several states of a residual stream."""
    states = {name: state.clone() for name, state in grads.states.items()}
    left[grads.layer] = BlockGradients(grads.layer, grads.hidden.clone(), states)


def _subtract(left: BlockGradients, taken: BlockGradients, layer: int) -> None:
    """Subtract the sum over rows of ``taken`` from ``left``, in place, for paths below heads."""
    left.hidden.sub_(taken.hidden.sum(0))
    for name, state in taken.states.items():
        if name != HEADS or taken.layer < layer:
            left.states[name].sub_(state.sum(0))
