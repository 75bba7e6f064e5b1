"""Read and write transcoder sets of circuit-tracer: ``config.yaml`` and ``layer_{i}.safetensors``.

The layout is one transcoder per layer, all of one size. A file holds ``W_enc [F, D]``,
``W_dec [F, D]``, ``b_enc [F]``, ``b_dec [D]``, and may hold ``W_skip [D, D]`` and
``activation_function.threshold [F]`` (JumpReLU); without a threshold the activation is ReLU. The
input is that of the MLP, after the norm and its weight; the output is that of the MLP, before any
norm behind it.

circuit-tracer runs a transcoder in place of the MLP. The base's MLP is not linear, so no ``W_skip``
can hold it: adapters are refused. Its loader of local folders runs TopK silently as ReLU,
so TopK is refused too; :mod:`fastadapt.interop.thresholds` fits thresholds in its place.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import TypedDict

from fastadapt.adapter.coder import SparseCoder
from fastadapt.adapter.coder_files import JUMPRELU, CoderSet, fill, thresholds_of
from fastadapt.adapter.hooks import MLP_HOOKS
from fastadapt.adapter.module import AdapterConfig
from fastadapt.adapter.sae import SAE
from fastadapt.adapter.sae import Transcoder as Module
from fastadapt.errors import UserError
from fastadapt.graphs.linear.overlay import Transcoder, TranscoderSet
from fastadapt.io.atomic import save_tensors
from fastadapt.io.documents import Name, read_yaml
from fastadapt.io.names import typed_path
from fastadapt.io.tensors import TensorError, open_tensors, read_tensors

__all__ = ["read", "write"]

CONFIG = "config.yaml"
#: Hooks of the format, as TransformerLens names them, and what they must be.
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
_THRESHOLD = "activation_function.threshold"
_FILE = re.compile(r"layer_(\d{1,5})\.safetensors")


class SetFile(TypedDict, total=False):
    """Schema of the keys of ``config.yaml`` that are read."""

    model_kind: str
    model_name: Name
    feature_input_hook: str
    feature_output_hook: str
    activation: str


# --- writing --------------------------------------------------------------------------------------


def write(coders: CoderSet, folder: Path) -> None:
    """Write a set of transcoders of a model's MLPs into an existing folder.

    Raises:
        UserError: the coders are adapters or SAEs, have TopK, or do not read and write the MLPs of
            layers 0, 1, ..., at equal widths.
        OSError, SafetensorError: the folder cannot be written.
    """
    check_writable(coders)
    for layer, coder in coders.coders():
        tensors = {
            "W_enc": coder.W_enc,
            "b_enc": coder.b_enc,
            "W_dec": coder.W_dec,
            "b_dec": coder.decoder_bias(),
        }
        if (skip := getattr(coder, "W_skip", None)) is not None:
            tensors["W_skip"] = skip
        if coder.threshold is not None:
            # At least 0, as which this library reads lower ones.
            tensors[_THRESHOLD] = thresholds_of(coder).clamp(min=0)
        save_tensors(tensors, folder / f"layer_{layer}.safetensors")
    config: dict[str, str] = {"model_kind": "transcoder_set", **HOOKS}
    if coders.model is not None:
        config["model_name"] = coders.model
    config["activation"] = "relu" if coders.empty.threshold is None else "jump_relu"
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def check_writable(coders: CoderSet) -> None:
    """Raise ``UserError`` unless circuit-tracer computes the same from the files."""
    coder = coders.empty
    if coders.is_additive:
        raise UserError(
            "circuit-tracer would run these adapters in place of the MLPs that they are added to: "
            "its transcoders have a linear skip only, and the base's MLP is not linear. Make the "
            "graph here (fastadapt graph RUN) and export it (fastadapt graph export --format "
            "circuit-tracer), or train with adapter.base_mlp=false"
        )
    if isinstance(coder, SAE):
        raise UserError(
            "circuit-tracer needs transcoders of MLPs, got SAEs; export to the format saelens"
        )
    if coder.config.activation == "topk":
        raise UserError(
            "circuit-tracer runs TopK transcoders of a local folder as ReLU, silently. Fit "
            "thresholds on the texts of collected features (fastadapt export SET --format "
            "circuit-tracer --store RUN), or train with batch_topk"
        )
    layers = list(coders.layers)
    if layers != list(range(len(layers))) or coders.hooks != MLP_HOOKS:
        raise UserError(
            "circuit-tracer needs a transcoder of the MLP of every layer from 0 on, got layers "
            f"{', '.join(map(str, layers[:5]))} from {dict(coders.hooks.input)!r:.100} to "
            f"{dict(coders.hooks.output)!r:.100}; export to the format saelens"
        )
    if coder.d_in != coder.d_out:
        raise UserError(
            f"circuit-tracer needs equal widths of input and output, got d_in={coder.d_in} and "
            f"d_out={coder.d_out}; export to the format saelens"
        )


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> CoderSet:
    """Read a set from a local folder as a set of this library's transcoders, on the CPU.

    Raises:
        UserError: the folder is none of the format, holds transcoders of another kind, or lacks a
            layer.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    settings, files = _open(path, str(path))
    shapes = _shapes(files[0], *_size(files[0]))
    features, width = shapes["W_enc"]
    jumps = _THRESHOLD in shapes
    config = AdapterConfig(features, "jumprelu", **JUMPRELU) if jumps else AdapterConfig(features)
    empty = Module(width, config, skip="W_skip" in shapes, device="meta")
    layers = {i: partial(_read_module, file, shapes, empty) for i, file in enumerate(files)}
    return CoderSet(empty, layers, MLP_HOOKS, settings.get("model_name"))


def _read_module(file: Path, shapes: dict[str, tuple[int, ...]], empty: SparseCoder) -> SparseCoder:
    weights = read_tensors(file, shapes, finite=True)
    if (thresholds := weights.pop(_THRESHOLD, None)) is not None:
        if bool((thresholds < 0).any()):
            raise TensorError(
                f"{file}: tensor {_THRESHOLD}: expected thresholds of at least 0, got "
                f"{float(thresholds.min()):.3g}, above which negative values pass"
            )
        weights["threshold"] = thresholds
    return fill(empty, weights)


def read_transcoder_set(path: str | os.PathLike[str]) -> TranscoderSet:
    """Read a set from a local folder, on the CPU and in the files' dtype.

    Raises:
        UserError: the folder is none of the format, holds transcoders of another kind, or lacks a
            layer.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    folder = typed_path(path, "--base_set")
    settings, files = _open(folder, "--base_set")
    size = _size(files[0])
    layers = [_read_layer(file, size) for file in files]
    return TranscoderSet(str(folder), settings.get("model_name", "unnamed"), layers)


def _open(folder: Path, source: str) -> tuple[SetFile, list[Path]]:
    """Return the contents of ``config.yaml``, and the files of the layers in order."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{source}: expected a folder with {CONFIG} and layer_0.safetensors, a transcoder "
            f"set of circuit-tracer, got {folder}; download the set's repository into a folder"
        )
    settings: SetFile = read_yaml(folder / CONFIG, SetFile)
    _check_kind(settings, folder / CONFIG)
    files = {int(m[1]): file for file in folder.iterdir() if (m := _FILE.fullmatch(file.name))}
    missing = sorted(set(range(max(files, default=0) + 1)) - files.keys())
    if missing:
        raise UserError(f"{folder}: layer_{missing[0]}.safetensors is missing")
    return settings, [files[i] for i in range(len(files))]


def _check_kind(settings: Any, file: Path) -> None:
    kind = settings.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise UserError(
            f"{file}: expected model_kind transcoder_set, a transcoder per layer, got {kind!r:.80}"
        )
    for key, expected in HOOKS.items():
        if (hook := settings.get(key, expected)) != expected:
            raise UserError(
                f"{file}: expected {key} {expected}, a transcoder of the MLP itself, got "
                f"{hook!r:.80}"
            )
    activation = settings.get("activation", "relu")
    if activation not in ("relu", "jump_relu", "jumprelu"):
        raise UserError(
            f"{file}: expected transcoders with ReLU or JumpReLU, got activation {activation!r:.80}"
        )


def _size(file: Path) -> tuple[int, int]:
    with open_tensors(file) as tensors:
        names = set(tensors.keys())
        if "W_enc" not in names or len(shape := tensors.get_slice("W_enc").get_shape()) != 2:
            raise UserError(
                f"{file}: expected a tensor W_enc [features, width], got {sorted(names)}"
            )
    return shape[0], shape[1]


def _shapes(file: Path, F: int, D: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors of a file must have."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (F, D),
        "b_enc": (F,),
        "W_dec": (F, D),
        "b_dec": (D,),
    }
    with open_tensors(file) as tensors:
        names = set(tensors.keys())
    optional: dict[str, tuple[int, ...]] = {"W_skip": (D, D), _THRESHOLD: (F,)}
    return shapes | {name: size for name, size in optional.items() if name in names}


def _read_layer(file: Path, shape: tuple[int, int]) -> Transcoder:
    read = read_tensors(file, _shapes(file, *shape), finite=True)
    return Transcoder(
        read["W_enc"],
        read["b_enc"],
        read["W_dec"],
        read["b_dec"],
        read.get("W_skip"),
        read.get(_THRESHOLD),
    )
