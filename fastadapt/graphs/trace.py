"""Run one text through the linearized model, and keep what edges are read from.

A trace holds the activations with their autograd graph, so its memory is linear in the length of
the text and in :attr:`Trace.rows`, the number of gradients that one backward pass computes.

Shapes: R rows (copies of the text), T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastadapt.errors import UserError
from fastadapt.graphs.rules import Features, check_model, linearized
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import ReplacementModel

#: Whose states the graph explains: the replacement's, or the target's with errors as nodes.
Stream = Literal["replacement", "target"]
STREAMS: tuple[Stream, ...] = get_args(Stream)


@dataclass(frozen=True)
class Bias:
    """A bias of a frozen linear layer, and the layer's output ``[R, T, out]``.

    ``part`` is ``attention`` or ``mlp``.
    """

    layer: int
    part: str
    output: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Trace:
    """Activations of a text in the linearized model, on which gradients can be taken.

    Attributes:
        model: the replacement model.
        ids: int64 ``[T]``.
        stream: whose states these are.
        rows: R, the number of copies of the text in the batch.
        embedding: ``[R, T, D]``, the input of the first block; requires grad.
        mlp_in: per layer ``[R, T, D]``, the input of MLP and adapter, after the norm.
        mlp_out: per layer ``[R, T, D]``, the output of MLP and adapter, before any post-norm.
        head_in: per layer ``[R, T, H·d]``, the outputs of the attention heads.
        final: ``[R, T, D]``, after the final norm.
        biases: biases of attention and of the base's MLPs.
        codes: per layer the active features; ``tokens`` are positions.
        errors: per layer ``[T, D]``, ``MLP_target(x) − MLP_base(x) − A(x)``; None for the stream
            ``replacement``.
    """

    model: ReplacementModel
    ids: Tensor
    stream: Stream
    rows: int
    embedding: Tensor
    mlp_in: list[Tensor]
    mlp_out: list[Tensor]
    head_in: list[Tensor]
    final: Tensor
    biases: list[Bias]
    codes: list[SparseCodes]
    errors: list[Tensor] | None

    @property
    def n_tokens(self) -> int:
        """Length of the text, T."""
        return len(self.ids)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.mlp_in)


def check_ids(model: ReplacementModel, ids: Tensor | Sequence[int]) -> Tensor:
    """Return token ids as int64 ``[T]`` on the model's device.

    Raises:
        UserError: no tokens, more tokens than the model can read, or an id beyond its vocabulary.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if ids.ndim != 1 or len(ids) == 0:
        raise UserError(f"prompt: expected token ids [T], got shape {list(ids.shape)}")
    context = int(model.model.config.max_position_embeddings)
    if len(ids) > context:
        raise UserError(
            f"prompt: expected at most {context:,} tokens, the model's context, got {len(ids):,}; "
            "give a shorter text"
        )
    n_tokens = model.model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= n_tokens or int(ids.min()) < 0:
        raise UserError(f"prompt: expected token ids 0 to {n_tokens - 1}, got {int(ids.max())}")
    return ids


def record(
    model: ReplacementModel,
    ids: Tensor | Sequence[int],
    *,
    stream: Stream = "replacement",
    rows: int = 1,
    features: Features = "leaves",
) -> Trace:
    """Run a text through the linearized model.

    Args:
        model: a replacement model with transcoders, in ``eval()``.
        ids: token ids ``[T]`` of one text without padding.
        stream: ``replacement``: the states of the replacement. ``target``: those of the target, for
            text that the target wrote; what the adapters miss becomes an error node.
        rows: number of gradients per backward pass.
        features: see :func:`.rules.linearized`.

    Raises:
        UserError: impossible ids or an unknown stream; see also :func:`.rules.linearized`.
    """
    if stream not in STREAMS:
        raise UserError(f"stream: expected one of {', '.join(STREAMS)}, got {stream!r}")
    check_model(model)
    ids = check_ids(model, ids)
    with ExitStack() as stack, torch.enable_grad():
        biases: dict[tuple[int, str, str], Bias] = {}
        stack.enter_context(_recording_biases(model, biases))
        stack.enter_context(linearized(model, features))
        mlps = stack.enter_context(_recording(model.mlps))
        heads = stack.enter_context(_recording(_output_projections(model)))
        inputs = model.block_inputs(ids.expand(rows, -1), None)
        embedding = inputs.hidden.detach().requires_grad_()
        hidden = embedding
        for layer, arguments in enumerate(inputs.arguments):
            hidden, _ = model.block(layer, hidden, arguments, stream)
            model.reshard_layer(layer)
        final = model.final_norm(hidden, stream)
    codes, errors = _codes_and_errors(model, mlps)
    return Trace(
        model=model,
        ids=ids,
        stream=stream,
        rows=rows,
        embedding=embedding,
        mlp_in=[given for given, _ in mlps],
        mlp_out=[out for _, out in mlps],
        head_in=[given for given, _ in heads],
        final=final,
        biases=list(biases.values()),
        codes=codes,
        errors=errors if stream == "target" else None,
    )


@torch.no_grad()
def _codes_and_errors(
    model: ReplacementModel, mlps: Sequence[tuple[Tensor, Tensor]]
) -> tuple[list[SparseCodes], list[Tensor]]:
    """Return each layer's active features, and what MLP_base and A leave of the MLP's output."""
    codes, errors = [], []
    for mlp, (given, out) in zip(model.mlps, mlps, strict=True):
        x = given[:1].detach()
        change, aux = mlp.adapter(x, return_codes=True)
        codes.append(aux.codes)
        errors.append((out[:1].detach() - mlp.base(x) - change)[0])
    return codes, errors


@contextmanager
def _recording(modules: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield a list that gets the first input and the output of each call of the modules."""
    calls: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
            stack.callback(hook.remove)
        yield calls


@contextmanager
def _recording_biases(
    model: ReplacementModel, into: dict[tuple[int, str, str], Bias]
) -> Iterator[None]:
    """Record the outputs of linear layers with a bias, before the rules change their gradients.

    A layer that runs twice is recorded for its last call, on which the graph depends.
    """
    with ExitStack() as stack:
        for layer, (block, mlp) in enumerate(zip(model.blocks, model.mlps, strict=True)):
            for part, owner in (("attention", attention_of(block)), ("mlp", mlp.base)):
                for name, module in owner.named_modules():
                    if isinstance(module, nn.Linear) and module.bias is not None:
                        hook = partial(_record_bias, into, layer, part, name)
                        stack.callback(module.register_forward_hook(hook).remove)
        yield


def _record_bias(
    into: dict[tuple[int, str, str], Bias],
    layer: int,
    part: str,
    name: str,
    module: Any,
    args: Any,
    out: Tensor,
) -> None:
    into[layer, part, name] = Bias(layer, part, out, module.bias.detach())


def attention_of(block: nn.Module) -> nn.Module:
    """Return a block's attention module, which transformers names ``...Attention``."""
    modules = [m for m in block.children() if type(m).__name__.endswith("Attention")]
    assert len(modules) == 1, modules
    return modules[0]


def _output_projections(model: ReplacementModel) -> list[nn.Module]:
    return [attention_of(block).o_proj for block in model.blocks]  # type: ignore[misc]
