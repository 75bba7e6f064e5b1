"""Split edges by the last attention head on their paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.graphs.attribution import Leaves, Target, add_edges, cotangents_of
from fastadapt.graphs.linear.backward import BlockGradients, walk
from fastadapt.graphs.linear.trace import Trace
from fastadapt.graphs.linear.units import HEADS


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
    held patterns the split is exact. It takes one backward pass without attention, which gives
    the gradients behind the last heads, and one per layer and R heads.

    Args:
        trace: a trace; :attr:`.trace.Trace.rows` heads share a backward pass.
        leaves: its leaves.
        target: the target.
        sources: indices of leaves, n of them.
    """
    sources = torch.as_tensor(sources, dtype=torch.int64)
    n_heads = int(trace.model.model.config.num_attention_heads)
    behind: dict[int, Tensor] = {}
    direct = torch.zeros(1, len(leaves), dtype=trace.embedding.dtype)

    def visit(grads: BlockGradients) -> None:
        behind[grads.layer] = grads.states[HEADS][0, target.position].clone()
        add_edges(trace, leaves, direct, grads)

    walk(trace, cotangents_of(trace, [target]), visit, through_heads=False)
    heads = torch.zeros(len(sources), trace.n_layers, n_heads, dtype=direct.dtype)
    for layer, into in behind.items():
        for first in range(0, n_heads, trace.rows):
            batch = list(range(first, min(first + trace.rows, n_heads)))
            cotangent = into.new_zeros(len(batch), trace.n_tokens, n_heads, len(into) // n_heads)
            for row, head in enumerate(batch):
                cotangent[row, target.position, head] = into.unflatten(0, (n_heads, -1))[head]
            rows = torch.zeros(len(batch), len(leaves), dtype=direct.dtype)
            walk(
                trace,
                {(layer, HEADS): cotangent.flatten(-2)},
                partial(add_edges, trace, leaves, rows),
            )
            heads[:, layer, batch] = rows[:, sources].T
    return HeadLoadings(heads, direct[0, sources])
