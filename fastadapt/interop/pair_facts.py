"""Read facts about the models of a set from files on this machine, without the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter.coder_files import CoderSet
from fastadapt.errors import UserError
from fastadapt.io.documents import read_json
from fastadapt.io.names import has_file
from fastadapt.io.tensors import open_tensors
from fastadapt.models.pretrained import ModelFile, stored_tensors
from fastadapt.organism import NAMES

_VALUES = 32  # of either end of a matrix


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model that is on this machine, or in the hub's cache; else None.

    Example:
        >>> local_folder("organism/base").name
        'base'
        >>> local_folder("no/such-model-anywhere") is None
        True
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(NAMES.get(name, name))
    if folder.is_dir():
        return folder
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no hub id, such as a name of TransformerLens
        return None
    return Path(file).parent if isinstance(file, str) else None


def model_type_of(name: str, revision: str | None = None) -> str | None:
    """Return ``model_type`` of a model's text model; None if the model is not on this machine.

    Raises:
        DocumentError: its ``config.json`` is damaged.

    Example:
        >>> model_type_of("organism/target")
        'qwen2'
    """
    folder = local_folder(name, revision)
    if folder is None or not has_file(folder / "config.json"):
        return None
    config: dict[str, Any] = read_json(folder / "config.json", ModelFile, constants=True)
    text = config.get("text_config") or {}
    kind: str | None = text.get("model_type") or config.get("model_type")
    return kind


def sample(down: Any, shape: Iterable[int]) -> list[float]:
    """Return values of the last matrix ``[d, d_mlp]`` of an MLP, which identify the MLP.

    Args:
        down: a tensor, or a slice of safetensors.
        shape: its shape.
    """
    rows, columns = shape
    first: Tensor = down[0:1, 0 : min(columns, _VALUES)]
    last: Tensor = down[rows - 1 : rows, max(0, columns - _VALUES) : columns]
    return [float(value) for value in torch.cat([first, last], 1)[0]]


def mlp_samples(
    name: str, revision: str | None, layers: Iterable[int]
) -> dict[int, list[float]] | None:
    """Return the :func:`sample` of every layer's MLP; None if the weights cannot be read here.

    Example:
        >>> samples = mlp_samples("organism/base", None, [0, 3])
        >>> list(samples), len(samples[3])
        ([0, 3], 64)
    """
    folder = local_folder(name, revision)
    if folder is None:
        return None
    samples = {}
    try:
        places = stored_tensors(str(folder), None)
        for layer in layers:
            place = places.get(f"model.layers.{layer}.mlp.down_proj.weight")
            if place is None:
                return None
            with open_tensors(place.file) as tensors:
                down = tensors.get_slice(place.name)
                samples[layer] = sample(down, down.get_shape())
    except UserError:  # no weights, or such as this library does not read
        return None
    return samples


def with_model_type(coders: CoderSet) -> CoderSet:
    """Return a set that names the model's architecture, if it is recorded or on this machine."""
    if coders.metadata.get("architecture") or coders.model is None:
        return coders
    kind = model_type_of(coders.model, _revision(coders, "target"))
    return replace(coders, metadata={**coders.metadata, "architecture": kind})


def facts_of_pair(coders: CoderSet) -> dict[str, Any]:
    """Return base, commits and later changes of adapters; ``{}`` of other coders.

    Adapters of the base's MLPs and those for the target's own differ in their base alone.
    """
    if not coders.is_additive:
        return {}
    steps = coders.metadata.get("interventions") or []
    keys = ("kind", "set", "adapter", "scale")
    return {
        "base": _base(coders),
        "revisions": {role: _revision(coders, role) for role in ("target", "base")},
        "interventions": [{k: step[k] for k in keys if k in step} for step in steps],
    }


def samples_of_base(coders: CoderSet) -> dict[int, list[float]]:
    """Return the :func:`mlp_samples` of the base of adapters; ``{}`` if it cannot be read here."""
    base = _base(coders)
    if not coders.is_additive or base is None:
        return {}
    return mlp_samples(base, _revision(coders, "base"), coders.layers) or {}


def _base(coders: CoderSet) -> str | None:
    """Return the base's name: that of the target, also a new one, for adapters of its own MLPs."""
    base: str | None = coders.metadata.get("base")
    return coders.model if base is not None and base == coders.metadata.get("target") else base


def _revision(coders: CoderSet, role: str) -> str | None:
    """Return the recorded commit of a model, unless another name was given for the model."""
    name = coders.model if role == "target" else _base(coders)
    revision: str | None = (coders.metadata.get("revisions") or {}).get(role)
    return revision if name == coders.metadata.get(role) else None
