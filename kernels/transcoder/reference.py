"""Reference of the transcoder op: dense PyTorch that follows the formulas.

    z = W_enc x + b_enc        a = activation(z)        out = residual + W_decᵀ a + b_dec
    penalty = Σ_t w_t Σ_i φ(u_ti)      u_ti = a_ti ‖W_dec,i‖₂

Any device and any floating dtype; float64 for the oracles of tests. Autograd computes the
gradients, except θ's. Inside the op, φ is the argument `tanh_scale`: None is L1, ``φ(u) = u``; a
number c is ``φ(u) = tanh(c u)``.

Shape suffixes: S groups (rows ranked together by batch_topk), T tokens, D and E widths in and out,
F features.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor


class TranscoderStats(NamedTuple):
    """Statistics over tokens of non-zero weight without padding. Not differentiable."""

    n_active: Tensor  #: int64, 0-d: active entries.
    feature_counts: Tensor  #: int64 [F]: tokens on which each feature fired.
    n_tokens: Tensor  #: int64, 0-d: tokens counted.
    #: fp32, 0-d: smallest active value of a row of x, averaged over rows with active values. For
    #: batch_topk, whose inference threshold follows this value. NaN without active values and for
    #: other activations. If a row has an active NaN, NaN; the Triton kernels leave NaN out instead,
    #: and give infinity for a row of nothing else.
    min_active: Tensor
    #: int64, 0-d: codes of all tokens without padding, weight 0 included: active entries and, for
    #: jumprelu, entries in its window. A plan needs at least this capacity.
    n_codes: Tensor

    @property
    def fired(self) -> Tensor:
        """Bool [F]: the feature fired on at least one counted token."""
        return self.feature_counts > 0


class SparseCodes(NamedTuple):
    """Active entries of a call, sorted by token, then feature; none on padding.

    Not differentiable.
    """

    tokens: Tensor  #: int64 [C]: index into x's flattened leading dimensions.
    features: Tensor  #: int64 [C].
    values: Tensor  #: x's dtype [C]: non-zero entries of ``a``.

    @classmethod
    def from_dense(cls, a_NF: Tensor) -> SparseCodes:
        """Return the active entries of a dense a [N, F]."""
        tokens, features = a_NF.detach().nonzero(as_tuple=True)
        return cls(tokens, features, a_NF.detach()[tokens, features])


#: Names for the argument ``penalty`` of :func:`fastadapt.kernels.transcoder.transcoder`.
PENALTIES = ("l1", "tanh")


class Penalty(NamedTuple):
    """Sparsity penalty; see :func:`fastadapt.kernels.transcoder.transcoder`."""

    kind: str = "l1"  #: one of :data:`PENALTIES`.
    scale: float | None = None  #: c of ``tanh``; None for ``l1``.


#: The penalty that is used if none is given.
L1 = Penalty()


class TranscoderOutput(NamedTuple):
    """Result of :func:`fastadapt.kernels.transcoder.transcoder`."""

    out: Tensor  #: x's dtype, [..., d_out].
    penalty: Tensor  #: 0-d, fp32 (float64 for float64 x): a sum over tokens and features.
    stats: TranscoderStats  #: numbers of active entries, by feature and in total.
    codes: SparseCodes | None = None  #: with ``return_codes``.


def row_shape(lead: torch.Size) -> tuple[int, int]:
    """Return the number of rows of ``[..., T]``, and T; (1, 1) for an empty shape."""
    return lead[:-1].numel(), lead[-1] if lead else 1


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and of the penalty: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class JumpReLU(torch.autograd.Function):
    """``z·1[z > θ⁺]`` with ``∂a/∂θ = -(|θ|/ε)·1[|z-θ⁺| < ε/2]``, a straight-through estimate.

    ``θ⁺ = max(θ, 0)``. Formula for θ > 0: arXiv 2407.14435 with a rectangular kernel of width ε. A
    threshold below 0 acts as 0. With |θ| in the gradient, a sparsity penalty raises such a
    threshold; with θ, the penalty would lower it further.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.epsilon = epsilon
        return above(z, theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (z, theta), (da,) = ctx.saved_tensors, gradients
        acc = accumulator(z.dtype)
        window = (z.to(acc) - theta.to(acc).clamp(min=0)).abs() < ctx.epsilon / 2
        in_window = torch.where(window, da, 0).to(acc).flatten(0, -2).sum(0)
        dtheta = -(theta.to(acc).abs() / ctx.epsilon) * in_window
        return torch.where(above(z, theta) != 0, da, 0), dtheta.to(theta.dtype), None


def above(z: Tensor, cut: Tensor) -> Tensor:
    """Return ``z·1[z > max(cut, 0)]``; NaN stays NaN, so that it reaches the output."""
    return torch.where(z <= cut.clamp(min=0), 0, z)


#: Relative increase that lifts a product just below an integer, by rounding only, to the integer.
WHOLE = 1 + 2**-50


def codes_of(k: float, n_tokens: int) -> int:
    """Return ``k * n_tokens`` rounded down, for k as a decimal number: 0.29 of 100 tokens is 29."""
    return math.floor(k * n_tokens * WHOLE)


def keep_largest(a: Tensor, count: Tensor | int) -> Tensor:
    """Zero all but the `count` largest of the last axis; of equal entries, the first rank first."""
    order = a.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(a.shape[-1], device=a.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    return torch.where(rank < count, a, 0)


def is_ranked(activation: str, threshold: Tensor | None) -> bool:
    """Return whether an activation keeps the largest entries, rather than those above a cut."""
    return activation == "topk" or (activation == "batch_topk" and threshold is None)


def activate(
    z_STF: Tensor,
    activation: str,
    k: float | None,
    threshold: Tensor | None,
    bandwidth: float | None,
    padding_ST: Tensor | None,
) -> Tensor:
    """Return a = activation(z), without codes on padding."""
    if padding_ST is not None:
        z_STF = z_STF.masked_fill(padding_ST[..., None], 0)
    if activation == "jumprelu":
        assert threshold is not None
        assert bandwidth is not None
        a_STF: Tensor = JumpReLU.apply(z_STF, threshold, bandwidth)
        return a_STF if padding_ST is None else a_STF.masked_fill(padding_ST[..., None], 0)
    if threshold is not None:
        return above(z_STF, threshold)
    a_STF = torch.relu(z_STF)
    if activation == "topk":
        assert k is not None
        return keep_largest(a_STF, int(k))
    if activation == "batch_topk":
        assert k is not None
        S, T, _ = a_STF.shape
        n_tokens_S = torch.full((S,), T, device=a_STF.device)
        if padding_ST is not None:
            n_tokens_S = (~padding_ST).sum(-1)
        count_S = (k * n_tokens_S.double() * WHOLE).floor()
        return keep_largest(a_STF.flatten(1), count_S[:, None]).view_as(a_STF)
    return a_STF


def statistics(
    a_STF: Tensor, code_STF: Tensor, counted_ST: Tensor, activation: str
) -> TranscoderStats:
    """Return the statistics of counted tokens, and the number of all codes."""
    active_STF = (a_STF != 0) & counted_ST[..., None]
    feature_counts_F = active_STF.sum((0, 1))
    min_active = torch.full((), torch.nan, device=a_STF.device)
    if activation == "batch_topk" and a_STF[:1].numel():
        smallest_S = torch.where(active_STF, a_STF, torch.inf).flatten(1).amin(-1).float()
        fires_S = active_STF.flatten(1).any(-1)
        min_active = torch.where(fires_S, smallest_S, 0).sum() / fires_S.sum()
    return TranscoderStats(
        feature_counts_F.sum(), feature_counts_F, counted_ST.sum(), min_active, code_STF.sum()
    )


def reference(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    *,
    activation: str,
    k: float | None,
    threshold: Tensor | None,
    bandwidth: float | None,
    residual_STE: Tensor | None,
    weight_ST: Tensor | None,
    padding_ST: Tensor | None,
    tanh_scale: float | None,
    return_codes: bool,
) -> TranscoderOutput:
    """Compute the transcoder on validated arguments, documented at the public function."""
    acc = accumulator(x_STD.dtype)
    if padding_ST is not None:
        x_STD = x_STD.masked_fill(padding_ST[..., None], 0)
    z_STF = nnf.linear(x_STD, W_enc_FD, b_enc_F)
    a_STF = activate(z_STF, activation, k, threshold, bandwidth, padding_ST)

    out_STE = a_STF @ W_dec_FE + b_dec_E
    if residual_STE is not None:
        out_STE = residual_STE + out_STE

    norm_F = torch.linalg.vector_norm(W_dec_FE, dim=-1, dtype=acc)
    if tanh_scale is None:
        penalty_ST = a_STF.to(acc) @ norm_F
    else:
        penalty_ST = (tanh_scale * a_STF.to(acc) * norm_F).tanh().sum(-1)
    counted_ST = torch.ones_like(penalty_ST, dtype=torch.bool)
    if weight_ST is not None:
        penalty_ST = penalty_ST * weight_ST
        counted_ST = weight_ST != 0
    if padding_ST is not None:
        counted_ST = counted_ST & ~padding_ST
    code_STF = a_STF.detach() != 0
    if activation == "jumprelu":
        assert threshold is not None
        assert bandwidth is not None
        window_STF = (z_STF.detach().to(acc) - threshold.to(acc).clamp(min=0)).abs() < bandwidth / 2
        code_STF |= window_STF if padding_ST is None else window_STF & ~padding_ST[..., None]
    stats = statistics(a_STF.detach(), code_STF, counted_ST, activation)
    codes = SparseCodes.from_dense(a_STF.flatten(0, 1)) if return_codes else None
    return TranscoderOutput(out_STE, penalty_ST.sum(), stats, codes)
