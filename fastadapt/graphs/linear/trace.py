"""Run one text through a model, and save the states from which its blocks can run again.

A trace has no autograd graph. :mod:`.backward` runs one block at a time again, linearized and for
R gradients at once, so memory is linear in the length of the text, and only one block's activations
are alive.

Shapes: R rows (gradients per backward pass), T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.graphs.linear.overlay import TranscoderSet
from fastadapt.graphs.linear.rules import Features, check_model
from fastadapt.graphs.linear.units import Linear, Units, feature_units, linears, rank_units
from fastadapt.models.replacement import Mode, ReplacementModel
from fastadapt.models.sources.low_rank import LowRankLinear

#: Whose states the graph explains: the replacement's, the target's with errors as nodes, or the
#: target's with the rank components of its LoRA as nodes.
Stream = Literal["replacement", "target", "ranks"]
STREAMS: tuple[Stream, ...] = get_args(Stream)


@dataclass(frozen=True)
class Trace:
    """States of a text, without gradients.

    Attributes:
        model: the replacement model.
        ids: int64 ``[T]``.
        stream: whose states these are.
        features: the rules of a backward pass, see :func:`.rules.linearized`.
        rows: R, the number of gradients that one backward pass computes.
        hidden: ``[T, D]``: the input of each block, and the output of the last one.
        arguments: keyword arguments of each block.
        mlp_in: per layer ``[T, D]``, the input of MLP and adapter, after the norm.
        mlp_out: per layer ``[T, D]``, the output of MLP and adapter, before any post-norm.
        final: ``[T, D]``, after the final norm.
        linears: per layer the frozen linear layers that add a bias or rank components.
        units: the active units, by kind, layer and stage.
        errors: per layer ``[T, D]``, what the nodes leave of the MLP's output; None: nothing.
        overlay: transcoders that stand for the base's MLPs, or None.
    """

    model: ReplacementModel
    ids: Tensor
    stream: Stream
    features: Features
    rows: int
    hidden: list[Tensor]
    arguments: list[dict[str, Any]]
    mlp_in: list[Tensor]
    mlp_out: list[Tensor]
    final: Tensor
    linears: list[list[Linear]]
    units: list[Units]
    errors: list[Tensor] | None
    overlay: TranscoderSet | None = None

    @property
    def n_tokens(self) -> int:
        """Length of the text, T."""
        return len(self.ids)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.mlp_in)

    @property
    def embedding(self) -> Tensor:
        """``[T, D]``, the input of the first block."""
        return self.hidden[0]

    @property
    def mode(self) -> Mode:
        """The mode of the model that has these states."""
        return mode_of(self.stream)


def mode_of(stream: Stream) -> Mode:
    """Return the mode of the model whose states a stream has."""
    return "replacement" if stream == "replacement" else "target"


def check_ids(model: ReplacementModel, ids: Tensor | Sequence[int]) -> Tensor:
    """Return token ids as int64 ``[T]`` on the model's device.

    Raises:
        UserError: no tokens, more tokens than the model can read, or an id beyond its vocabulary.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if ids.ndim != 1 or len(ids) == 0:
        raise UserError(f"prompt: expected one or more token ids [T], got shape {list(ids.shape)}")
    context = int(model.model.config.max_position_embeddings)
    if len(ids) > context:
        raise UserError(
            f"prompt: expected at most {context:,} tokens, the model's context, got {len(ids):,}; "
            "give a shorter text"
        )
    n_tokens = model.model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= n_tokens or int(ids.min()) < 0:
        got = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise UserError(f"prompt: expected token ids 0 to {n_tokens - 1}, got {got}")
    return ids


def check_stream(stream: str, overlay: bool = False) -> None:
    """Check that a stream exists, and that transcoders of the base may stand in it.

    Raises:
        UserError: it does not, or they may not.
    """
    if stream == "base" and overlay:
        raise UserError(
            "--base_set: expected --stream replacement or target, got base: the set stands for the "
            "base's MLPs inside the target. A graph of the base alone has no adapters; make it "
            "with circuit-tracer"
        )
    if stream not in STREAMS:
        raise UserError(f"--stream: expected one of {', '.join(STREAMS)}, got {stream!r}")
    if overlay and stream == "ranks":
        raise UserError(
            "--base_set: expected --stream replacement or target, got ranks, whose MLPs are the "
            "target's; leave out --base_set"
        )


def record(
    model: ReplacementModel,
    ids: Tensor | Sequence[int],
    *,
    stream: Stream = "replacement",
    rows: int = 1,
    features: Features = "leaves",
    overlay: TranscoderSet | None = None,
) -> Trace:
    """Run a text through a model.

    Args:
        model: a replacement model with transcoders, in ``eval()``.
        ids: token ids ``[T]`` of one text without padding.
        stream: ``replacement``: the states of the replacement. ``target``: those of the target, for
            text that the target wrote; what the adapters miss becomes an error node. ``ranks``:
            those of the target, whose LoRA gives the nodes.
        rows: number of gradients per backward pass.
        features: see :func:`.rules.linearized`; with ``ranks`` the components are leaves.
        overlay: transcoders that stand for the base's MLPs; what they miss becomes part of the
            errors.

    Raises:
        UserError: impossible ids or an unknown stream; see also :func:`.rules.linearized`.
    """
    check_stream(stream, overlay is not None)
    if stream == "ranks":
        features = "ranks"
    check_model(model, features)
    ids = check_ids(model, ids)
    if overlay is not None:
        overlay.check_fits(model)
    trace = Trace(
        model=model,
        ids=ids,
        stream=stream,
        features=features,
        rows=rows,
        hidden=[],
        arguments=[],
        mlp_in=[],
        mlp_out=[],
        final=torch.empty(0),
        linears=[sources(model, layer, features) for layer in range(model.n_layers)],
        units=[],
        errors=None if stream == "ranks" or (stream == "replacement" and not overlay) else [],
        overlay=overlay,
    )
    with torch.no_grad(), model.fused.off():
        inputs = model.block_inputs(ids[None], None)
        trace.hidden.append(inputs.hidden[0])
        trace.arguments.extend(inputs.arguments)
        for layer in range(model.n_layers):
            _record_block(trace, layer)
            model.reshard_layer(layer)
        final = model.final_norm(trace.hidden[-1][None], trace.mode)[0]
    trace.units.sort(key=lambda units: units.kind == "base feature")  # stable: layers stay in order
    return replace(trace, final=final)


def sources(model: ReplacementModel, layer: int, features: Features) -> list[Linear]:
    """Return a block's linear layers that have a bias or, if ranks are the features, low rank.

    Query and key projections are left out: the attention patterns are held constant.
    """
    has_ranks = features == "ranks"
    return [
        linear
        for linear in linears(model, layer, "target" if has_ranks else "base")
        if not linear.is_pattern
        and (linear.bias is not None or (has_ranks and is_low_rank(linear)))
    ]


def is_low_rank(linear: Linear) -> bool:
    """Return whether a linear layer has rank components."""
    return isinstance(linear.module, LowRankLinear)


def _record_block(trace: Trace, layer: int) -> None:
    """Run a block; append its states and units to the trace."""
    model, low_rank = trace.model, []
    if trace.features == "ranks":
        low_rank = [linear for linear in trace.linears[layer] if is_low_rank(linear)]
    mlp = model.mlps[layer]
    with _recording([mlp, *(linear.module for linear in low_rank)]) as calls:
        out, aux = model.block(
            layer, trace.hidden[layer][None], trace.arguments[layer], trace.mode, return_codes=True
        )
    trace.hidden.append(out[0])
    given, mlp_out = calls[mlp]
    trace.mlp_in.append(given)
    trace.mlp_out.append(mlp_out)
    if trace.features == "ranks":
        inputs = [(linear, calls[linear.module][0]) for linear in low_rank]
        trace.units.extend(rank_units(layer, inputs))
        return
    assert isinstance(mlp.adapter, TranscoderAdapter)
    if trace.errors is None:
        assert aux is not None
        assert aux.codes is not None
        trace.units.append(feature_units(mlp.adapter, layer, aux.codes))
        return
    change, aux = mlp.adapter(given[None], return_codes=True)
    assert aux.codes is not None
    trace.units.append(feature_units(mlp.adapter, layer, aux.codes))
    if trace.overlay is None:
        base = mlp.base(given[None])[0]
    else:
        units, base = trace.overlay.run(layer, given)
        trace.units.append(units)
    trace.errors.append(mlp_out - base - change[0])


@contextmanager
def _recording(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Yield a dictionary that gets input and output ``[T, *]`` of the modules' calls."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record_call(module: nn.Module, args: Any, out: Tensor) -> None:
        calls[module] = (args[0][0], out[0])

    hooks = [module.register_forward_hook(record_call) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
