"""Check that calling a model's blocks one by one gives the logits of the model's own forward.

The objective, evaluations and collections call transformers' blocks one by one, with arguments
recorded from the model's forward (:mod:`fastadapt.models.block_inputs`). Equality depends on how
transformers passes masks, positions and caches, which a release may change. Therefore each of them
runs this check on its first batch.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.errors import RunError, UserError
from fastadapt.models.adapted_mlp import MODES, Call, Mode
from fastadapt.models.block_inputs import BlockInputs, versions
from fastadapt.models.replacement import ReplacementModel

#: Largest part of a batch to use: rows, tokens per row, positions with logits.
ROWS, TOKENS, POSITIONS = 2, 1024, 64


@torch.no_grad()
def check_traversal(model: ReplacementModel, batch: Batch) -> None:
    """Raise if the block-by-block traversal and the model's own forward differ in any mode.

    The arguments of the blocks are recorded once and used for all modes, as in a training step.
    Both sides compute the same formulas on the same inputs and may differ only in rounding and in
    the order of sums: on a GPU the blocks run fused kernels (:mod:`fastadapt.models.fused_blocks`),
    the model's own forward does not.
    The RMS of the logits' difference may be at most ``4 eps sqrt(2 L)`` times the RMS of the
    logits, where ``eps`` is the dtype's spacing at 1: the random walk of one rounding for each of
    the 2 L additions to the residual stream, times 4. Weights, gradients and random states do not
    change. With several ranks, every rank calls this function with the same batch.

    Args:
        model: the model, on its device. Modes whose weights are absent are skipped.
        batch: a batch on the same device. The longest and the shortest row are used, each cut to
            1,024 tokens.

    Raises:
        RunError: the logits differ in a mode, or a block changed one of its arguments; the message
            names the versions of transformers and of this library.

    Example:
        >>> from fastadapt.organism import resolve
        >>> from fastadapt import AdapterConfig, ModelPair, PairConfig, ReplacementModel
        >>> pair = ModelPair.load(PairConfig(resolve("organism/target"), resolve("organism/base")))
        >>> model = ReplacementModel.create(pair, AdapterConfig(n_features=16))
        >>> ids = torch.arange(12)[None]
        >>> check_traversal(model, Batch(ids, None, ids))
    """
    part = _part(batch)
    inputs = model.block_inputs(part.input_ids, part.model_mask)
    tensors = _tensors(inputs)
    before = [tensor._version for _, tensor in tensors]
    positions = _positions(part)
    tolerance = _tolerance(model)
    counted = part.real[:, positions]
    for mode in MODES:
        if mode == "target" and model.mlps[0].target is None:
            continue
        logits = _traversed(model, inputs, mode, positions)[counted]
        expected = _forward(model, part, mode, positions)[counted]
        error = (logits - expected).square().mean().sqrt().item()
        scale = expected.square().mean().sqrt().item()
        # Training reports non-finite logits; here they must only agree.
        same = torch.equal(logits.isfinite(), expected.isfinite())
        if not same or (math.isfinite(error) and error > tolerance * scale):
            raise RunError(
                f"Calling the blocks of {type(model.model).__name__} one by one does not give the "
                f"logits of the model's own forward in mode {mode}: they differ by "
                f"{error / max(scale, 1e-30):.2g} of their RMS; rounding explains at most "
                f"{tolerance:.2g}. {versions()}"
            )
    for (name, tensor), version in zip(tensors, before, strict=True):
        if tensor._version != version:
            raise RunError(
                f"A block of {type(model.model).__name__} changed its argument {name!r} in place; "
                f"a later call with the same arguments would be wrong, so this model cannot be "
                f"used. {versions()}"
            )


def _part(batch: Batch) -> Batch:
    """Return a batch of the longest and the shortest row, each cut to ``TOKENS`` tokens."""
    order = batch.real.sum(1).argsort(descending=True, stable=True)
    rows = order[[0, -1]] if len(order) > 1 else order
    mask = batch.attention_mask
    return Batch(
        batch.input_ids[rows, :TOKENS],
        None if mask is None else mask[rows, :TOKENS],
        batch.labels[rows, :TOKENS],
        batch.passes_mask,
    )


@torch.no_grad()
def check_packing(model: ReplacementModel, packed: Batch, apart: Batch) -> None:
    """Raise if texts that share a row influence each other, or get other logits than apart.

    Args:
        model: the model, on its device.
        packed: texts in rows of several, on the same device.
        apart: the same texts in the same order, one a row.

    Raises:
        UserError: the logits differ by more than :func:`check_traversal` allows.
    """
    mode: Mode = "hybrid" if model.mlps[0].target is None else "target"
    logits = []
    for batch in (packed, apart):
        inputs = model.block_inputs(batch.input_ids, batch.model_mask, batch.positions)
        every = torch.arange(batch.input_ids.shape[1], device=model.device)
        logits.append(_traversed(model, inputs, mode, every)[batch.real])
    error = (logits[0] - logits[1]).square().mean().sqrt().item()
    scale = logits[1].square().mean().sqrt().item()
    if math.isfinite(error) and error > _tolerance(model) * scale:
        attention = model.model.config._attn_implementation
        raise UserError(
            f"data.pack: texts that share a row have other logits than alone in "
            f"{type(model.model).__name__} with the attention {attention!r} (they differ by "
            f"{error / max(scale, 1e-30):.2g} of their RMS); leave data.pack out, or try "
            "--pair.attention sdpa"
        )


def _tolerance(model: ReplacementModel) -> float:
    return 4 * torch.finfo(model.head.dtype).eps * math.sqrt(2 * model.n_layers)


def _positions(part: Batch) -> Tensor:
    """Return up to ``POSITIONS`` evenly spaced positions of the longest row, including its ends."""
    last = int(part.real.sum(1).max()) - 1
    spread = torch.linspace(0, last, min(POSITIONS, last + 1), device=part.input_ids.device)
    return spread.round().long().unique()


def _tensors(inputs: BlockInputs) -> list[tuple[str, Tensor]]:
    """Return every tensor passed to a block, with the name of its argument."""
    tensors: list[tuple[str, Tensor]] = [("hidden_states", inputs.hidden)]

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append((name, value))
        elif isinstance(value, tuple):
            for item in value:
                add(name, item)

    for arguments in inputs.arguments:
        for name, value in arguments.items():
            add(name, value)
    return tensors


def _traversed(
    model: ReplacementModel, inputs: BlockInputs, mode: Mode, positions: Tensor
) -> Tensor:
    """Return the logits of calling the blocks one by one."""
    hidden = inputs.hidden
    for layer in range(model.n_layers):
        hidden, _ = model.block(layer, hidden, inputs.arguments[layer], mode)
        model.reshard_layer(layer)
    logits: Tensor = model.model.get_output_embeddings()(
        model.final_norm(hidden, mode)[:, positions]
    )
    if (cap := model.softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return _at_least_float32(logits)


def _forward(model: ReplacementModel, part: Batch, mode: Mode, positions: Tensor) -> Tensor:
    """Return the logits of the model's own forward, without fused kernels."""
    with ExitStack() as contexts:
        contexts.enter_context(model.fused.off())
        for mlp in model.mlps:  # with a call set, the MLP sums in the order of the traversal
            contexts.enter_context(mlp.call_context(mode, Call(None, None, None)))
        output = model.model(
            input_ids=part.input_ids,
            attention_mask=part.model_mask,
            use_cache=False,
            logits_to_keep=positions,
        )
    for layer in range(model.n_layers):
        model.reshard_layer(layer)
    return _at_least_float32(output.logits)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
