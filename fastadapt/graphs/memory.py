"""Memory of a graph, measured on fake tensors: no weight is read, no device is used.

Two blocks of the true shapes run as :mod:`.linear.trace` and :mod:`.linear.backward` run them, and
:class:`~fastadapt.training.planning.live_bytes.LiveBytes` counts the tensors alive. Only one block
runs at a time, so a graph of any depth needs the saved states of all blocks and the worst moment of
one. The number of active features depends on the text; it is assumed.

T tokens, D width, L layers, N leaves, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from fastadapt.adapter.module import AdapterConfig
from fastadapt.graphs.attribution import CHUNK
from fastadapt.graphs.evidence import EvidenceConfig
from fastadapt.graphs.graph import GraphConfig
from fastadapt.graphs.linear.backward import FINAL, run_block, walk
from fastadapt.graphs.linear.trace import Stream, Trace, mode_of, sources
from fastadapt.graphs.linear.units import HEADS, MLP_OUT
from fastadapt.graphs.targets import POSITIONS
from fastadapt.kernels.transcoder import CodeLayout
from fastadapt.models.pair import DTYPES, PairConfig
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig
from fastadapt.training.planning.flops import Setup, fake_pair
from fastadapt.training.planning.live_bytes import LiveBytes

_INDEX = 8  #: bytes of an index
# Tensors per leaf: kind, layer, position, feature, depth, and those from which they are joined.
_PER_LEAF = 10
_BLOCKS = 2  # of the measured model; more where its blocks differ


@dataclass(frozen=True)
class GraphSetup:
    """What determines the memory of a graph.

    Attributes:
        target: transformers' configuration of the target; the base's MLPs have the same sizes.
        pair: settings of the pair; ``dtype`` is the graph's, float32 or float64.
        adapter: settings of the adapters.
        tokens: length of the text, T.
        l0: active features per token and layer.
        stream: whose states are explained.
        config: size of the graph.
        evidence: ablations.
        target_mlps: whether the target's own MLPs are loaded.
    """

    target: Any
    pair: PairConfig
    adapter: AdapterConfig
    tokens: int
    l0: float
    stream: Stream = "replacement"
    config: GraphConfig = GraphConfig()  # noqa: RUF009
    evidence: EvidenceConfig = EvidenceConfig()  # noqa: RUF009
    target_mlps: bool = True


@dataclass(frozen=True)
class GraphMemory:
    """Bytes of a graph.

    Attributes:
        parts: on the device, by part, each at its own largest.
        phases: alive on the device at the worst moment of each phase.
        host: in host memory, by part.
        all_blocks: activations of all blocks for R rows, which would be alive if blocks did not run
            again from their inputs.
        target_mlps: weights of the target's MLPs that are not the base's, of ``parts``.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    host: dict[str, int]
    all_blocks: int
    target_mlps: int

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device at the worst moment."""
        return max(self.phases.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(self.host.values())

    @property
    def without_recompute(self) -> int:
        """The peak of the edges if the activations of all blocks were alive."""
        edges = self.phases["edges"] - self.parts["one block, backward"]
        return edges + self.all_blocks


@dataclass(frozen=True)
class _Measured:
    """Bytes that were counted on fake tensors, beside the weights outside the blocks.

    Attributes:
        whole: weights outside the blocks.
        block: weights of a block: the target's, the base's MLP and the adapter.
        target_mlp: the part of them that only the target's MLP has.
        forward: worst moment of one block in the forward pass, one copy of the text.
        ablated: the same for the copies of an ablation.
        backward: worst moment of one block in a backward pass of R rows.
        activations: what one block's forward pass of R rows leaves for the backward pass.
        gradients: gradients of the states of a block, one row.
        arguments: arguments of the blocks, such as rotary embeddings, which all blocks share.
    """

    whole: int
    block: int
    target_mlp: int
    forward: int
    ablated: int
    backward: int
    activations: int
    gradients: int
    arguments: int


def graph_memory(setup: GraphSetup) -> GraphMemory:
    """Measure the memory of a graph; takes seconds.

    Example:
        >>> from transformers import Qwen2Config
        >>> tiny = Qwen2Config(
        ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        ...     num_attention_heads=4, num_key_value_heads=2,
        ... )
        >>> pair = PairConfig("target", "base", dtype="float32")
        >>> half, whole = (
        ...     graph_memory(GraphSetup(tiny, pair, AdapterConfig(n_features=64), n, 3.0))
        ...     for n in (500, 1000)
        ... )
        >>> round(half.parts["states"] / whole.parts["states"], 3)
        0.5
    """
    n_layers, width = setup.target.num_hidden_layers, setup.target.hidden_size
    T, item = setup.tokens, DTYPES[setup.pair.dtype].itemsize
    one = _measure(setup)
    codes = round(setup.l0 * T) * (2 * _INDEX + item)
    per_state = T * width * item
    has_errors = setup.stream == "target"
    states = (2 + n_layers * (3 + has_errors)) * per_state + one.arguments
    weights = one.whole + n_layers * one.block
    always = weights + states + n_layers * codes
    rows, copies = setup.config.rows, 1 + setup.evidence.copies
    elements = min(CHUNK, rows * round(setup.l0 * T) * width)  # of gathered decoder rows
    gathered = round((2 + 2 / rows) * elements * item)
    vocabulary = setup.target.vocab_size
    logits = 5 * min(T, POSITIONS) * vocabulary * item
    changed = copies * (3 * per_state + 3 * codes) + codes
    phases = {
        "trace": always + one.forward,
        "question": always + max(logits, one.forward),
        "edges": always + max(one.backward, gathered + rows * one.gradients),
    }
    if setup.evidence.ablations:
        phases["evidence"] = always + one.ablated + changed
    parts = {
        "weights": weights,
        "states": states,
        "codes": n_layers * codes,
        "one block, backward": one.backward,
        "one block, ablated copies": one.ablated + changed if setup.evidence.ablations else 0,
        "logits of a chunk": logits,
    }
    leaves = round(setup.l0 * T) * n_layers + T * (1 + n_layers * (3 + has_errors))
    stored = (1 + setup.config.nodes) * 2 * setup.config.top
    return GraphMemory(
        parts={name: size for name, size in parts.items() if size},
        phases=phases,
        host={
            "leaves": leaves * (_PER_LEAF * _INDEX + item),
            "rows of edges": rows * leaves * item + 3 * leaves * _INDEX,
            "stored edges": stored * 2 * _INDEX,
        },
        all_blocks=n_layers * one.activations,
        target_mlps=n_layers * one.target_mlp,
    )


def _measure(setup: GraphSetup) -> _Measured:
    """Run a forward, an ablated forward and a backward pass of blocks on fake tensors."""
    differing = len(set(getattr(setup.target, "layer_types", None) or [""])) > 1
    n = min(setup.target.num_hidden_layers, 6 if differing else _BLOCKS)
    pair = replace(setup.pair, fused_blocks=False)
    shapes = Setup(setup.target, pair, setup.adapter, ObjectiveConfig(), 1, setup.tokens)
    mode, rows = mode_of(setup.stream), setup.config.rows
    with fake_pair(shapes, n) as fake:
        model = ReplacementModel.create(fake, setup.adapter).requires_grad_(False).eval()
        for mlp in model.mlps if not setup.target_mlps else ():
            mlp.target = None
        live = LiveBytes()
        with live:
            for parameter in model.parameters():
                live.see(parameter)
            weights = live.alive
            trace = fake_trace(model, setup)
            layout = CodeLayout(False, round(setup.l0 * setup.tokens))
            blocks = [
                partial(model.block, i, arguments=trace.arguments[i], mode=mode, plan=layout)
                for i in range(n)
            ]
            copies = 1 + setup.evidence.copies
            with torch.no_grad():
                forward = max(_peak(live, block, trace.hidden[0][None]) for block in blocks)
                many = trace.hidden[0].expand(copies, -1, -1)
                plan = CodeLayout(False, copies * round(setup.l0 * setup.tokens))
                ablated = max(_peak(live, partial(block, plan=plan), many) for block in blocks)
            cotangent = trace.hidden[0].new_zeros(rows, *trace.hidden[0].shape)
            backward = _peak(live, walk, trace, {(n, FINAL): cotangent}, lambda grads: None)
            hidden = trace.hidden[0].expand(rows, -1, -1).requires_grad_()
            before = live.alive
            seen: dict[str, torch.Tensor] = {}
            out = run_block(trace, 0, hidden, seen)
            activations = live.alive - before
            names = (MLP_OUT, HEADS, *(linear.name for linear in trace.linears[0]))
            gradients = (hidden.nbytes + sum(seen[name].nbytes for name in names)) // rows
            del out
            tensors = {id(x): x for x in tree_iter(trace.arguments) if isinstance(x, torch.Tensor)}
            arguments = sum(tensor.nbytes for tensor in tensors.values())
        block = sum(p.nbytes for p in model.blocks[0].parameters())
        mlp = model.mlps[0]
        shared = {id(p) for p in mlp.base.parameters()}
        separate = [] if mlp.target is None else mlp.target.parameters()
    return _Measured(
        whole=weights - n * block,
        block=block,
        target_mlp=sum(p.nbytes for p in separate if id(p) not in shared),
        forward=forward,
        ablated=ablated,
        backward=backward + cotangent.nbytes,
        activations=activations,
        gradients=gradients,
        arguments=arguments,
    )


def fake_trace(model: ReplacementModel, setup: GraphSetup) -> Trace:
    """Return a trace without active features, whose states have no values."""
    n = model.n_layers
    ids = torch.zeros(setup.tokens, dtype=torch.int64)
    inputs = model.block_inputs(ids[None], None)
    empty = partial(torch.empty_like, inputs.hidden[0])
    features = "ranks" if setup.stream == "ranks" else "leaves"
    return Trace(
        model=model,
        ids=ids,
        stream=setup.stream,
        features=features,  # type: ignore[arg-type]
        rows=setup.config.rows,
        hidden=[empty() for _ in range(n + 1)],
        arguments=inputs.arguments,
        mlp_in=[empty() for _ in range(n)],
        mlp_out=[empty() for _ in range(n)],
        final=empty(),
        linears=[sources(model, layer, features) for layer in range(n)],  # type: ignore[arg-type]
        units=[],
        errors=[empty() for _ in range(n)] if setup.stream == "target" else None,
    )


def _peak(live: LiveBytes, call: Any, *args: Any) -> int:
    """Return the peak of the bytes alive in a call, beyond those alive before the call."""
    before = live.peak = live.alive
    call(*args)
    return live.peak - before
