"""A folder of adapters: ``fastadapt.json`` and ``layer_{i}.safetensors``, read strictly.

Its ``kind`` is ``transcoder_adapter``, which is additive, or ``mlp`` or ``norms``: weights that
take the place of the model's own (:mod:`fastadapt.tuned`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastadapt.adapter import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.io.atomic import save_tensors, writing_folder
from fastadapt.tuned import TUNED, TunedWeights

SCHEMA_VERSION = 1
TRANSCODER = "transcoder_adapter"
KINDS = (TRANSCODER, *TUNED)
CARD = "fastadapt.json"
#: Names of the files of adapters.
PATTERNS = (CARD, "layer_*.safetensors")


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
    folder = Path(source).expanduser()
    if (folder / "fastadapt.json").is_file():
        return folder
    if (folder / "adapter" / "fastadapt.json").is_file():
        return folder / "adapter"
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: this run is not finished: it has no adapter/ yet")
    raise UserError(f"{source}: expected a run or a folder of adapters with fastadapt.json")


def _read_card(path: Path) -> dict[str, Any]:
    card_file = path / "fastadapt.json"
    if not card_file.is_file():
        raise UserError(f"{path} holds no adapters: fastadapt.json is missing")
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{card_file} is not JSON: {e}") from e
    if not isinstance(card, dict):
        raise UserError(f"{card_file} must hold an object, got {type(card).__name__}")
    version = card.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{card_file}: schema_version is {version!r}, this fastadapt reads {SCHEMA_VERSION}"
        )
    kind = card.get("kind")
    if kind not in KINDS:
        raise UserError(f"{card_file}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if card.get("additive") is not (kind == TRANSCODER):
        told = "true: a replacement is no adapter" if kind == TRANSCODER else f"false for {kind}"
        raise UserError(f"{card_file}: 'additive' must be {told}")
    for key in ("n_layers", "d_in", "d_out"):
        value = card.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{card_file}: {key} must be a positive integer, got {value!r}")
    if not isinstance(card.get("metadata"), dict):
        raise UserError(f"{card_file}: metadata must be an object, got {card.get('metadata')!r}")
    return card


def _read_config(settings: Any, card_file: Path) -> AdapterConfig:
    """The adapters' configuration: every setting there, none unknown, each of its type."""
    known = {f.name for f in fields(AdapterConfig)} - {"kind"}
    given = set(settings) if isinstance(settings, dict) else set()
    if given != known:
        raise UserError(
            f"{card_file}: settings in 'adapter' do not match: "
            f"missing {sorted(known - given)}, unknown {sorted(given - known)}"
        )
    kinds: dict[str, Any] = {"n_features": int, "activation": str, "implementation": str}
    for name, value in settings.items():
        kind = kinds.get(name, (int, float, type(None)))
        if isinstance(value, bool) or not isinstance(value, kind):
            wanted = getattr(kind, "__name__", "number or null")
            raise UserError(f"{card_file}: adapter.{name}: expected {wanted}, got {value!r}")
    return AdapterConfig(**settings)


def _read_shapes(shapes: Any, n_layers: int, card_file: Path) -> list[dict[str, tuple[int, ...]]]:
    """Of the tensors of every layer, by name."""
    try:
        read = [{name: tuple(shape) for name, shape in layer.items()} for layer in shapes]
    except (TypeError, AttributeError):
        read = []
    if len(read) != n_layers:
        raise UserError(
            f"{card_file}: tensors: expected {n_layers} layers, each with the shapes of its "
            "tensors by name"
        )
    return read


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
        card["adapter"] = _read_config(card.get("adapter"), card_file)
    else:
        card["adapter"] = AdapterConfig(kind=card["kind"])
        card["tensors"] = _read_shapes(card.get("tensors"), card["n_layers"], card_file)
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} cannot be read: {e}") from e
    adapter: TranscoderAdapter | None = None
    if card["kind"] == TRANSCODER:
        adapter = TranscoderAdapter(
            card["d_in"], card["adapter"], d_out=card["d_out"], device="meta"
        )
        expected = {name: tuple(t.shape) for name, t in adapter.state_dict().items()}
    else:
        expected = card["tensors"][layer]
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"{file}: tensor {name}: expected {expected.get(name, 'none')}, "
                f"got {shapes.get(name, 'none')}"
            )
        if not tensors[name].is_floating_point():
            raise UserError(f"{file}: tensor {name}: expected floating, got integers")
    if adapter is None:
        return TUNED[card["kind"]](card["d_in"], tensors)
    adapter.load_state_dict(tensors, assign=True)
    return adapter


def load_adapters(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.ModuleList, dict[str, Any]]:
    """Read what :func:`save_adapters` wrote: the adapters, layer 0 first, and the metadata.

    Whatever their kind, which each module tells. Strict: a missing, extra or misshapen file or
    tensor is a :class:`UserError` that names it.
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
