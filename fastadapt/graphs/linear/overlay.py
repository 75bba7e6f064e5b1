"""Transcoders of the base's MLPs, which may stand for them in a graph.

A transcoder gives sparse features whose decoder rows, with a bias and possibly a linear skip, sum
to almost the MLP's output. In a graph its features are nodes, its skip passes gradients, and what
it misses is part of the error.

F features, D width, C codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.graphs.linear.units import MLP_IN, MLP_OUT, MLP_STAGE, Units
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import ReplacementModel

_CHUNK = 1 << 24  # elements of dense activations in memory at once


class Transcoder(NamedTuple):
    """One layer's transcoder: ``W_decᵀ act(W_enc x + b_enc) + b_dec + W_skip x``.

    ``act`` is ReLU, or JumpReLU with a threshold per feature.
    """

    W_enc: Tensor  #: [F, D]
    b_enc: Tensor  #: [F]
    W_dec: Tensor  #: [F, D]
    b_dec: Tensor  #: [D]
    W_skip: Tensor | None = None  #: [D, D]
    threshold: Tensor | None = None  #: [F]

    @torch.no_grad()
    def codes(self, x: Tensor) -> SparseCodes:
        """Return the active features of ``x [T, D]``; a chunk of tokens is dense at once."""
        step = max(1, _CHUNK // len(self.W_enc))
        parts = []
        for first in range(0, len(x), step):
            z = torch.addmm(self.b_enc, x[first : first + step], self.W_enc.T)
            least = 0 if self.threshold is None else self.threshold
            codes = SparseCodes.from_dense(torch.where(z > least, z, 0))
            parts.append((codes.tokens + first, codes.features, codes.values))
        return SparseCodes(*(torch.cat(each) for each in zip(*parts, strict=True)))

    @torch.no_grad()
    def decode(self, codes: SparseCodes, x: Tensor) -> Tensor:
        """Return the transcoder's output ``[T, D]`` from its codes and the MLP's input ``x``."""
        out = self.b_dec.expand_as(x).clone()
        step = max(1, _CHUNK // x.shape[-1])
        for first in range(0, len(codes.tokens), step):
            tokens, features, values = (part[first : first + step] for part in codes)
            out.index_add_(0, tokens, self.W_dec[features] * values[:, None])
        return out if self.W_skip is None else out + x @ self.W_skip.T


@dataclass(frozen=True)
class TranscoderSet:
    """Transcoders of the MLPs of one model, a layer each.

    Attributes:
        name: where they were read.
        model: the model that the set names, such as a hub id.
        layers: the transcoders.
    """

    name: str
    model: str
    layers: list[Transcoder]

    def check_fits(self, model: ReplacementModel) -> None:
        """Check layers and width.

        Raises:
            UserError: they are another model's.
        """
        mine = (len(self.layers), self.layers[0].W_enc.shape[1])
        expected = (model.n_layers, model.d_model)
        if mine != expected:
            raise UserError(
                f"--base_set {self.name}: expected transcoders of the base, {expected[0]} layers "
                f"of width {expected[1]}, got {mine[0]} layers of width {mine[1]} (of {self.model})"
            )

    def like(self, weight: Tensor) -> TranscoderSet:
        """Return the set on the device and in the dtype of a weight."""
        layers = [
            Transcoder(*(None if part is None else part.to(weight) for part in layer))  # type: ignore[arg-type]
            for layer in self.layers
        ]
        return TranscoderSet(self.name, self.model, layers)

    def run(self, layer: int, x: Tensor) -> tuple[Units, Tensor]:
        """Return the active features on the MLP's input ``[T, D]``, and the output ``[T, D]``."""
        transcoder = self.layers[layer]
        codes = transcoder.codes(x)
        units = Units(
            "base feature",
            layer,
            MLP_IN,
            MLP_OUT,
            MLP_STAGE,
            codes,
            transcoder.W_enc,
            transcoder.b_enc,
            transcoder.W_dec,
        )
        return units, transcoder.decode(codes, x)

    def linear(self, layer: int, x: Tensor, active: SparseCodes | None = None) -> Tensor | None:
        """Return the part of the output that is linear in ``x [R, T, D]``; None: there is none.

        Args:
            layer: the layer.
            x: the MLP's inputs.
            active: features whose activation is their pre-activation; constants are left out.
        """
        W_enc, _, W_dec, _, skip, _ = self.layers[layer]
        out = None if skip is None else x @ skip.T
        if active is None:
            return out
        mask = x.new_zeros(x.shape[1], len(W_enc))
        mask[active.tokens, active.features] = 1
        through = (x @ W_enc.T * mask) @ W_dec
        return through if out is None else out + through


@torch.no_grad()
def unexplained_variance(
    model: ReplacementModel, overlay: TranscoderSet, mlp_in: list[Tensor]
) -> list[float]:
    """Return the fraction of variance of each base MLP's output that a set leaves unexplained.

    It is ``Σ ‖MLP(x) − T(x)‖² / Σ ‖MLP(x) − mean‖²`` over the tokens of one text; 0 is perfect.

    Args:
        model: the replacement model, whose base the set belongs to.
        overlay: the set.
        mlp_in: per layer ``[T, D]``, the inputs of the MLPs on the text.

    Raises:
        UserError: an MLP's output is the same at all tokens, as for a text of one token.
    """
    shares = []
    for layer, x in enumerate(mlp_in):
        out = model.mlps[layer].base(x[None])[0]
        missed = out - overlay.run(layer, x)[1]
        spread = (out - out.mean(0)).square().sum()
        # Equal outputs differ from their mean by rounding, whose square is about eps² of theirs.
        if spread <= torch.finfo(out.dtype).eps * out.square().sum():
            raise UserError(
                f"--base_set: expected tokens that differ in the output of the base's MLP of layer "
                f"{layer}, got {len(out)} with equal ones, so no variance to explain; give a "
                "longer prompt, or leave out --base_set"
            )
        shares.append(float(missed.square().sum() / spread))
    return shares
