"""Edges of an attribution graph: gradients of a target value, times the values of its leaves.

A *leaf* is a node without incoming edges in one backward pass: a token's embedding, an active unit
(:mod:`.linear.units`), a decoder bias, the biases of attention and of the MLP, and an error. The
edges into a target, plus its constant, sum to its value.

Rows of edges are computed in full and stored in part: N leaves, the ``top_k`` largest of each row,
and the exact sums of what is left out. Nothing of size N × N exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.graphs.linear.backward import FINAL, BlockGradients, Site, walk
from fastadapt.graphs.linear.trace import Trace
from fastadapt.graphs.linear.units import MLP_IN, MLP_OUT, MLP_STAGE, Units

#: Kinds of leaves. A leaf's kind is stored as the index in this order.
Kind = Literal[
    "feature",
    "token",
    "decoder bias",
    "attention bias",
    "mlp bias",
    "error",
    "base feature",
    "rank component",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: Kinds of units, into which edges are computed.
UNIT_KINDS: tuple[Kind, ...] = ("feature", "base feature", "rank component")
#: Kinds with a leaf per layer and position.
_BLOCKS: tuple[Kind, ...] = ("decoder bias", "attention bias", "mlp bias", "error")

#: Elements of gathered decoder rows in memory at once.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Target:
    """A linear quantity of one position that a graph explains: ``direction · state + constant``.

    Attributes:
        name: what it is, for tables.
        position: index of the token.
        direction: ``[D]``, or as wide as the state.
        layer: the state is inside this block; None: the state after the final norm.
        constant: the part of the value that no leaf gives, such as ``b_enc``.
        feature: number of the unit of ``layer`` whose pre-activation this is, or None.
        reads: name of the state in the block.
        known: the value on the trace's text, where the trace has no such state.
    """

    name: str
    position: int
    direction: Tensor
    layer: int | None = None
    constant: float = 0.0
    feature: int | None = None
    reads: str = MLP_IN
    known: float | None = None

    def measure(self, state: Tensor) -> Tensor:
        """Return ``direction · state + constant``, ``[...]``, of a model's states ``[..., D]``."""
        return state @ self.direction.to(state) + self.constant

    def value(self, trace: Trace) -> float:
        """Return the target's value on the trace's text."""
        if self.known is not None:
            return self.known
        state = trace.final if self.layer is None else trace.mlp_in[self.layer]
        return float(self.measure(state[self.position]))

    @property
    def depth(self) -> float:
        """The leaves that can reach the state have a smaller depth, see :class:`Leaves`."""
        return math.inf if self.layer is None else depth_of(self.layer, MLP_STAGE)

    def site(self, trace: Trace) -> Site:
        """Return layer and name of the state."""
        return (trace.n_layers, FINAL) if self.layer is None else (self.layer, self.reads)


_Number = TypeVar("_Number", int, Tensor)


def depth_of(layer: _Number, stage: _Number) -> _Number:
    """Return the order of units among all layers, by their stage within the block."""
    return layer * 8 + 1 + stage


class Leaves:
    """Source nodes of a text's edges: features, other units, tokens, biases, errors; N in all.

    The attributes are int64 and real tensors ``[N]``, in this order.

    Attributes:
        kind: index into :data:`KINDS`.
        layer: layer; -1 for tokens.
        position: index of the token.
        feature: number of the unit; -1 for other kinds.
        activation: value of the unit; 0 for other kinds.
        depth: a unit reads only what leaves of smaller depth write.
        n_features: number of active features of adapters.
        n_units: number of active units.
        n_ablated: number of units that an ablation may remove: features, or rank components.
        groups: the trace's units with their leaves.
    """

    def __init__(self, trace: Trace) -> None:
        n_layers, n_tokens = trace.n_layers, trace.n_tokens
        sizes = [len(units.codes.tokens) for units in trace.units]
        self.groups: list[tuple[Units, slice]] = []
        for units, size in zip(trace.units, sizes, strict=True):
            first = self.groups[-1][1].stop if self.groups else 0
            self.groups.append((units, slice(first, first + size)))
        self.n_units = sum(sizes)
        self.n_features = sum(len(u.codes.tokens) for u in trace.units if u.kind == "feature")
        self.n_ablated = self.n_units if trace.stream == "ranks" else self.n_features
        self._n_tokens, self._blocks = n_tokens, self._kinds(trace)
        blocks = len(self._blocks)
        positions = torch.arange(n_tokens)
        counts = torch.tensor([*sizes, n_tokens, *[n_layers * n_tokens] * blocks])

        def spread(of_units: list[int], others: list[int]) -> Tensor:
            return torch.tensor([*of_units, *others]).repeat_interleave(counts)

        kinds = [KINDS.index(units.kind) for units in trace.units]
        self.kind = spread(kinds, [KINDS.index(kind) for kind in ("token", *self._blocks)])
        none = len(self.kind) - self.n_units
        self.layer = spread([units.layer for units in trace.units], [-1] * (1 + blocks))
        if blocks:
            layers = torch.arange(n_layers).repeat_interleave(n_tokens).repeat(blocks)
            self.layer[self.n_units + n_tokens :] = layers
        stages = spread([units.stage for units in trace.units], [-1] * (1 + blocks))
        self.depth = depth_of(self.layer, stages)
        codes = [units.codes for units in trace.units]
        active = [each.tokens.cpu() for each in codes]
        self.position = torch.cat([*active, positions.repeat(1 + blocks * n_layers)])
        self.feature = torch.cat([*(c.features.cpu() for c in codes), torch.full((none,), -1)])
        self.activation = torch.cat(
            [*(c.values.cpu() for c in codes), torch.zeros(none, dtype=trace.embedding.dtype)]
        )

    @staticmethod
    def _kinds(trace: Trace) -> list[Kind]:
        parts = {
            linear.part
            for of_layer in trace.linears
            for linear in of_layer
            if linear.bias is not None
        }
        absent = {f"{part} bias" for part in ("attention", "mlp") if part not in parts}
        absent |= {"error"} if trace.errors is None else set()
        absent |= {"decoder bias"} if trace.features == "ranks" else set()
        if trace.overlay is not None:
            absent.discard("mlp bias")
        return [kind for kind in _BLOCKS if kind not in absent]

    def __len__(self) -> int:
        return len(self.kind)

    def mask(self, kind: Kind) -> Tensor:
        """Return a mask bool ``[N]`` of the leaves of one kind."""
        return self.kind == KINDS.index(kind)

    @property
    def tokens(self) -> slice:
        """The leaves of the tokens' embeddings."""
        return slice(self.n_units, self.n_units + self._n_tokens)

    def block(self, kind: Kind, layer: int) -> slice | None:
        """Return the leaves of ``kind`` in a layer, one per position; None without such leaves."""
        if kind not in self._blocks:
            return None
        n_layers = (len(self) - self.tokens.stop) // (len(self._blocks) * self._n_tokens)
        number = self._blocks.index(kind) * n_layers + layer
        first = self.tokens.stop + number * self._n_tokens
        return slice(first, first + self._n_tokens)

    @cached_property
    def _by_place(self) -> dict[tuple[int, int, int], int]:
        keys = zip(
            self.layer[: self.n_features].tolist(),
            self.position[: self.n_features].tolist(),
            self.feature[: self.n_features].tolist(),
            strict=True,
        )
        return {key: i for i, key in enumerate(keys)}

    def find(self, layer: int, position: int, feature: int) -> int:
        """Return the index of an active feature.

        Raises:
            UserError: the feature does not fire there.
        """
        index = self._by_place.get((layer, position, feature))
        if index is None:
            raise UserError(f"feature {layer}/{feature} does not fire at position {position}")
        return index

    def group(self, index: int) -> Units:
        """Return the units that a leaf belongs to.

        Raises:
            ValueError: the leaf is no unit.
        """
        for units, rows in self.groups:
            if rows.start <= index < rows.stop:
                return units
        raise ValueError(f"expected the index of a unit below {self.n_units}, got {index}")


@torch.no_grad()
def add_edges(trace: Trace, leaves: Leaves, into: Tensor, grads: BlockGradients) -> None:
    """Write into ``into`` the edges from the source nodes of one block; at block 0 also tokens.

    Args:
        trace: the trace.
        leaves: its leaves.
        into: real ``[R, N]`` on the CPU.
        grads: gradients of R quantities.
    """
    layer, states = grads.layer, grads.states
    for units, rows in leaves.groups:
        if units.layer == layer:
            into[:, rows] = _unit_edges(units, states[units.writes]).to(into)
    if layer == 0:
        into[:, leaves.tokens] = (grads.hidden * trace.embedding).sum(-1).to(into)

    def add(kind: Kind, edges: Tensor) -> None:
        rows = leaves.block(kind, layer)
        assert rows is not None
        into[:, rows] += edges.to(into)

    if leaves.block("decoder bias", layer):
        bias = adapter_of(trace, layer).decoder_bias()
        add("decoder bias", states[MLP_OUT] @ bias.to(states[MLP_OUT]))
    for linear in trace.linears[layer]:
        if linear.bias is not None and not (trace.overlay and linear.part == "mlp"):
            grad = states[linear.name]
            add(f"{linear.part} bias", grad @ linear.bias.to(grad))  # type: ignore[arg-type]
    if trace.overlay is not None:
        add("mlp bias", states[MLP_OUT] @ trace.overlay.layers[layer].b_dec)
    if trace.errors is not None:
        add("error", (states[MLP_OUT] * trace.errors[layer]).sum(-1))


def _unit_edges(units: Units, grad: Tensor) -> Tensor:
    tokens, numbers, values = units.codes
    edges = grad.new_empty(len(grad), len(tokens))
    step = max(1, CHUNK // (len(grad) * grad.shape[-1]))
    for i in range(0, len(tokens), step):
        part = slice(i, i + step)
        rows = units.decoder[numbers[part] - units.first].to(grad) * values[part, None]
        edges[:, part] = (grad[:, tokens[part]] * rows).sum(-1)
    return edges


def adapter_of(trace: Trace, layer: int) -> TranscoderAdapter:
    """Return the adapter of a layer."""
    adapter = trace.model.mlps[layer].adapter
    assert isinstance(adapter, TranscoderAdapter)
    return adapter


def cotangents_of(trace: Trace, targets: Sequence[Target]) -> dict[Site, Tensor]:
    """Return the cotangents of targets for :func:`.backward.walk`, a row each."""
    cotangents: dict[Site, Tensor] = {}
    for row, target in enumerate(targets):
        direction = target.direction.to(trace.embedding)
        shape = (len(targets), trace.n_tokens, len(direction))
        site = target.site(trace)
        if site not in cotangents:
            cotangents[site] = direction.new_zeros(shape)
        cotangents[site][row, target.position] = direction
    return cotangents


def edges(trace: Trace, leaves: Leaves, targets: Sequence[Target]) -> Tensor:
    """Return the edges from every leaf into each target, real ``[len(targets), N]`` on the CPU.

    For each target, ``edges.sum(1) + constant`` equals its value.
    """
    out = torch.zeros(len(targets), len(leaves), dtype=trace.embedding.dtype)
    for i in range(0, len(targets), trace.rows):
        batch = targets[i : i + trace.rows]
        rows = out[i : i + len(batch)]
        walk(trace, cotangents_of(trace, batch), partial(add_edges, trace, leaves, rows))
    return out


def unit_target(trace: Trace, leaves: Leaves, index: int) -> Target:
    """Return the pre-activation of an active unit as a target, at the state that the unit reads."""
    units = leaves.group(index)
    number = int(leaves.feature[index])
    row = number - units.first
    return Target(
        units.label(number),
        int(leaves.position[index]),
        units.encoder[row],
        units.layer,
        0.0 if units.bias is None else float(units.bias[row]),
        number,
        units.reads,
        None if units.reads == MLP_IN else float(leaves.activation[index]),
    )
