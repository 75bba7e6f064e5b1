"""Scales of features: how far the MLPs already write what a feature writes.

For each feature the scale β and a constant vector c are fitted by least squares,
``min_{β, c} Σ_t ‖β a_t d + c - y_t‖²``, where a is the activation, d the row of ``W_dec``, and y is
what a module writes on the same inputs as the adapter:

- *base scale*: y is the output of the base's MLP, ``MLP_base(x)``;
- *target scale*: y is the output of the target's MLP, ``MLP_target(x)``;
- *difference scale*: y is what the rest of the adapter leaves of the MLPs' difference,
  ``MLP_target(x) - MLP_base(x) - (A(x) - a d)``.

With s = a‖d‖ and u = d/‖d‖, the solution is ``β(y) = Cov(s, u·y) / Var(s)`` over the tokens: only
the part of y along d matters, and a constant in y changes c alone. β is linear in y and β(a d) = 1,
so the difference scale is ``1 + β(MLP_target) - β(MLP_base) - β(A)``. The sums over active codes
(s, s², s·(u·y)) and ``u·Σ_t y_t`` of all tokens suffice, for the three modules of
:class:`~fastadapt.features.collect.layer_codes.Outputs`.

The first token of a text is left out: as the sink of attention it has outputs that may be hundreds
of times larger than others, and would decide the mean of y alone.

N tokens of a batch (padding counted), D width, F features of a layer, U of all layers, C codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.errors import RunError
from fastadapt.features.collect import exact_sums
from fastadapt.features.collect.layer_codes import Outputs
from fastadapt.features.collect.topk_buffer import rows
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.kernels.transcoder.products import sampled_product

#: Least variance of a feature's sizes, as a share of their mean square. Below it the feature is
#: nearly constant on all tokens, and its scale would be that of rounding errors.
LEAST_VARIANCE = 1e-4
_N_MODULES = len(Outputs._fields)


class ScaleSums:
    """Sums over tokens, from which :func:`scales_of` computes the scales of all features.

    Attributes:
        sums: int64 ``[U, 8, 2]``, see :mod:`.exact_sums`: Σ s, Σ s², Σ s·(u·y) for each module of
            ``Outputs``, and Σ u·y of all tokens for each.
        tokens: int64 ``[U]``, tokens on which a feature is active.
    """

    def __init__(self, n_units: int, device: torch.device) -> None:
        shape = (n_units, 2 + 2 * _N_MODULES, 2)
        self.sums = torch.zeros(shape, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(n_units, dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums as tensors by name."""
        return {"sums": self.sums, "tokens": self.tokens}

    def add(
        self, layer: int, codes: SparseCodes, outputs: Outputs, W_dec_FD: Tensor, counted_N: Tensor
    ) -> None:
        """Add one layer's tokens of a batch.

        Args:
            layer: index of the layer.
            codes: the layer's codes.
            outputs: what the modules write at each token.
            W_dec_FD: the adapter's decoder.
            counted_N: bool, the tokens that count: no padding, and no first token of a text.

        Raises:
            RunError: an output along a feature is not finite.
        """
        F = len(W_dec_FD)
        units = slice(layer * F, (layer + 1) * F)
        sums_F = self.sums[units]
        norm_F = torch.linalg.vector_norm(W_dec_FD, dim=1, dtype=torch.float64)
        over_F = 1 / norm_F.clamp(min=torch.finfo(torch.float64).tiny)
        counts = rows(counted_N, codes.tokens).nonzero().flatten()
        tokens_C, features_C = rows(codes.tokens, counts), rows(codes.features, counts)
        size_C = rows(codes.values, counts).double() * rows(norm_F, features_C)
        self.tokens[units] += torch.bincount(features_C, minlength=F)
        exact_sums.add(sums_F[:, 0], size_C, features_C)
        exact_sums.add(sums_F[:, 1], size_C.square(), features_C)
        every = torch.arange(len(counted_N) + 1, device=tokens_C.device)
        offsets = torch.searchsorted(tokens_C, every)
        counted = counted_N.nonzero().flatten()
        totals_D = [rows(y_ND, counted).sum(0, dtype=torch.float64) for y_ND in outputs]
        along_F = W_dec_FD.double() @ torch.stack(totals_D, 1)
        for i, y_ND in enumerate(outputs):
            along_C = sampled_product(y_ND, W_dec_FD, tokens_C, features_C, offsets).double()
            products_C = size_C * along_C * rows(over_F, features_C)
            totals_F = along_F[:, i] * over_F
            if not (products_C.isfinite().all() and totals_F.isfinite().all()):
                raise RunError(
                    f"layer {layer}: the {outputs._fields[i]} writes a number that is not finite; "
                    "pass --dtype float32"
                )
            exact_sums.add(sums_F[:, 2 + i], products_C, features_C)
            exact_sums.add(sums_F[:, 2 + _N_MODULES + i], totals_F)


def scales_of(sums_F: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return base, target and difference scale of each feature, NaN where it has none.

    A feature has no scale if it is nowhere active, writes nothing, or is nearly constant
    (:data:`LEAST_VARIANCE`).

    Args:
        sums_F: int64 ``[F, 8, 2]``, some of ``ScaleSums.sums``.
        n_tokens: number of tokens that counted.

    Returns:
        Three tensors, float64 ``[F]``.
    """
    size, square, *products = exact_sums.totals(sums_F).unbind(1)
    variance = square - size**2 / n_tokens
    has_scale = (square > 0) & (variance > LEAST_VARIANCE * square)
    variance = variance.masked_fill(~has_scale, torch.nan)
    base, target, adapter = (
        (product - size * total / n_tokens) / variance
        for product, total in zip(products[:_N_MODULES], products[_N_MODULES:], strict=True)
    )
    return base, target, 1 + target - base - adapter
