"""Replace TopK by JumpReLU, for formats that have no TopK transcoders.

TopK compares a token's features with each other, JumpReLU each feature with a constant, so the two
differ on single tokens. The threshold of a layer is fitted so that as many features fire on a
sample of the MLP's inputs; :func:`compare` says what that costs on other inputs.

T tokens, D width, F features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import JUMPRELU, CoderSet, empty_like, fill, round_down
from fastadapt.adapter.sae import SAE, Transcoder
from fastadapt.errors import UserError
from fastadapt.features.store.schema import MANIFEST
from fastadapt.features.store.source_run import students_of
from fastadapt.features.store.store import Store
from fastadapt.io.names import has_file, typed_path
from fastadapt.models.replacement import ReplacementModel
from fastadapt.organism import resolve

#: Tokens that thresholds are fitted on, and as many that they are measured on.
TOKENS = 4096
_CHUNK = 1 << 24  # pre-activations in memory at once


@dataclass(frozen=True)
class Fit:
    """What replacing TopK by JumpReLU costs in one layer, measured on inputs not fitted on.

    Attributes:
        threshold: the fitted threshold.
        topk: mean number of active features per token with TopK.
        jumprelu, relu: ... with the threshold, and with ReLU, as which a reader that does not know
            TopK runs the same weights.
        error: ``Σ ‖JumpReLU's output − TopK's‖² / Σ ‖TopK's − mean‖²``.
        relu_error: the same for ReLU's output.
    """

    threshold: float
    topk: float
    jumprelu: float
    relu: float
    error: float
    relu_error: float


@torch.no_grad()
def fit_threshold(coder: SparseCoder, x: Tensor) -> float:
    """Return the threshold at which JumpReLU has as many active features on ``x`` as TopK.

    It lies halfway between the smallest of these pre-activations and the next smaller one.

    Args:
        coder: a coder with TopK.
        x: ``[T, D]``, inputs of the coder.

    Raises:
        UserError: the activation is not TopK, or no feature fires.

    Example:
        >>> from fastadapt import AdapterConfig, Transcoder
        >>> coder, x = Transcoder(8, AdapterConfig(32, "topk", k=3)), torch.randn(50, 8)
        >>> z = x @ coder.W_enc.T
        >>> int((z > fit_threshold(coder, x)).sum())
        150
    """
    if coder.config.activation != "topk":
        raise UserError(f"expected a transcoder with topk to fit, got {coder.config.activation}")
    k, active = int(coder.config.k or 0), 0
    largest = x.new_empty(0)
    for chunk in x.split(max(1, _CHUNK // coder.n_features)):
        z = nn.functional.linear(chunk, coder.W_enc, coder.b_enc).clamp(min=0)
        active += int((z > 0).sum(1).clamp(max=k).sum())
        most = min(z.numel(), k * len(x) + 1)
        joined = torch.cat([largest, z.flatten().topk(most).values])
        largest = joined.topk(min(len(joined), k * len(x) + 1)).values
    if active == 0:
        raise UserError("no feature fires on the inputs to fit a threshold on; give other texts")
    below = float(largest[active]) if active < len(largest) else 0.0
    return (float(largest[active - 1]) + below) / 2


@torch.no_grad()
def compare(coder: SparseCoder, jumprelu: SparseCoder, x: Tensor) -> Fit:
    """Measure a JumpReLU coder against the TopK coder that it replaces, on inputs ``x [T, D]``."""
    relu = Transcoder(
        coder.d_in, replace(coder.config, activation="relu", k=None), coder.d_out, device="meta"
    )
    relu.load_state_dict(
        {n: t for n, t in coder.state_dict().items() if n != "W_skip"}, assign=True
    )
    counts, outputs = [], []
    for each in (coder, jumprelu, relu):
        a = each.encode(x)
        counts.append(float((a > 0).sum()) / len(x))
        outputs.append(each.decode(a))
    spread = (outputs[0] - outputs[0].mean(0)).square().sum()
    errors = [float((out - outputs[0]).square().sum() / spread) for out in outputs[1:]]
    assert jumprelu.threshold is not None
    return Fit(float(jumprelu.threshold[0]), *counts, *errors)


def with_thresholds(
    coders: CoderSet, inputs: Mapping[int, Tensor]
) -> tuple[CoderSet, dict[int, Fit]]:
    """Return a set of TopK transcoders with JumpReLU, and what that costs in each layer.

    Args:
        coders: transcoders with TopK.
        inputs: ``[T, D]`` of every layer, inputs of the coders: thresholds are fitted on the first
            half of the tokens and measured on the second.

    Raises:
        UserError: see :func:`fit_threshold`.
    """
    config = replace(coders.empty.config, activation="jumprelu", k=None, **JUMPRELU)
    empty = empty_like(coders.empty)
    skip = getattr(coders.empty, "W_skip", None) is not None
    empty = Transcoder(empty.d_in, config, empty.d_out, skip=skip, device="meta")
    fits, thresholds = {}, {}
    for layer, coder in coders.coders():
        fitted, measured = inputs[layer].to(coder.W_enc).tensor_split(2)
        thresholds[layer] = fit_threshold(coder, fitted)
        fits[layer] = compare(coder, _jumprelu(coder, empty, thresholds[layer]), measured)
    layers = {
        layer: partial(_read_with, read, empty, thresholds[layer])
        for layer, read in coders.layers.items()
    }
    return CoderSet(empty, layers, coders.hooks, coders.model, coders.metadata), fits


def fit(
    coders: CoderSet, source: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
) -> tuple[CoderSet, dict[int, Fit]]:
    """Return a set with JumpReLU, as :func:`with_thresholds`, fitted on texts of a store.

    Args:
        coders: transcoders with TopK.
        source: folder of the set, or of its run.
        store: features of a run of the same target; by default those of the source.

    Raises:
        UserError: no features exist, or those of another target.
    """
    if isinstance(coders.empty, SAE):
        return coders, {}  # refused by the format
    place = store if store is not None else _store_of(typed_path(source, "run"))
    opened = Store.open(place)
    students = students_of(opened, source if store is None else None)
    names = [coders.model, students.config.target]
    target, read = (name and os.path.realpath(resolve(name)) for name in names)
    if target != read:
        raise UserError(
            f"{place}: expected features of a run of {coders.model or 'the model of the set'}, got "
            f"those of {students.config.target}; give another run (--store), or the name of the "
            "model that the set belongs to (--target)"
        )
    inputs = mlp_inputs(students.model, opened)
    width = next(iter(inputs.values())).shape[1]
    if not coders.layers.keys() <= inputs.keys() or coders.empty.d_in != width:
        raise UserError(
            f"{source}: expected transcoders of {len(inputs)} layers of width {width}, those of "
            f"{students.config.target}, got layers up to {max(coders.layers)} of width "
            f"{coders.empty.d_in}"
        )
    return with_thresholds(coders, inputs)


def _store_of(source: Path) -> Path:
    """Return the folder of the features of a run, or of a folder of adapters."""
    around = [source.parent / "features"] if source.name == "adapter" else []
    for folder in (source, source / "features", *around):
        if has_file(folder / MANIFEST):
            return folder
    raise UserError(
        f"{source}: this format has no TopK. Thresholds are fitted in its place, on texts of "
        "collected features: give a run of the same target that has some (--store RUN), or run "
        f"fastadapt features collect {source}"
    )


def _read_with(
    read: Callable[[], SparseCoder], empty: SparseCoder, threshold: float
) -> SparseCoder:
    return _jumprelu(read(), empty, threshold)


def _jumprelu(coder: SparseCoder, empty: SparseCoder, threshold: float) -> SparseCoder:
    exact = torch.full((coder.n_features,), threshold, dtype=torch.float64)
    thresholds = round_down(exact, coder.b_enc.dtype).to(coder.b_enc.device)
    return fill(empty, {**coder.state_dict(), "threshold": thresholds})


@torch.no_grad()
def mlp_inputs(
    model: ReplacementModel, store: Store, tokens: int = 2 * TOKENS
) -> dict[int, Tensor]:
    """Return inputs of the target's MLPs ``[T, D]`` in every layer, on a store's texts.

    Args:
        model: the replacement model, whose mode ``target`` is run.
        store: the store, of which whole texts are taken until they have enough tokens.
        tokens: largest T.
    """
    taken: dict[int, list[Tensor]] = {layer: [] for layer in range(model.n_layers)}
    handles = [
        mlp.register_forward_pre_hook(
            lambda _, args, layer=layer: taken[layer].append(args[0].flatten(0, -2).cpu())
        )
        for layer, mlp in enumerate(model.mlps)
    ]
    try:
        count = 0
        for ids in store.read("texts", columns=["tokens"])["tokens"].to_pylist():
            with model.mode("target"):
                model(torch.tensor([ids], device=model.head.device))
            count += len(ids)
            if count >= tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts)[:tokens] for layer, parts in taken.items()}
