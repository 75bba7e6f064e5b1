"""Read cross-layer transcoders of circuit-tracer: ``W_enc_{i}`` and ``W_dec_{i}.safetensors``.

A feature of layer i reads the residual stream of that layer, and writes to the MLP outputs of
layers i, i+1, ..., with a decoder row for each. ``W_enc_{i}`` holds ``W_enc_{i} [F, D]``,
``b_enc_{i} [F]``, ``b_dec_{i} [D]``, and may hold ``threshold_{i} [F]`` (JumpReLU; ReLU without)
and ``W_skip_{i} [D, D]``. Unlike in sets of one transcoder per layer, the skip of an input x is ``x
@ W_skip``. ``W_dec_{i}`` holds ``W_dec_{i} [F, L-i, D]``.

F features, D width, L layers, T tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from fastadapt.adapter.files import MAX_LAYERS
from fastadapt.errors import UserError
from fastadapt.interop.transcoder_sets import CONFIG
from fastadapt.io.documents import Name, read_yaml
from fastadapt.io.names import has_file, typed_path
from fastadapt.io.tensors import open_tensors, read_tensors

__all__ = ["CrossLayer", "CrossLayerSet", "read_cross_layer_set"]

KIND = "cross_layer_transcoder"
_FILE = re.compile(r"W_enc_(\d{1,5})\.safetensors")


class CrossLayerFile(TypedDict, total=False):
    """Schema of the keys of ``config.yaml`` that are read."""

    model_kind: str
    model_name: Name
    feature_input_hook: Name
    feature_output_hook: Name


class CrossLayer(NamedTuple):
    """Features of one layer, and the bias and skip of the MLP output of that layer."""

    W_enc: Tensor  #: [F, D]
    b_enc: Tensor  #: [F]
    W_dec: Tensor  #: [F, L-i, D]
    b_dec: Tensor  #: [D]
    threshold: Tensor | None = None  #: [F]
    W_skip: Tensor | None = None  #: [D, D]; the skip of x is ``x @ W_skip``


@dataclass(frozen=True)
class CrossLayerSet:
    """A cross-layer transcoder of one model.

    Attributes:
        model: the model that the set names; None if it names none.
        input_hook, output_hook: hooks that it reads and writes, in a block of TransformerLens.
        layers: the weights of each layer.
    """

    model: str | None
    input_hook: str
    output_hook: str
    layers: list[CrossLayer]

    @torch.no_grad()
    def encode(self, layer: int, x: Tensor) -> Tensor:
        """Return the activations ``[T, F]`` of one layer's features on its input ``x [T, D]``."""
        weights = self.layers[layer]
        z = torch.addmm(weights.b_enc, x, weights.W_enc.T)
        least = 0 if weights.threshold is None else weights.threshold
        return torch.where(z > least, z, 0)

    @torch.no_grad()
    def decode(self, activations: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the MLP output ``[T, D]`` of every layer.

        Args:
            activations: ``[T, F]`` of every layer.
            inputs: ``[T, D]`` of every layer, which only the skips read.
        """
        outputs = []
        for layer, weights in enumerate(self.layers):
            out = weights.b_dec.expand_as(inputs[layer]).clone()
            for source in range(layer + 1):
                out += activations[source] @ self.layers[source].W_dec[:, layer - source]
            if weights.W_skip is not None:
                out += inputs[layer] @ weights.W_skip
            outputs.append(out)
        return outputs


def read_cross_layer_set(path: str | os.PathLike[str]) -> CrossLayerSet:
    """Read a cross-layer transcoder from a local folder, on the CPU and in the files' dtype.

    Raises:
        UserError: the folder is none of the format, or lacks a file.
        TensorError: a file is damaged, or its tensors have other names or shapes.
    """
    folder = typed_path(path, "path")
    if not has_file(folder / CONFIG) or not has_file(folder / "W_enc_0.safetensors"):
        raise UserError(
            f"{folder}: expected a folder with {CONFIG} and W_enc_0.safetensors, a cross-layer "
            "transcoder of circuit-tracer; download the set's repository into a folder"
        )
    settings: CrossLayerFile = read_yaml(folder / CONFIG, CrossLayerFile)
    if (kind := settings.get("model_kind", KIND)) != KIND:
        raise UserError(f"{folder / CONFIG}: model_kind: expected {KIND}, got {kind!r:.80}")
    numbers = sorted(int(m[1]) for file in folder.iterdir() if (m := _FILE.fullmatch(file.name)))
    if numbers != list(range(len(numbers))) or len(numbers) > MAX_LAYERS:
        missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
        raise UserError(f"{folder}: W_enc_{missing}.safetensors is missing")
    with open_tensors(folder / "W_enc_0.safetensors") as file:
        names = set(file.keys())
        if "W_enc_0" not in names or len(shape := file.get_slice("W_enc_0").get_shape()) != 2:
            raise UserError(
                f"{folder / 'W_enc_0.safetensors'}: expected a tensor W_enc_0 [features, width], "
                f"got {sorted(names)}"
            )
    optional = {name for name in ("threshold", "W_skip") if f"{name}_0" in names}
    size = shape[0], shape[1], len(numbers)
    return CrossLayerSet(
        settings.get("model_name"),
        settings.get("feature_input_hook", "hook_resid_mid"),
        settings.get("feature_output_hook", "hook_mlp_out"),
        [_read_layer(folder, i, size, optional) for i in numbers],
    )


def _read_layer(folder: Path, i: int, size: tuple[int, int, int], optional: set[str]) -> CrossLayer:
    F, D, n_layers = size
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (F, D), "b_enc": (F,), "b_dec": (D,)}
    shapes |= {"threshold": (F,)} if "threshold" in optional else {}
    shapes |= {"W_skip": (D, D)} if "W_skip" in optional else {}
    expected = {f"{name}_{i}": shape for name, shape in shapes.items()}
    read = read_tensors(folder / f"W_enc_{i}.safetensors", expected, finite=True)
    decoder = {f"W_dec_{i}": (F, n_layers - i, D)}
    read |= read_tensors(folder / f"W_dec_{i}.safetensors", decoder, finite=True)
    return CrossLayer(**{name.removesuffix(f"_{i}"): tensor for name, tensor in read.items()})
