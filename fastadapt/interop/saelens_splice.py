"""Attach coders to models of SAELens, where ``add_sae`` would compute something else.

The files say which model that is. Facts about it are read from files on this machine, without the
network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter.coder_files import CoderSet
from fastadapt.adapter.hooks import PLACES
from fastadapt.errors import UserError
from fastadapt.interop.saelens_config import CONFIG
from fastadapt.io.documents import read_json
from fastadapt.io.names import has_file
from fastadapt.io.tensors import open_tensors
from fastadapt.models.pretrained import ModelFile, stored_tensors
from fastadapt.organism import NAMES

_VALUES = 32  # of either end of a matrix
#: Attribute of a hook point with the handle of the coder's hook on it.
_ATTACHED = "_fastadapt_attached"


def attach(model: Any, coders: Iterable[Any]) -> None:
    """Attach coders that SAELens has loaded to a model, so that they compute what they do here.

    The output of an adapter is added to that of the MLP; the model must be the hybrid, the target
    with the base's MLPs, or the target itself for features that were added to it
    (``fastadapt intervene --onto-target``). Values of the MLPs are compared with those in the
    file, if it has them. The output of a transcoder, its skip included, takes the MLP's place.
    Hooks of the coders (``hook_sae_acts_post``) are called, so their features can be read and
    changed. ``model.reset_hooks(including_permanent=True)`` detaches all.

    Args:
        model: ``HookedSAETransformer``, ``SAETransformerBridge`` or ``TransformerBridge``, loaded
            without folding of norms.
        coders: SAEs and transcoders of SAELens, from files that fastadapt wrote.

    Raises:
        UserError: the file of a coder is of another origin; the model lacks a hook, has folded
            norms or other MLPs; or a coder is attached to the place already. Nothing is attached.

    Example::

        saes = [SAE.load_from_disk(f"exported/layer_{i}") for i in range(n_layers)]
        attach(model, saes)
        logits = model(tokens)
    """
    if str(getattr(getattr(model, "cfg", None), "normalization_type", "")).endswith("Pre"):
        raise UserError(
            "the weights of the norms are folded into this model, so its MLPs read another input "
            "than these SAEs or transcoders were trained on; load it with "
            "from_pretrained_no_processing"
        )
    prepared, taken = [], set()
    for coder in coders:
        facts = getattr(coder.cfg.metadata, "fastadapt", None)
        if not isinstance(facts, Mapping):
            raise UserError(
                "expected SAEs or transcoders from files that fastadapt wrote, got one without "
                "metadata.fastadapt in its cfg.json; attach it with model.add_sae"
            )
        points = [_point(model, facts[key], facts) for key in ("reads", "writes")]
        if id(points[1]) in taken or _is_attached(points[1]):
            raise UserError(
                f"an SAE or transcoder is attached to {facts['writes'][-1]} already, and a "
                "second one would count twice; detach all with "
                "model.reset_hooks(including_permanent=True)"
            )
        taken.add(id(points[1]))
        if (recorded := facts.get("base_mlp")) is not None:
            name = getattr(coder.cfg.metadata, "model_name", None)
            _check_mlp(model, recorded, facts, name)
        prepared.append((_Splice(coder, additive=facts["additive"]), *points))
    for splice, read_point, write_point in prepared:
        read_point.add_hook(splice.read, is_permanent=True)
        write_point.add_hook(splice.write, is_permanent=True)
        setattr(write_point, _ATTACHED, write_point.fwd_hooks[-1])


def _is_attached(point: Any) -> bool:
    """Return whether a coder's hook is on a hook point, and was not removed since."""
    handle = getattr(point, _ATTACHED, None)
    return handle is not None and any(handle is each for each in point.fwd_hooks)


def _check_mlp(
    model: Any, recorded: Sequence[float], facts: Mapping[str, Any], name: str | None
) -> None:
    """Raise ``UserError`` unless a layer's MLP has the recorded values, rounded as the model's."""
    weights = model.blocks[facts["layer"]].mlp.W_out.detach().T
    values = torch.tensor(sample(weights, weights.shape), dtype=torch.float64)
    exact = torch.tensor(recorded, dtype=torch.float64)
    # A model that had 16 bits before it had 32 holds the rounded values.
    for dtype in (weights.dtype, torch.bfloat16, torch.float16):
        if torch.equal(exact.to(dtype).double(), values):
            return
    raise UserError(
        f"the MLP of layer {facts['layer']} is not that of {facts['base']}, to whose output these "
        f"adapters are added. {recipe(facts, name)}"
    )


def recipe(facts: Mapping[str, Any], name: str | None = None) -> str:
    """Return how the model is loaded to which adapters are attached.

    Args:
        facts: ``metadata.fastadapt`` of a file.
        name: name of the target; ``TARGET`` if it is not known.
    """
    base, revisions = facts.get("base"), facts.get("revisions") or {}
    target = "TARGET" if name is None else _model(name, revisions.get("target"))
    lines = [f"target = {target}"]
    if base is not None and base == name:
        text = "Attach to the target itself, with its own MLPs:"
    else:
        text = "Attach to the hybrid, the target with the base's MLPs:"
        lines.append(f"base = {'BASE' if base is None else _model(base, revisions.get('base'))}")
        lines.append(
            "for block, other in zip(target.model.layers, base.model.layers): block.mlp = other.mlp"
        )
    lines.append(
        "model = HookedSAETransformer.from_pretrained_no_processing(NAME, hf_model=target)"
    )
    return "\n  ".join([text, *lines])


def notes(folder: Path) -> list[str]:
    """Return what a user of an export must know: to which model it is attached, and what it lacks.

    Args:
        folder: the folder of a layer.
    """
    metadata = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["metadata"]
    facts, name = metadata["fastadapt"], metadata["model_name"]
    lines = []
    if facts["additive"]:
        lines.append(recipe(facts, name))
        if "base_mlp" not in facts:
            lines.append(
                "The base's weights were not read, as they are not on this machine or the source "
                "names no base: attach cannot check that the model has the base's MLPs."
            )
    if facts["architecture"] is None and facts["hooks"]["output"] == PLACES["mlp_out"]:
        lines.append(
            "The target's config.json is not on this machine (--target FOLDER names it): without "
            "its architecture the files name a hook that SAETransformerBridge has, and "
            "HookedSAETransformer does not."
        )
    return lines


def _model(name: str, revision: str | None) -> str:
    source = NAMES.get(name, name)
    at_commit = "" if revision is None else f", revision={revision!r}"
    return f"AutoModelForCausalLM.from_pretrained({str(source)!r}{at_commit})"


def _point(model: Any, names: Sequence[str], facts: Mapping[str, Any]) -> Any:
    """Return the hook point of a model that has one of the names."""
    for name in names:
        if name in model.hook_dict:
            return model.hook_dict[name]
    expected = "HookedSAETransformer or SAETransformerBridge"
    if facts.get("architecture") is None:
        expected = (
            "SAETransformerBridge, or export again where the target's config.json can be read "
            "(fastadapt export --target FOLDER): the files do not say its architecture, and so "
            "not whether a norm follows the MLP"
        )
    raise UserError(f"the model has no hook {' or '.join(names)}; load it as {expected}")


class _Splice:
    """Two hooks that share the input of one coder."""

    def __init__(self, coder: Any, *, additive: bool) -> None:
        self.coder, self.additive = coder, additive
        self.input: Tensor | None = None

    def read(self, tensor: Tensor, hook: Any) -> Tensor:
        self.input = tensor
        return tensor

    def write(self, tensor: Tensor, hook: Any) -> Tensor:
        assert self.input is not None
        out: Tensor = self.coder(self.input)
        self.input = None
        return tensor + out if self.additive else out


# --- facts about the models ----------------------------------------------------------------------


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model that is on this machine, or in the hub's cache; else None.

    Example:
        >>> local_folder("organism/base").name
        'base'
        >>> local_folder("no/such-model-anywhere") is None
        True
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(NAMES.get(name, name))
    if folder.is_dir():
        return folder
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub id, such as a name of TransformerLens
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
