"""Read and write SAEs and transcoders of sparsify (``eai-sparsify``): a folder per module.

The folder of a module, such as ``layers.3.mlp``, holds ``cfg.json`` and ``sae.safetensors`` with
``encoder.weight [F, d]``, ``encoder.bias [F]``, ``W_dec [F, d]``, ``b_dec [d]`` and, with a skip,
``W_skip [d, d]``; the orientation is this library's. The activation is TopK after a ReLU, so ReLU
is TopK with k = F. An SAE (``transcode`` false) reads ``x - b_dec``, a transcoder reads x.

sparsify runs a transcoder in place of its module and ignores keys that it does not know. The base's
MLP is not linear, so no ``W_skip`` can hold it: adapters are refused.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import CoderSet, fill
from fastadapt.adapter.files import MAX_FEATURES, MAX_WIDTH
from fastadapt.adapter.hooks import Hooks, find_hook, name_hook
from fastadapt.adapter.module import AdapterConfig
from fastadapt.adapter.sae import SAE, Transcoder
from fastadapt.errors import UserError
from fastadapt.interop.layer_folders import find_folders, one_shape
from fastadapt.io.atomic import save_tensors
from fastadapt.io.documents import Count, Positive, read_json
from fastadapt.io.names import check_name
from fastadapt.io.tensors import open_tensors, read_tensors

__all__ = ["read", "write"]

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
#: Names of the tensors of a file, by this library's names.
NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
#: First part of a module's path in a causal language model, which a name of sparsify omits.
_DECODER = "model."


# --- writing --------------------------------------------------------------------------------------


def write(coders: CoderSet, folder: Path) -> None:
    """Write a set into an existing folder, a folder per layer that is named after the module.

    Raises:
        UserError: the coders are adapters, have another activation than ReLU and TopK, or widths or
            places that the format does not have.
        OSError, SafetensorError: the folder cannot be written.
    """
    check_writable(coders)
    config = _config(coders.empty)
    names = [_module_name(coders.hooks, layer) for layer in coders.layers]
    if len(set(names)) < len(names):
        raise UserError(
            "sparsify needs a module for each layer, and layers "
            f"{', '.join(map(str, coders.layers))} are all of {names[0]!r:.80}: "
            "hooks.output.huggingface has no {layer}"
        )
    for layer, coder in coders.coders():
        path = folder / _module_name(coders.hooks, layer)
        path.mkdir()
        tensors: dict[str, Tensor] = {NAMES[n]: tensor for n, tensor in coder.named_parameters()}
        tensors.setdefault("b_dec", coder.decoder_bias())
        save_tensors(tensors, path / WEIGHTS)
        (path / CONFIG).write_text(json.dumps(config) + "\n", encoding="utf-8")


def check_writable(coders: CoderSet) -> None:
    """Raise ``UserError`` unless sparsify computes the same from the files as this library."""
    coder = coders.empty
    if coders.is_additive:
        raise UserError(
            "sparsify would run these adapters in place of the MLPs that they are added to: its "
            "transcoders have a linear skip only, and the base's MLP is not linear. Export to the "
            "format saelens, whose files come with a function that adds them, or train with "
            "adapter.base_mlp=false"
        )
    if coder.config.activation not in ("relu", "topk"):
        raise UserError(
            f"sparsify has TopK and ReLU, got {coder.config.activation}; export to the "
            "format saelens"
        )
    if coder.d_in != coder.d_out:
        raise UserError(
            f"sparsify needs equal widths of input and output, got d_in={coder.d_in} and "
            f"d_out={coder.d_out}; export to the format saelens"
        )
    if isinstance(coder, SAE) and not coder.subtract_b_dec:
        raise UserError(
            "sparsify always subtracts b_dec from the input of an SAE, and this SAE does not "
            "(subtract_b_dec is false); export to the format saelens"
        )


def _config(coder: SparseCoder) -> dict[str, Any]:
    features, k = coder.n_features, coder.config.k
    return {
        "activation": "topk",
        "expansion_factor": max(1, features // coder.d_in),  # not read beside num_latents
        "normalize_decoder": False,
        "num_latents": features,
        "k": features if k is None else int(k),
        "multi_topk": False,
        "skip_connection": getattr(coder, "W_skip", None) is not None,
        "transcode": not isinstance(coder, SAE),
        "d_in": coder.d_in,
    }


def _module_name(hooks: Hooks, layer: int) -> str:
    """Return the name of the module whose input and output, or output alone, the hooks are."""
    read, written = (name_hook(hook, "huggingface", layer) or "" for hook in hooks)
    module = written.removesuffix(".output")
    if module == written or read not in (written, f"{module}.input"):
        raise UserError(
            f"sparsify needs the output of a module, or its input and output; got the hooks "
            f"{read or dict(hooks.input)} and {written or dict(hooks.output)}; export to the "
            "format saelens"
        )
    return check_name(module.removeprefix(_DECODER), "hooks.output.huggingface")


# --- reading --------------------------------------------------------------------------------------


class ConfigFile(TypedDict):
    """Keys of ``cfg.json`` that are read."""

    d_in: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]
    activation: NotRequired[str]
    expansion_factor: NotRequired[Annotated[int, msgspec.Meta(ge=1, le=MAX_FEATURES)]]
    num_latents: NotRequired[Annotated[int, msgspec.Meta(ge=0, le=MAX_FEATURES)]]
    k: NotRequired[Positive]
    skip_connection: NotRequired[bool]
    transcode: NotRequired[bool]
    embed_skip: NotRequired[bool]
    gram_lookup: NotRequired[bool]
    lookup_max_order: NotRequired[Count]
    signed: NotRequired[bool]


#: Further keys, of training, that do not change what a coder computes.
_TRAINING = {"normalize_decoder", "multi_topk"}


def read(path: Path) -> CoderSet:
    """Read the folder of a module, or one with a folder per layer, on the CPU.

    Raises:
        UserError: the folder is none of the format, or its coders differ or compute more than
            an SAE or a transcoder.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    return one_shape([_read(folder) for folder in find_folders(path, CONFIG, WEIGHTS)], path)


def _read(folder: Path) -> CoderSet:
    file = folder / CONFIG
    config: ConfigFile = read_json(file, ConfigFile)
    known = ConfigFile.__annotations__.keys() | _TRAINING
    if unknown := sorted(config.keys() - known):
        raise UserError(
            f"{file}: expected the keys {', '.join(sorted(known))}, got {unknown!r:.200}, which "
            "may change what is computed; delete them if they do not"
        )
    empty = _empty(config, file)
    with open_tensors(folder / WEIGHTS) as tensors:
        has_skip = "W_skip" in tensors.keys()  # noqa: SIM118
    if has_skip != config.get("skip_connection", False):
        raise UserError(
            f"{file}: skip_connection: expected {str(has_skip).lower()}, since {WEIGHTS} has "
            f"{'a' if has_skip else 'no'} tensor W_skip"
        )
    hook, layer = find_hook(f"{_DECODER}{folder.resolve().name}.output", "huggingface")
    read_hook = hook
    if not isinstance(empty, SAE):
        name = f"{_DECODER}{folder.resolve().name}.input"
        read_hook, layer = find_hook(name, "huggingface")
    layers = {layer: partial(_read_weights, folder / WEIGHTS, empty)}
    return CoderSet(empty, layers, Hooks(read_hook, hook))


def _empty(config: ConfigFile, file: Path) -> SparseCoder:
    """Return a module on the meta device for the coder that ``cfg.json`` describes."""
    if (activation := config.get("activation", "topk")) != "topk":
        raise UserError(f"{file}: activation: expected topk, got {activation!r:.80}")
    if config.get("signed", False):
        raise UserError(
            f"{file}: signed: expected false, got true: TopK by absolute value, which this library "
            "does not have"
        )
    for key in ("embed_skip", "gram_lookup"):
        if config.get(key, False):
            raise UserError(
                f"{file}: {key}: expected false, got true: it needs more than its input"
            )
    d = config["d_in"]
    features = config.get("num_latents", 0) or d * config.get("expansion_factor", 32)
    k = config.get("k", 32)
    if features > MAX_FEATURES:
        raise UserError(
            f"{file}: expansion_factor: expected at most {MAX_FEATURES:,} latents, got {features:,}"
        )
    if k > features:
        raise UserError(f"{file}: k: expected 1 to num_latents={features}, got {k}")
    settings = AdapterConfig(features) if k == features else AdapterConfig(features, "topk", k=k)
    skip = config.get("skip_connection", False)
    if config.get("transcode", False):
        return Transcoder(d, settings, skip=skip, device="meta")
    if skip:
        raise UserError(
            f"{file}: skip_connection: expected false for an SAE (transcode false), got true"
        )
    return SAE(d, settings, subtract_b_dec=True, device="meta")


def _read_weights(file: Path, empty: SparseCoder) -> SparseCoder:
    shapes = {NAMES[name]: tuple(tensor.shape) for name, tensor in empty.named_parameters()}
    weights = read_tensors(file, shapes, finite=True)
    return fill(empty, {ours: weights[name] for ours, name in NAMES.items() if name in weights})
