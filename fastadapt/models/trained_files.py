"""Read the weights that a run trained: transcoders, or those of a baseline.

:func:`fastadapt.adapter.files.save_adapters` writes both. The weights of a baseline have the kind
``mlp``, ``norms``, ``bias`` or ``lora`` (:mod:`fastadapt.models.baselines`). Their
``fastadapt.json`` also lists the shapes of every layer's tensors.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadapt.adapter.coder_files import CODERS, coder_readers
from fastadapt.adapter.files import (
    CARD,
    TRANSCODER,
    Card,
    adapters_of,
    layer_readers,
    read_card,
    read_transcoders,
    transcoder_readers,
)
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import ModelsChangedWarning, UserError
from fastadapt.io.documents import Count, check
from fastadapt.io.tensors import read_tensors
from fastadapt.models.baselines import TUNED, TunedWeights
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.fingerprint import ENTRIES, changes

KINDS = (TRANSCODER, *TUNED)
#: Settings of :class:`AdapterConfig` on which tensors, their meaning or their bounds depend.
_SHAPING = ("activation", "bandwidth", "initial_threshold", "bias", "base_mlp")


class TunedCard(Card):
    """``fastadapt.json`` of a baseline: also the shapes of each layer's tensors, by name."""

    tensors: list[dict[str, list[Count]]]


def read_adapters(
    folder: str | os.PathLike[str],
) -> tuple[list[Callable[[], nn.Module]], dict[str, Any]]:
    """Read a folder of trained weights, one layer at a time.

    Returns:
        A function for every layer that reads its weights, layer 0 first; and the contents of
        ``fastadapt.json``, of which ``adapter`` (of transcoders only) is an
        :class:`~fastadapt.adapter.module.AdapterConfig`.

    Raises:
        UserError: no adapters in the folder, or a damaged file.
    """
    path = Path(folder)
    card, card_file = read_card(path), str(path / CARD)
    kind = card["kind"]
    if kind in CODERS:
        raise UserError(
            f"{card_file}: expected adapters or weights of a baseline, got {kind}s; "
            "fastadapt.load_adapters and fastadapt export read those"
        )
    if kind not in KINDS:
        raise UserError(f"{card_file}: kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    if kind == TRANSCODER:
        return list(transcoder_readers(path, card)), card
    if card["additive"] is not False:
        raise UserError(f"{card_file}: 'additive' must be false for {kind}")
    check(card, TunedCard, card_file)
    if len(card["tensors"]) != card["n_layers"]:
        raise UserError(
            f"{card_file}: tensors: expected {card['n_layers']} layers, each with the shapes "
            f"of its tensors by name, got {len(card['tensors'])}"
        )
    return list(layer_readers(path, card, _read_tuned)), card


def load_adapters(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.ModuleList, dict[str, Any]]:
    """Load the adapters of a folder, the first layer first, and their metadata.

    A folder of plain transcoders or SAEs (``fastadapt import``) gives :class:`fastadapt.Transcoder`
    or :class:`fastadapt.SAE`, one per layer in the list ``layers`` of ``fastadapt.json``.

    Every tensor is checked for NaN and infinity, which costs one pass over the weights.

    Args:
        folder: as :func:`fastadapt.save_adapters` or ``fastadapt import`` writes it.
        device: device of the weights; the CPU by default.
        dtype: dtype of the parameters; that of the files by default. The running threshold of
            ``batch_topk`` keeps its dtype.

    Raises:
        UserError: a file or tensor is missing, unexpected, of a wrong shape or an integer type, or
            holds a number that is not finite. The message names it.
    """
    card = read_card(Path(folder))
    layers: Sequence[Callable[[], nn.Module]]
    if card["kind"] in CODERS:
        layers = coder_readers(Path(folder), card)[1]
    else:
        layers, card = read_adapters(folder)
    adapters = nn.ModuleList()
    for read in layers:
        adapter = read()
        if dtype is not None:
            for parameter in adapter.parameters():
                parameter.data = parameter.data.to(dtype)
        adapters.append(adapter.to(device))
    return adapters, card["metadata"]


def read_initial(
    source: str | os.PathLike[str], config: AdapterConfig
) -> tuple[list[Callable[[], TranscoderAdapter]], dict[str, Any]]:
    """Read the transcoders as which those of a new run begin, one layer at a time.

    Args:
        source: a finished run, or a folder of transcoders (``run.init_from``).
        config: settings of the new run's adapters, of which ``k`` and ``implementation`` may
            differ from those of ``source``.

    Returns:
        As :func:`fastadapt.adapter.files.read_transcoders`.

    Raises:
        UserError: no transcoders, transcoders of other settings, or some that ``fastadapt
            intervene`` wrote, whose removed features no training brings back.
    """
    layers, card = read_transcoders(adapters_of(source), "run.init_from")
    if card["metadata"].get("interventions"):
        raise UserError(
            f"run.init_from: {source} was changed by fastadapt intervene; give the run that was "
            "changed"
        )
    for name, ours, theirs in (
        ("n_features", config.features, card["adapter"].features),
        *((name, getattr(config, name), getattr(card["adapter"], name)) for name in _SHAPING),
    ):
        if ours != theirs:
            raise UserError(
                f"adapter.{name}: expected {_typed(theirs)}, as in run.init_from {source}, got "
                f"{_typed(ours)}"
            )
    return layers, card


def initialise(
    model: ReplacementModel, source: str | os.PathLike[str], config: AdapterConfig
) -> None:
    """Copy the weights of other transcoders into those of ``model``, in place.

    Args:
        model: model with new transcoders.
        source, config: as in :func:`read_initial`.

    Raises:
        UserError: transcoders of other settings, sizes or layers, or of another base.

    Warns:
        ModelsChangedWarning: the source does not record the fingerprint of its base.
    """
    layers, card = read_initial(source, config)
    pair, shape = model.pair, (len(layers), card["d_in"], card["d_out"])
    if shape != (model.n_layers, model.d_model, model.d_model):
        raise UserError(
            f"run.init_from: {source} has {shape[0]} adapters of {shape[1]} inputs and {shape[2]} "
            f"outputs; the pair has {model.n_layers} layers of width {model.d_model}"
        )
    base = {entry: {"base": (card["metadata"].get(entry) or {}).get("base")} for entry in ENTRIES}
    if changed := changes(base, pair.fingerprints, {"base": pair.config.base}):
        raise UserError(
            f"run.init_from: {source} was trained beside another base: {'; '.join(changed)}. A "
            "feature means the same in two runs only beside the same base"
        )
    if base["weights"]["base"] is None:
        recorded = card["metadata"].get("base") or "an unnamed one"
        warnings.warn(
            f"run.init_from: {source} has no fingerprint of its base ({recorded}), which could not "
            f"be compared with {pair.config.base}. A feature means the same only beside one base",
            ModelsChangedWarning,
            stacklevel=2,
        )
    for adapter, read in zip(model.adapters, layers, strict=True):
        adapter.load_state_dict(read().state_dict())


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_tuned(file: Path, layer: int, card: Mapping[str, Any]) -> TunedWeights:
    tensors = read_tensors(file, card["tensors"][layer], finite=True)
    try:
        return TUNED[card["kind"]](card["d_in"], tensors)
    except (KeyError, AttributeError) as error:  # torch's, for a name that no parameter can have
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise UserError(f"{file}: a tensor's name is no name of a parameter: {reason}") from None
