"""Check that walking over a model's blocks gives the logits of the model's own forward.

The objective, evaluations and collections call transformers' blocks one by one, with arguments
recorded from the model's forward (:mod:`fastadapt.models.block_inputs`). Whether that is the same
function depends on how transformers passes masks, positions and caches, which a release may change.
So each of them runs this check on its first batch.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.errors import RunError
from fastadapt.models.adapted_mlp import MODES, Call, Mode
from fastadapt.models.block_inputs import BlockInputs, versions
from fastadapt.models.replacement import ReplacementModel

#: Bounds of the part of a batch that is used: rows, tokens of each, positions whose logits exist.
ROWS, TOKENS, POSITIONS = 2, 1024, 64


@torch.no_grad()
def check_traversal(model: ReplacementModel, batch: Batch) -> None:
    """Raise where the walk over the blocks and the model's own forward differ, in any mode.

    The arguments of the blocks are recorded once and used for all modes, as a training step does.
    Both sides run the same operations on the same inputs and differ by the order of sums alone:
    the root mean square of the logits' difference may be up to ``4 eps sqrt(2 L)`` of the logits'
    own, where ``eps`` is the dtype's spacing at 1: the random walk of one rounding for each of the
    2 L additions to the residual stream, times 4. Weights, gradients and random states stay as
    they are. On several ranks all call this with the same batch.

    Args:
        model: on its device; modes whose weights are absent are left out.
        batch: on the same device. Its longest and its shortest row are used, 1,024 tokens of each
            at most.

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
    inputs = model.block_inputs(part.input_ids, part.attention_mask)
    tensors = _tensors(inputs)
    before = [tensor._version for _, tensor in tensors]
    positions = _positions(part)
    tolerance = 4 * torch.finfo(model.head.dtype).eps * math.sqrt(2 * model.n_layers)
    counted = part.real[:, positions]
    for mode in MODES:
        if mode == "target" and model.mlps[0].target is None:
            continue
        walked = _walked(model, inputs, mode, positions)[counted]
        expected = _own(model, part, mode, positions)[counted]
        error = (walked - expected).square().mean().sqrt().item()
        scale = expected.square().mean().sqrt().item()
        # Neither side finite is a model or a batch that training reports as such.
        same = torch.equal(walked.isfinite(), expected.isfinite())
        if not same or (math.isfinite(error) and error > tolerance * scale):
            raise RunError(
                f"The walk over the blocks of {type(model.model).__name__} does not give the "
                f"logits of the model's own forward in mode {mode}: they differ by "
                f"{error / max(scale, 1e-30):.2g} of their size, at most {tolerance:.2g} is "
                f"rounding. {versions()}"
            )
    for (name, tensor), version in zip(tensors, before, strict=True):
        if tensor._version != version:
            raise RunError(
                f"A block of {type(model.model).__name__} changed its argument {name!r} in place; "
                f"a later call with the same arguments would be wrong. {versions()}"
            )


def _part(batch: Batch) -> Batch:
    """The longest and the shortest row, cut to ``TOKENS``."""
    order = batch.real.sum(1).argsort(descending=True, stable=True)
    rows = order[[0, -1]] if len(order) > 1 else order
    mask = batch.attention_mask
    return Batch(
        batch.input_ids[rows, :TOKENS],
        None if mask is None else mask[rows, :TOKENS],
        batch.labels[rows, :TOKENS],
    )


def _positions(part: Batch) -> Tensor:
    """Up to ``POSITIONS`` positions, evenly spread over the longest row, its ends included."""
    last = int(part.real.sum(1).max()) - 1
    spread = torch.linspace(0, last, min(POSITIONS, last + 1), device=part.input_ids.device)
    return spread.round().long().unique()


def _tensors(inputs: BlockInputs) -> list[tuple[str, Tensor]]:
    """Every tensor that a block is called with, beside the name of its argument."""
    found: list[tuple[str, Tensor]] = [("hidden_states", inputs.hidden)]

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, tuple):
            for item in value:
                add(name, item)

    for arguments in inputs.arguments:
        for name, value in arguments.items():
            add(name, value)
    return found


def _walked(model: ReplacementModel, inputs: BlockInputs, mode: Mode, positions: Tensor) -> Tensor:
    hidden = inputs.hidden
    for layer in range(model.n_layers):
        hidden, _ = model.block(layer, hidden, inputs.arguments[layer], mode)
        model.reshard_layer(layer)
    logits: Tensor = model.model.get_output_embeddings()(
        model.final_norm(hidden, mode)[:, positions]
    )
    if (cap := model.softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return _wide(logits)


def _own(model: ReplacementModel, part: Batch, mode: Mode, positions: Tensor) -> Tensor:
    with ExitStack() as held:
        for mlp in model.mlps:  # the MLP's sums in the order of a walk
            held.enter_context(mlp.call_context(mode, Call(None, None, None)))
        output = model.model(
            input_ids=part.input_ids,
            attention_mask=part.attention_mask,
            use_cache=False,
            logits_to_keep=positions,
        )
    for layer in range(model.n_layers):
        model.reshard_layer(layer)
    return _wide(output.logits)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
