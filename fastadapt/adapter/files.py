"""A folder of adapters: ``fastadapt.json`` and ``layer_{i}.safetensors``, read strictly.

Its ``kind`` is ``transcoder_adapter``, which is additive, or ``mlp`` or ``norms``: weights that
take the place of the model's own (:mod:`fastadapt.models.baselines`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import torch
from torch import nn
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.io.atomic import save_tensors, writing_folder
from fastadapt.io.documents import Count, Finite, Name, NonNegative, check, read_json
from fastadapt.io.names import has_file, typed_path
from fastadapt.io.tensors import read_tensors
from fastadapt.models.baselines import TUNED, TunedWeights

SCHEMA_VERSION = 1
TRANSCODER = "transcoder_adapter"
KINDS = (TRANSCODER, *TUNED)
CARD = "fastadapt.json"
#: Names of the files of adapters.
PATTERNS = (CARD, "layer_*.safetensors")
#: More than any model has; a file that asks for more is damaged, and nothing is built from it.
MAX_LAYERS, MAX_WIDTH, MAX_FEATURES = 10_000, 1 << 20, 1 << 26


def save_adapters(
    adapters: Iterable[nn.Module],
    folder: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter per layer as ``fastadapt.json`` and ``layer_{i}.safetensors``.

    The JSON file states schema version, kind, shapes, and of transcoders the orientation (one row
    per feature in both matrices), the hook (the MLP's input, after the norm and its weight) and
    that they are *additive*; and ``metadata`` (model ids, revisions, losses, measured L0). It is
    written last, so that a folder that has it is whole.

    Adapters that are in the folder are replaced once all of the new ones are on the disk; files of
    other names stay.

    Args:
        adapters: layer 0 first, one configuration and one pair of widths for all; of an iterator
            one is held at a time.
        folder: made if it is not there.
        metadata: JSON-serialisable.

    Raises:
        UserError: no adapter, or adapters that differ.
        RunError: the folder cannot be written; what was in it is as it was.
    """
    with writing_folder(Path(folder), last=CARD, ours=PATTERNS) as staged:
        write_adapters(adapters, staged, metadata)


def write_adapters(
    adapters: Iterable[nn.Module], path: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the files of :func:`save_adapters` into an empty folder, which is there.

    Raises:
        UserError: no adapter, or adapters that differ.
        OSError, SafetensorError: the folder cannot be written.
    """
    first: dict[str, Any] | None = None
    shapes: list[dict[str, list[int]]] = []
    for adapter in adapters:
        if first is None:
            first = _card(adapter)
        if _card(adapter) != first:
            raise UserError(f"layer {len(shapes)} differs from layer 0 in configuration or width")
        tensors = adapter.state_dict()
        save_tensors(tensors, path / f"layer_{len(shapes)}.safetensors")
        shapes.append({name: list(tensor.shape) for name, tensor in tensors.items()})
    if first is None:
        raise UserError("there is no adapter to save")
    card = {"schema_version": SCHEMA_VERSION, **first, "n_layers": len(shapes)}
    if card["kind"] != TRANSCODER:
        card["tensors"] = shapes
    card["metadata"] = dict(metadata or {})
    (path / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _card(adapter: nn.Module) -> dict[str, Any]:
    """What a layer's adapter is; the same for all layers of a model."""
    if isinstance(adapter, TunedWeights):
        width = {"d_in": adapter.d_in, "d_out": adapter.d_out}
        return {"kind": adapter.kind, "additive": False, **width}
    assert isinstance(adapter, TranscoderAdapter)
    settings = asdict(adapter.config)
    del settings["kind"]
    return {
        "kind": TRANSCODER,
        "additive": True,
        "hook_in": "mlp.input (after the norm, norm weight included)",
        "hook_out": "mlp.output (added to the base MLP's, before any post-norm)",
        "orientation": {"W_enc": "[n_features, d_in]", "W_dec": "[n_features, d_out]"},
        "d_in": adapter.d_in,
        "d_out": adapter.d_out,
        "adapter": settings,
    }


def adapters_of(source: str | os.PathLike[str]) -> Path:
    """The folder of adapters of a finished run, or ``source`` itself where it is one.

    Raises:
        UserError: it is neither.
    """
    folder = typed_path(source, "run")
    if has_file(folder / CARD):
        return folder
    if has_file(folder / "adapter" / CARD):
        return folder / "adapter"
    if has_file(folder / "config.yaml"):
        raise UserError(f"{folder}: this run is not finished: it has no adapter/ yet")
    raise UserError(f"{source}: expected a run or a folder of adapters with fastadapt.json")


class AdapterSection(TypedDict):
    """The settings of :class:`AdapterConfig`, as a card and an exported ``config.json`` hold them.

    Of values that are possible the class itself judges.
    """

    n_features: Annotated[int, msgspec.Meta(ge=1, le=MAX_FEATURES)]
    activation: str
    k: int | float | None
    bandwidth: int | float | None
    initial_threshold: int | float | None
    implementation: str


_Width = Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]


class Revisions(TypedDict, total=False):
    """The commits of the models that adapters were trained with; null of local folders."""

    target: Name | None
    base: Name | None


class Weights(TypedDict, total=False):
    """The weights of the losses; the other settings of the objective are not read."""

    sparsity: NonNegative | None
    nmse: NonNegative | None
    bridge: NonNegative | None


class Measured(TypedDict, total=False):
    """What is read of a run's measurements; null where a number was not finite."""

    l0_mean: NonNegative | None
    tokens: Count | None


class ChangedSet(TypedDict):
    """The set of features of an intervention."""

    name: Name | None
    size: Count


class Change(TypedDict):
    """An intervention, as the card of changed adapters records it."""

    kind: Name
    set: ChangedSet
    adapter: Name
    scale: NotRequired[Finite | None]


class Metadata(TypedDict, total=False):
    """What of ``metadata`` of a card is read, where it is there; any other key may be, too."""

    target: Name | None
    base: Name | None
    revisions: Revisions | None
    family: Name | None
    objective: Weights | None
    measured: Measured | None
    interventions: list[Change] | None


class Card(TypedDict):
    """What every ``fastadapt.json`` holds, whatever its kind."""

    schema_version: int
    kind: str
    additive: bool
    n_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    d_in: _Width
    d_out: _Width
    metadata: Metadata


class TranscoderCard(Card):
    """That of transcoders."""

    adapter: AdapterSection


class TunedCard(Card):
    """That of tuned weights: of every layer the shapes of its tensors, by name."""

    tensors: list[dict[str, list[Count]]]


def _read_card(path: Path) -> dict[str, Any]:
    card_file = path / "fastadapt.json"
    if not has_file(card_file):
        raise UserError(f"{path} holds no adapters: fastadapt.json is missing")
    card: dict[str, Any] = read_json(card_file, dict[str, Any], constants=True)
    version = card.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{card_file}: schema_version is {version!r:.80}, this fastadapt reads {SCHEMA_VERSION}"
        )
    kind = card.get("kind")
    if kind not in KINDS:
        raise UserError(f"{card_file}: kind must be one of {', '.join(KINDS)}, got {kind!r:.80}")
    check(card, Card, str(card_file))
    if card["additive"] is not (kind == TRANSCODER):
        told = "true: a replacement is no adapter" if kind == TRANSCODER else f"false for {kind}"
        raise UserError(f"{card_file}: 'additive' must be {told}")
    check(card, TranscoderCard if kind == TRANSCODER else TunedCard, str(card_file))
    return card


def read_settings(settings: Any, source: str) -> AdapterConfig:
    """Return the configuration of transcoders, with every setting given and none unknown.

    Raises:
        UserError: names ``source``, where ``settings`` are read from, and the setting.
    """
    check(settings, AdapterSection, source)
    if unknown := sorted(settings.keys() - AdapterSection.__annotations__.keys()):
        raise UserError(f"{source}: settings in 'adapter' do not match: unknown {unknown}")
    try:
        return AdapterConfig(**settings)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_adapters(
    folder: str | os.PathLike[str],
) -> tuple[list[Callable[[], nn.Module]], dict[str, Any]]:
    """What reads each layer's adapter, layer 0 first, and the card: ``fastadapt.json``.

    For those who want one layer at a time. ``card["adapter"]`` is an :class:`AdapterConfig`, and
    ``card["metadata"]`` what was saved as such. Strict, as :func:`load_adapters` is.
    """
    path = Path(folder)
    card, card_file = _read_card(path), path / "fastadapt.json"
    if card["kind"] == TRANSCODER:
        card["adapter"] = read_settings(card["adapter"], str(card_file))
    else:
        card["adapter"] = AdapterConfig(kind=card["kind"])
        if len(card["tensors"]) != card["n_layers"]:
            raise UserError(
                f"{card_file}: tensors: expected {card['n_layers']} layers, each with the shapes "
                f"of its tensors by name, got {len(card['tensors'])}"
            )
    names = {f"layer_{i}.safetensors" for i in range(card["n_layers"])}
    found = {p.name for p in path.glob("layer_*.safetensors")}
    if names != found:
        raise UserError(
            f"{path}: layers of the adapters do not match fastadapt.json: "
            f"missing {sorted(names - found)}, unexpected {sorted(found - names)}"
        )
    files = [path / f"layer_{i}.safetensors" for i in range(card["n_layers"])]
    return [partial(_read_layer, file, i, card) for i, file in enumerate(files)], card


def read_transcoders(
    folder: str | os.PathLike[str], purpose: str
) -> tuple[list[Callable[[], TranscoderAdapter]], dict[str, Any]]:
    """:func:`read_adapters`, for a ``purpose`` that has no place for anything but transcoders.

    Raises:
        UserError: they are of another kind.
    """
    layers, card = read_adapters(folder)
    if card["kind"] != TRANSCODER:
        raise UserError(
            f"{folder}: {purpose} is for transcoder adapters; these are of kind {card['kind']!r}, "
            "which takes the place of the model's own weights"
        )
    return cast("list[Callable[[], TranscoderAdapter]]", layers), card


def _read_layer(file: Path, layer: int, card: dict[str, Any]) -> nn.Module:
    if card["kind"] != TRANSCODER:
        shapes = card["tensors"][layer]
        tensors = read_tensors(file, shapes, finite=True)
        try:
            return TUNED[card["kind"]](card["d_in"], tensors)
        except (
            KeyError,
            AttributeError,
        ) as error:  # of torch, on a name that no parameter can have
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise UserError(f"{file}: a tensor is not called as a parameter is: {reason}") from None
    adapter = TranscoderAdapter(card["d_in"], card["adapter"], d_out=card["d_out"], device="meta")
    expected = {name: tuple(t.shape) for name, t in adapter.state_dict().items()}
    adapter.load_state_dict(read_tensors(file, expected, finite=True), assign=True)
    return adapter


def load_adapters(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.ModuleList, dict[str, Any]]:
    """Read what :func:`save_adapters` wrote: the adapters, layer 0 first, and the metadata.

    Whatever their kind, which each module tells. Strict: a missing, extra or misshapen file or
    tensor is a :class:`UserError` that names it, and so is one of integers, or that holds NaN or
    infinity, which costs one pass over each tensor.
    Parameters keep the dtype of the file unless ``dtype`` is given; the running threshold of
    ``batch_topk`` keeps its own.
    """
    layers, card = read_adapters(folder)
    adapters = nn.ModuleList()
    for read in layers:
        adapter = read()
        if dtype is not None:
            for parameter in adapter.parameters():
                parameter.data = parameter.data.to(dtype)
        adapters.append(adapter.to(device))
    return adapters, card["metadata"]
