"""Read and write SAEs and transcoders of SAELens: ``cfg.json`` and ``sae_weights.safetensors``.

A folder holds one coder: ``W_enc [d_in, F]`` (the transpose of this library's), ``b_enc [F]``,
``W_dec [F, d_out]``, ``b_dec [d_out]``, and as the architecture has them ``W_skip [d_out, d_in]``
and ``threshold [F]``. A set is a folder with one such folder per layer.

SAELens runs a transcoder in place of the MLP, and in ``add_sae`` without its skip. An adapter, and
a transcoder with a skip, therefore gets a hook name that no model has. ``add_sae`` then skips the
coder and prints the name, which says to call :func:`attach`. The hooks are in
``metadata.fastadapt``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import CoderSet, fill, thresholds_of
from fastadapt.adapter.hooks import PLACES, Hooks, find_hook, name_hook
from fastadapt.adapter.sae import SAE
from fastadapt.errors import UserError
from fastadapt.interop.layer_folders import find_folders, one_shape
from fastadapt.interop.saelens_config import CONFIG, ConfigFile, check_place, empty_coder
from fastadapt.interop.saelens_splice import (
    attach,
    facts_of_pair,
    samples_of_base,
    with_model_type,
)
from fastadapt.io.atomic import save_tensors
from fastadapt.io.documents import read_json
from fastadapt.io.tensors import TensorError, open_tensors, read_tensors
from fastadapt.models.architectures import ARCHITECTURES

__all__ = ["attach", "read", "write"]

WEIGHTS = "sae_weights.safetensors"
#: Tensor of files before version 4, which SAELens drops if it holds ones.
_SCALING = "scaling_factor"
#: Version of SAELens whose files these are; an older version in a file selects an older schema.
VERSION = "6.54.12"

#: Architectures of SAEs and transcoders by activation. In ``eval()``, BatchTopK is JumpReLU.
_SAES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batch_topk": "jumprelu"}
_TRANSCODERS = {
    "relu": "transcoder",
    "jumprelu": "jumprelu_transcoder",
    "batch_topk": "jumprelu_transcoder",
}
#: Hook names that ``add_sae`` does not find, with what to do.
_GUARDS = {
    True: "{hook} (an adapter, added to the MLP: use fastadapt.interop.saelens.attach)",
    False: "{hook} (a transcoder with a skip: use fastadapt.interop.saelens.attach)",
}


# --- writing --------------------------------------------------------------------------------------


def write(coders: CoderSet, folder: Path) -> None:
    """Write a set into an existing folder: ``layer_{i}/cfg.json`` and ``sae_weights.safetensors``.

    Raises:
        UserError: SAELens has no transcoder with TopK.
        OSError, SafetensorError: the folder cannot be written.
    """
    architecture, coders = architecture_of(coders.empty), with_model_type(coders)
    pair, samples = facts_of_pair(coders), samples_of_base(coders)
    for layer, coder in coders.coders():
        path = folder / f"layer_{layer}"
        path.mkdir()
        tensors = _tensors(coder)
        save_tensors(tensors, path / WEIGHTS)
        dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
        config = _config(coders, architecture, layer) | {"dtype": dtype}
        known = {"base_mlp": samples[layer]} if layer in samples else {}
        config["metadata"]["fastadapt"] |= {**pair, **known}
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def architecture_of(coder: SparseCoder) -> str:
    """Return SAELens' name of a coder's architecture.

    Raises:
        UserError: it has none.
    """
    activation = coder.config.activation
    if isinstance(coder, SAE):
        return _SAES[activation]
    if activation not in _TRANSCODERS:
        raise UserError(
            f"SAELens has transcoders with ReLU and JumpReLU, got {activation}; export to the "
            "format circuit-tracer, which fits thresholds, or train with batch_topk"
        )
    name = _TRANSCODERS[activation]
    has_skip = getattr(coder, "W_skip", None) is not None
    return name.replace("transcoder", "skip_transcoder") if has_skip else name


def _tensors(coder: SparseCoder) -> dict[str, Tensor]:
    tensors = {
        "W_enc": coder.W_enc.detach().T.contiguous(),
        "b_enc": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.decoder_bias(),
    }
    if (skip := getattr(coder, "W_skip", None)) is not None:
        tensors["W_skip"] = skip
    if coder.threshold is not None:
        tensors["threshold"] = thresholds_of(coder)
    return tensors


def _config(coders: CoderSet, architecture: str, layer: int) -> dict[str, Any]:
    coder, hooks = coders.empty, coders.hooks
    is_transcoder = not isinstance(coder, SAE)
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.n_features,
        "device": "cpu",
        "apply_b_dec_to_input": isinstance(coder, SAE) and coder.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if is_transcoder:
        config["d_out"] = coder.d_out
    if architecture == "topk":
        config |= {"k": int(coder.config.k or 0), "rescale_acts_by_decoder_norm": False}
    reads, writes = (_names(hook, layer, coders.metadata) for hook in hooks)
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "model_name": coders.model,
        "hook_name": reads[-1],
        "model_from_pretrained_kwargs": {"fold_ln": False},
    }
    if coders.is_additive or "skip" in architecture:
        metadata["hook_name"] = _GUARDS[coders.is_additive].format(hook=reads[-1])
    if is_transcoder:
        metadata["hook_name_out"] = writes[-1]
    metadata["fastadapt"] = {
        "additive": coders.is_additive,
        "layer": layer,
        "architecture": coders.metadata.get("architecture"),
        "reads": reads,
        "writes": writes,
        "hooks": {role: dict(hook) for role, hook in hooks._asdict().items()},
        "bandwidth": coder.config.bandwidth,
        "initial_threshold": coder.config.initial_threshold,
    }
    return config | {"metadata": metadata}


def _names(hook: Mapping[str, str], layer: int, metadata: Mapping[str, Any]) -> list[str]:
    """Return the hook's names in TransformerLens; the last one is known to HookedSAETransformer.

    That class has no hook on the MLP's own output. What the block adds is the same tensor, except
    where a norm follows the MLP.
    """
    name = name_hook(hook, "transformer_lens", layer)
    if name is None:
        raise UserError(
            f"SAELens needs hooks of TransformerLens, and {dict(hook)!r:.200} has none; set "
            "hooks.*.transformer_lens in fastadapt.json"
        )
    paths = ARCHITECTURES.get(metadata.get("architecture") or "")
    if hook != PLACES["mlp_out"] or paths is None or paths.post_norm:
        return [name]
    added = name_hook(PLACES["mlp_contribution"], "transformer_lens", layer)
    return [name, str(added)]


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> CoderSet:
    """Read a folder of SAELens, or one with a folder per layer, on the CPU.

    Raises:
        UserError: the folder is none of the format, or its coders scale their input or output, have
            another architecture, or differ.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    return one_shape([_read(folder) for folder in find_folders(path, CONFIG, WEIGHTS)], path)


def _read(folder: Path) -> CoderSet:
    file = folder / CONFIG
    config: ConfigFile = read_json(file, ConfigFile)
    keys = ("model_name", "hook_name", "hook_head_index", "model_from_pretrained_kwargs")
    older: dict[str, Any] = {key: config.get(key) for key in keys}
    older["hook_name"] = older["hook_name"] or config.get("hook_point")
    if _is_old(config) and "hook_z" in (older["hook_name"] or ""):
        config.setdefault("reshape_activations", "hook_z")  # as SAELens does
    if older["hook_head_index"] is None:
        older["hook_head_index"] = config.get("hook_point_head_index")
    metadata: Any = {**older, **config.get("metadata", {})}
    facts = metadata.get("fastadapt")
    empty = empty_coder(config, facts, file)
    name = metadata.get("hook_name") or "unknown"
    _check_guard(name, facts, file)
    name_out = metadata.get("hook_name_out") or name
    hook, layer = find_hook(name, "transformer_lens")
    hooks = Hooks(hook, find_hook(name_out, "transformer_lens")[0])
    if facts is not None:
        hooks = Hooks(facts["hooks"]["input"], facts["hooks"]["output"])
    check_place(metadata, hooks, file)
    pair = ("base", "revisions", "interventions")
    known = {key: facts[key] for key in pair if facts and facts.get(key)}
    layers = {layer: partial(_read_weights, folder / WEIGHTS, empty)}
    return CoderSet(empty, layers, hooks, metadata.get("model_name"), known)


def _check_guard(name: str, facts: Mapping[str, Any] | None, file: Path) -> None:
    """Raise ``UserError`` unless ``metadata.fastadapt`` and a hook name of ours say the same.

    Without it, an adapter would be read as a transcoder, which takes the MLP's place.
    """
    recorded = None if facts is None else facts["additive"]
    for additive, guard in _GUARDS.items():
        if name.endswith(guard.removeprefix("{hook}")) and recorded is not additive:
            got = "no metadata.fastadapt" if facts is None else json.dumps(recorded)
            raise UserError(
                f"{file}: metadata.fastadapt.additive: expected {json.dumps(additive)}, as the "
                f"hook name {name!r:.160} says, got {got}; export it again"
            )


def _is_old(config: ConfigFile) -> bool:
    """Return whether a file is of a version before 6, as SAELens decides it."""
    version = config.get("sae_lens_version") or config.get("metadata", {}).get("sae_lens_version")
    return not version or int(version.partition(".")[0]) < 6


def _read_weights(file: Path, empty: SparseCoder) -> SparseCoder:
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    shapes["W_enc"] = shapes["W_enc"][::-1]
    with open_tensors(file) as tensors:
        if _SCALING in tensors.keys():  # noqa: SIM118
            shapes[_SCALING] = (empty.n_features,)
    weights = read_tensors(file, shapes, finite=True)
    factors = weights.pop(_SCALING, None)
    if factors is not None and not torch.allclose(factors, torch.ones_like(factors)):
        raise TensorError(
            f"{file}: tensor {_SCALING}: expected ones; multiply the features by it in SAELens, "
            "and save the SAE without it"
        )
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    return fill(empty, weights)
