"""Read a transcoder set of circuit-tracer: ``config.yaml`` and ``layer_{i}.safetensors``.

The layout is one transcoder per layer, all of one size. A file holds ``W_enc [F, D]``,
``W_dec [F, D]``, ``b_enc [F]``, ``b_dec [D]``, and may hold ``W_skip [D, D]`` and
``activation_function.threshold [F]`` (JumpReLU); without a threshold the activation is ReLU. The
input is that of the MLP, after the norm and its weight; the output is that of the MLP, before any
norm behind it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.graphs.linear.overlay import Transcoder, TranscoderSet
from fastadapt.io.documents import Name, read_yaml
from fastadapt.io.names import typed_path
from fastadapt.io.tensors import open_tensors, read_tensors

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


def read_transcoder_set(path: str | os.PathLike[str]) -> TranscoderSet:
    """Read a set from a local folder, on the CPU and in the files' dtype.

    Raises:
        UserError: the folder is none of the format, holds transcoders of another kind, or lacks a
            layer.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    folder = typed_path(path, "--base_set")
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"--base_set: expected a folder with {CONFIG} and layer_0.safetensors, a transcoder "
            f"set of circuit-tracer, got {folder}; download the set's repository into a folder"
        )
    settings = read_yaml(folder / CONFIG, SetFile)
    _check_kind(settings, folder / CONFIG)
    files = {int(m[1]): file for file in folder.iterdir() if (m := _FILE.fullmatch(file.name))}
    missing = sorted(set(range(max(files, default=0) + 1)) - files.keys())
    if missing:
        raise UserError(f"{folder}: layer_{missing[0]}.safetensors is missing")
    shape = _shape(files[0])
    layers = [_read_layer(files[i], shape) for i in range(len(files))]
    return TranscoderSet(str(folder), settings.get("model_name", "unnamed"), layers)


def _check_kind(settings: Any, file: Path) -> None:
    kind = settings.get("model_kind", "transcoder_set")
    if kind != "transcoder_set":
        raise UserError(
            f"{file}: expected model_kind transcoder_set, a transcoder per layer, got {kind!r}"
        )
    for key, expected in HOOKS.items():
        if (hook := settings.get(key, expected)) != expected:
            raise UserError(
                f"{file}: expected {key} {expected}, a transcoder of the MLP itself, got {hook!r}"
            )
    activation = settings.get("activation", "relu")
    if activation not in ("relu", "jump_relu", "jumprelu"):
        raise UserError(
            f"{file}: expected transcoders with ReLU or JumpReLU, got activation {activation!r}"
        )


def _shape(file: Path) -> tuple[int, int]:
    with open_tensors(file) as tensors:
        names = set(tensors.keys())
        if "W_enc" not in names or len(shape := tensors.get_slice("W_enc").get_shape()) != 2:
            raise UserError(
                f"{file}: expected a tensor W_enc [features, width], got {sorted(names)}"
            )
    return shape[0], shape[1]


def _read_layer(file: Path, shape: tuple[int, int]) -> Transcoder:
    F, D = shape
    shapes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    with open_tensors(file) as tensors:
        names = set(tensors.keys())
    optional = {"W_skip": (D, D), _THRESHOLD: (F,)}
    shapes |= {name: size for name, size in optional.items() if name in names}
    read = read_tensors(file, shapes, finite=True)
    return Transcoder(
        read["W_enc"],
        read["b_enc"],
        read["W_dec"],
        read["b_dec"],
        read.get("W_skip"),
        read.get(_THRESHOLD),
    )
