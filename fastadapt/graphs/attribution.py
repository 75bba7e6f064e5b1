"""Edges of an attribution graph: gradients of a target value, times the values of its leaves.

A *leaf* is a node without incoming edges in one backward pass: a token's embedding, an active
feature, a decoder bias, the biases of attention and of the base's MLP, and (stream ``target``) the
error of an adapter. The edges into a target, plus its constant, sum to its value.

Rows of edges are computed in full and stored in part: N leaves, the ``top_k`` largest of each row,
and the exact sums of what is left out. Nothing of size N × N exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.graphs.trace import Trace

#: Kinds of leaves, in the order of their indices.
Kind = Literal["feature", "token", "decoder bias", "attention bias", "mlp bias", "error"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_CHUNK = 1 << 24  # elements of gathered decoder rows


@dataclass(frozen=True)
class Target:
    """A linear quantity of one position that a graph explains: ``direction · state + constant``.

    Attributes:
        name: what it is, for tables.
        position: index of the token.
        direction: ``[D]``.
        layer: the state is the MLP's input of this layer; None: the state after the final norm.
        constant: the part of the value that no leaf gives, such as ``b_enc``.
        feature: number of the feature of ``layer`` whose pre-activation this is, or None.
    """

    name: str
    position: int
    direction: Tensor
    layer: int | None = None
    constant: float = 0.0
    feature: int | None = None

    def state(self, trace: Trace) -> Tensor:
        """Return the states ``[R, T, D]`` that the target reads."""
        return trace.final if self.layer is None else trace.mlp_in[self.layer]

    def measure(self, state: Tensor) -> Tensor:
        """Return the value ``[...]`` of states ``[..., D]``, also of a changed model."""
        return state @ self.direction.to(state) + self.constant

    def value(self, trace: Trace) -> float:
        """Return the target's value on the trace's text."""
        return float(self.measure(self.state(trace)[0, self.position].detach()))


class Leaves:
    """The leaves of a trace: int64 and real tensors ``[N]``, features first.

    Attributes:
        kind: index into :data:`KINDS`.
        layer: layer; -1 for tokens.
        position: index of the token.
        feature: number of the feature; -1 for other kinds.
        activation: activation of the feature; 0 for other kinds.
    """

    def __init__(self, trace: Trace) -> None:
        n_layers, n_tokens = trace.n_layers, trace.n_tokens
        per_layer = torch.tensor([len(codes.tokens) for codes in trace.codes])
        self.n_features = int(per_layer.sum())
        self.first = torch.cat([per_layer.new_zeros(1), per_layer.cumsum(0)]).tolist()
        positions = torch.arange(n_tokens)
        layers = torch.arange(n_layers).repeat_interleave(n_tokens)
        kinds = self._kinds(trace)
        blocks = len(kinds) - 2  # kinds with a leaf per layer and position
        self.layer = torch.cat(
            [
                torch.arange(n_layers).repeat_interleave(per_layer),
                torch.full((n_tokens,), -1),
                layers.repeat(blocks),
            ]
        )
        active = torch.cat([codes.tokens.cpu() for codes in trace.codes])
        self.position = torch.cat([active, positions, positions.repeat(blocks * n_layers)])
        sizes = [self.n_features, n_tokens, *[n_layers * n_tokens] * blocks]
        self.kind = torch.tensor([KINDS.index(kind) for kind in kinds]).repeat_interleave(
            torch.tensor(sizes)
        )
        none = len(self.kind) - self.n_features
        numbers = torch.cat([codes.features.cpu() for codes in trace.codes])
        self.feature = torch.cat([numbers, torch.full((none,), -1)])
        values = torch.cat([codes.values.cpu() for codes in trace.codes])
        self.activation = torch.cat([values, values.new_zeros(none)])

    @staticmethod
    def _kinds(trace: Trace) -> list[Kind]:
        parts = {bias.part for bias in trace.biases}
        absent = {f"{part} bias" for part in ("attention", "mlp") if part not in parts}
        absent |= {"error"} if trace.errors is None else set()
        return [kind for kind in KINDS if kind not in absent]

    def __len__(self) -> int:
        return len(self.kind)

    def mask(self, kind: Kind) -> Tensor:
        """Return a mask bool ``[N]`` of the leaves of one kind."""
        return self.kind == KINDS.index(kind)

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


class Gradients(NamedTuple):
    """Gradients of R quantities, a row each, with respect to the activations of a trace.

    Shapes are those of the activations in :class:`.trace.Trace`.
    """

    embedding: Tensor
    mlp_out: list[Tensor]
    biases: list[Tensor]
    head_in: list[Tensor]


def gradients(trace: Trace, outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Gradients:
    """Return the gradients of ``Σ outputs · cotangents`` of each row.

    Args:
        trace: the trace.
        outputs: activations of the trace, ``[R, T, *]``.
        cotangents: one per output, of its shape.
    """
    biases = [bias.output for bias in trace.biases if bias.output.requires_grad]
    inputs = [trace.embedding, *trace.mlp_out, *trace.head_in, *biases]
    through = torch.autograd.grad(
        list(outputs), inputs, list(cotangents), retain_graph=True, allow_unused=True
    )
    filled = [
        torch.zeros_like(given) if grad is None else grad
        for given, grad in zip(inputs, through, strict=True)
    ]
    n = trace.n_layers
    of_biases = iter(filled[1 + 2 * n :])
    return Gradients(
        filled[0],
        filled[1 : 1 + n],
        [
            next(of_biases) if bias.output.requires_grad else torch.zeros_like(bias.output)
            for bias in trace.biases
        ],
        filled[1 + n : 1 + 2 * n],
    )


@torch.no_grad()
def leaf_rows(trace: Trace, leaves: Leaves, grads: Gradients) -> Tensor:
    """Return each row's edges from all leaves, real ``[R, N]`` on the CPU."""
    parts = [_feature_edges(trace, layer, grads.mlp_out[layer]) for layer in range(trace.n_layers)]
    parts.append((grads.embedding * trace.embedding).sum(-1))
    for layer, grad in enumerate(grads.mlp_out):
        parts.append(grad @ adapter_of(trace, layer).decoder_bias().to(grad))
    for part in ("attention", "mlp"):
        if bool(leaves.mask(f"{part} bias").any()):  # type: ignore[arg-type]
            edges = torch.zeros(trace.n_layers, *grads.embedding.shape[:2]).to(grads.embedding)
            for bias, grad in zip(trace.biases, grads.biases, strict=True):
                if bias.part == part:
                    edges[bias.layer] += grad @ bias.bias.to(grad)
            parts += list(edges)
    for layer, error in enumerate(trace.errors or ()):
        parts.append((grads.mlp_out[layer] * error).sum(-1))
    return torch.cat(parts, dim=1).cpu()


def _feature_edges(trace: Trace, layer: int, grad: Tensor) -> Tensor:
    codes, W_dec = trace.codes[layer], adapter_of(trace, layer).W_dec
    edges = grad.new_empty(len(grad), len(codes.tokens))
    step = max(1, _CHUNK // (len(grad) * grad.shape[-1]))
    for i in range(0, len(codes.tokens), step):
        part = slice(i, i + step)
        rows = W_dec[codes.features[part]].to(grad) * codes.values[part, None]
        edges[:, part] = (grad[:, codes.tokens[part]] * rows).sum(-1)
    return edges


def adapter_of(trace: Trace, layer: int) -> TranscoderAdapter:
    """Return the adapter of a layer."""
    adapter = trace.model.mlps[layer].adapter
    assert isinstance(adapter, TranscoderAdapter)
    return adapter


def target_gradients(trace: Trace, targets: Sequence[Target]) -> Gradients:
    """Return the gradients of up to R targets, a row each; other rows are 0."""
    if not 0 < len(targets) <= trace.rows:
        raise ValueError(f"expected 1 to {trace.rows} targets, got {len(targets)}")
    places = sorted(
        {target.layer for target in targets}, key=lambda place: -1 if place is None else place
    )
    outputs, cotangents = [], []
    for place in places:
        state = trace.final if place is None else trace.mlp_in[place]
        cotangent = torch.zeros_like(state)
        for row, target in enumerate(targets):
            if target.layer == place:
                cotangent[row, target.position] = target.direction.to(cotangent)
        outputs.append(state)
        cotangents.append(cotangent)
    return gradients(trace, outputs, cotangents)


def edges(trace: Trace, leaves: Leaves, targets: Sequence[Target]) -> Tensor:
    """Return the edges from every leaf into each target, real ``[len(targets), N]`` on the CPU.

    For each target, ``edges.sum(1) + constant`` equals its value.
    """
    rows = []
    for i in range(0, len(targets), trace.rows):
        batch = targets[i : i + trace.rows]
        rows.append(leaf_rows(trace, leaves, target_gradients(trace, batch))[: len(batch)])
    return torch.cat(rows)


def feature_target(trace: Trace, leaves: Leaves, index: int) -> Target:
    """Return the pre-activation of an active feature as a target, read at the MLP's input."""
    if not 0 <= index < leaves.n_features:
        raise ValueError(f"expected the index of a feature below {leaves.n_features}, got {index}")
    layer, feature = int(leaves.layer[index]), int(leaves.feature[index])
    adapter = adapter_of(trace, layer)
    return Target(
        f"feature {layer}/{feature}",
        int(leaves.position[index]),
        adapter.W_enc[feature].detach(),
        layer,
        float(adapter.b_enc[feature].detach()),
        feature,
    )


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
    # What remains after all paths through a later head were taken away, in row 0.
    left = _copied(target_gradients(trace, [target]))
    heads = torch.zeros(len(sources), trace.n_layers, n_heads, dtype=left.embedding.dtype)
    for layer in reversed(range(trace.n_layers)):
        into = left.head_in[layer][0].unflatten(-1, (n_heads, -1))
        for first in range(0, n_heads, trace.rows):
            batch = range(first, min(first + trace.rows, n_heads))
            cotangent = torch.zeros_like(trace.head_in[layer]).unflatten(-1, (n_heads, -1))
            for row, head in enumerate(batch):
                cotangent[row, :, head] = into[:, head]
            taken = gradients(trace, [trace.head_in[layer]], [cotangent.flatten(-2)])
            rows = leaf_rows(trace, leaves, taken)[: len(batch), sources]
            heads[:, layer, list(batch)] = rows.T
            _subtract(left, taken, layer)
    return HeadLoadings(heads, leaf_rows(trace, leaves, left)[0, sources])


def _copied(grads: Gradients) -> Gradients:
    """Return a copy: autograd returns one tensor for several activations of a residual stream."""
    embedding, *lists = grads
    return Gradients(embedding.clone(), *([grad.clone() for grad in part] for part in lists))


def _subtract(left: Gradients, taken: Gradients, layer: int) -> None:
    """Subtract the sum over rows of ``taken`` from row 0 of ``left``, in place, below ``layer``."""
    left.embedding[0] -= taken.embedding.sum(0)
    for mine, theirs in (
        *zip(left.mlp_out, taken.mlp_out, strict=True),
        *zip(left.biases, taken.biases, strict=True),
        *zip(left.head_in[:layer], taken.head_in[:layer], strict=True),
    ):
        mine[0] -= theirs.sum(0)
