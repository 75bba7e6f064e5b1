"""Gradients with respect to the states of a trace, one linearized block at a time.

Each block runs again from its saved input, for R gradients at once, and its autograd graph is freed
before the next block below runs. Blocks above the highest cotangent do not run.

Shapes: R rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.graphs.linear.rules import carry, linearized
from fastadapt.graphs.linear.trace import Trace
from fastadapt.graphs.linear.units import HEADS, MLP_IN, MLP_OUT, attention_of, input_of
from fastadapt.models.replacement import Mode

#: Layer and name of a state; the state after the final norm has the layer L.
Site = tuple[int, str]
FINAL = "final"


class BlockGradients(NamedTuple):
    """Gradients of R quantities with respect to the states of a block.

    Attributes:
        layer: the block.
        hidden: ``[R, T, D]``: its input.
        states: ``[R, T, *]`` by name: the MLP's output, the heads' outputs, and the outputs of the
            linear layers that the trace names.
    """

    layer: int
    hidden: Tensor
    states: dict[str, Tensor]


Visit = Callable[[BlockGradients], None]


def walk(
    trace: Trace,
    cotangents: Mapping[Site, Tensor],
    visit: Visit,
    *,
    through_heads: bool = True,
) -> None:
    """Visit the gradients of ``Σ states · cotangents`` of each row, from the last block to block 0.

    Args:
        trace: the trace.
        cotangents: ``[R, T, *]`` by the state that they belong to: inputs of MLPs or of linear
            layers, heads' outputs, or the final state.
        visit: called with the gradients of each block.
        through_heads: pass gradients through attention; without, they end at the heads' outputs.
    """
    n_layers = trace.n_layers
    above = None
    if (n_layers, FINAL) in cotangents:
        above = _final(trace, cotangents[n_layers, FINAL])
    top = min(max(layer for layer, _ in cotangents), n_layers - 1)
    for layer in reversed(range(top + 1)):
        given = {name: each for (i, name), each in cotangents.items() if i == layer}
        grads = _block(trace, layer, given, above, through_heads)
        trace.model.reshard_layer(layer)
        above = grads.hidden
        visit(grads)


def _final(trace: Trace, cotangent: Tensor) -> Tensor:
    with torch.enable_grad(), linearized(trace.model, trace.features):
        hidden = _rows(trace.hidden[-1], len(cotangent))
        final = trace.model.final_norm(hidden, trace.mode)
    return torch.autograd.grad(final, hidden, cotangent)[0]


def _rows(state: Tensor, rows: int) -> Tensor:
    """Return a saved state once per row, without a copy, as a variable."""
    return state.expand(rows, -1, -1).requires_grad_()


def _block(
    trace: Trace,
    layer: int,
    cotangents: Mapping[str, Tensor],
    above: Tensor | None,
    through_heads: bool,
) -> BlockGradients:
    """Return the gradients of a block's states, given those of its output and of inner states."""
    rows = len(above if above is not None else next(iter(cotangents.values())))
    seen: dict[str, Tensor] = {}
    hidden = _rows(trace.hidden[layer], rows)
    out = run_block(trace, layer, hidden, seen, through_heads=through_heads)
    outputs, given = [seen[name] for name in cotangents], list(cotangents.values())
    if above is not None:
        outputs.append(out)
        given.append(above)
    names = [MLP_OUT, HEADS, *(linear.name for linear in trace.linears[layer])]
    inputs = [hidden, *(seen[name] for name in names)]
    through = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    filled = [
        torch.zeros_like(state) if grad is None else grad
        for state, grad in zip(inputs, through, strict=True)
    ]
    return BlockGradients(layer, filled[0], dict(zip(names, filled[1:], strict=True)))


def run_block(
    trace: Trace,
    layer: int,
    hidden: Tensor,
    seen: dict[str, Tensor],
    *,
    through_heads: bool = True,
) -> Tensor:
    """Run a linearized block on ``[R, T, D]`` and return its output.

    Args:
        trace: the trace; ``hidden`` is its state, once per row.
        layer: the block.
        hidden: variable.
        seen: gets the states inside the block by name.
        through_heads: as of :func:`walk`.
    """
    model, mlp = trace.model, trace.model.mlps[layer]
    watched = [
        (linear.module, partial(_watch, seen, linear.name)) for linear in trace.linears[layer]
    ]
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(linearized(model, trace.features, layer=layer, watched=watched))
        output: Any = attention_of(model.blocks[layer]).o_proj
        for hook in (
            output.register_forward_pre_hook(partial(_watch_heads, seen, through_heads)),
            mlp.register_forward_hook(partial(_hold_mlp, trace, layer, seen)),
        ):
            stack.callback(hook.remove)
        return model.block(layer, hidden, trace.arguments[layer], _MODES[trace.features])[0]


#: The mode whose gradient is that of the rules; the output of the MLP is the trace's.
_MODES: dict[str, Mode] = {
    "leaves": "hybrid",
    "linear": "replacement",
    "ranks": "target",
    "linear ranks": "target",
}


def _watch(seen: dict[str, Tensor], name: str, _: Any, args: Any, out: Tensor) -> None:
    seen[input_of(name)], seen[name] = args[0], out


def _watch_heads(seen: dict[str, Tensor], passes: bool, _: Any, args: Any) -> tuple[Tensor]:
    heads: Tensor = args[0] if passes else args[0].detach().requires_grad_()
    seen[HEADS] = heads
    return (heads,)


def _hold_mlp(
    trace: Trace, layer: int, seen: dict[str, Tensor], _: Any, args: Any, out: Tensor
) -> Tensor:
    """Replace an MLP's output by its value in the trace, as a state that takes gradients."""
    x, value = args[0], trace.mlp_out[layer].expand_as(out)
    linear = out if trace.overlay is None else _overlaid(trace, layer, x)
    held = value.detach().requires_grad_() if linear is None else carry(value, linear)
    seen[MLP_IN], seen[MLP_OUT] = x, held
    return held


def _overlaid(trace: Trace, layer: int, x: Tensor) -> Tensor | None:
    """Return what passes gradients where transcoders stand for the base's MLP; None: nothing."""
    assert trace.overlay is not None
    if trace.features == "leaves":
        return trace.overlay.linear(layer, x)
    (codes,) = (u.codes for u in trace.units if (u.kind, u.layer) == ("base feature", layer))
    through = trace.overlay.linear(layer, x, codes)
    assert through is not None
    out: Tensor = through + trace.model.mlps[layer].adapter(x)[0]
    return out
