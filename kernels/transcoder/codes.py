"""Extract codes, the active entries of a dense z, in token order and in feature order.

Codes are stored as CSR by token: `values`, `features` (ascending within a token) and
`row_offsets`. Gradients of the weights also need `order`, the permutation to feature order (tokens
ascending), `tokens`, each code's token in that order, and `feature_offsets`. A code of value 0 is
an inactive entry in JumpReLU's window, which only contributes to the gradient of θ. In the dense
layout, `values` is a [N, F] flattened, `features` is empty and `window` marks JumpReLU's window.

Shape suffixes: N tokens (of all rows of x), T tokens of a row, F features, C codes, K blocks of B
features; in ranking, R rows of M entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .reference import SparseCodes, accumulator, codes_of

# Fraction of active entries above which dense products are faster. Measured on one AVX-512 core
# with AMX at T=2048, d=1024, F=8192 in fp32: a step takes 0.3 + 27 * fraction seconds on codes, and
# 1.7 seconds dense, equal at 0.051 (0.065 to 0.075 for d of 128 and 512). A lower value allows for
# uneven features on several threads. In bf16, whose codes are multiplied in fp32, equal at 0.018.
DENSE_SHARE = {torch.float32: 0.045, torch.float64: 0.045}
DENSE_SHARE_16_BITS = 0.017
# Estimates for a GPU, not measured: gathering a 16-bit row at 4.3 TB/s takes as long as its part of
# a product at 788 TFLOP/s; in fp32, a row of 4-byte entries and a product at about 60 TFLOP/s.
DENSE_SHARE_GPU = {torch.float32: 0.036}
DENSE_SHARE_GPU_16_BITS = 0.0055
# Capacity is this multiple of the expected codes, rounded up to steps so that sizes recur.
HEADROOM = 1.5
CAPACITY_STEP = 16_384
#: Largest number of entries for which, without a plan or gradients, buffers for all entries cost
#: less than a synchronisation. Generation then never synchronises and can be captured as a graph.
SMALL_ENTRIES = 2**22
# Largest number of tokens for which, without gradients, reading the codes' rows of W_dec twice
# costs less than a pass over all of W_dec.
SMALL = 256
# Codes of a feature that one program of a GPU sums.
GPU_PIECE = 64
# Tokens sampled for the choice between codes and dense products, which need not be exact.
SAMPLE = 256
# Features tested for codes at once: most blocks have none, and a maximum is a cheap test.
BLOCK = 64


class CodeLayout(NamedTuple):
    """Layout of the codes: a host value, so that path and shapes are known before the call."""

    dense: bool  #: use dense products instead of codes.
    capacity: int | None = None  #: length of the code buffers; None: as needed, which synchronises.


def dense_share(dtype: torch.dtype, device_type: str) -> float:
    """Return the fraction of active entries above which dense products are faster."""
    if device_type == "cuda":
        return DENSE_SHARE_GPU.get(dtype, DENSE_SHARE_GPU_16_BITS)
    return DENSE_SHARE.get(dtype, DENSE_SHARE_16_BITS)


def plan_for(
    codes_per_token: float, n_tokens: int, n_features: int, dtype: torch.dtype, device_type: str
) -> CodeLayout:
    """Return the layout for a call with about `codes_per_token` codes per token.

    Args:
        codes_per_token: expected codes per token, e.g. ``stats.n_codes`` of an earlier call divided
            by its tokens.
        n_tokens: tokens of the call, summed over all rows of x.
        n_features: F.
        dtype, device_type: of x; they determine when dense products are faster.

    Returns:
        The dense layout, or codes with a capacity of at least 1.5 times the expected codes and at
        most the number of entries.

    Example:
        >>> plan_for(10, n_tokens=1024, n_features=8192, dtype=torch.float32, device_type="cpu")
        CodeLayout(dense=False, capacity=32768)
    """
    if codes_per_token > dense_share(dtype, device_type) * n_features:
        return CodeLayout(dense=True)
    entries = n_tokens * n_features
    wanted = int(HEADROOM * codes_per_token * n_tokens) + CAPACITY_STEP
    return CodeLayout(False, min(entries, -(-wanted // CAPACITY_STEP) * CAPACITY_STEP))


class Codes(NamedTuple):
    """Codes that the encoder returns, for the decoder and both backward passes."""

    values: Tensor  #: x's dtype, [C]; dense: [N * F].
    features: Tensor  #: int32 [C]; dense: [0].
    row_offsets: Tensor  #: int64 [N + 1].
    order: Tensor  #: int64 [C]: code indices in feature order; dense: [0].
    tokens: Tensor  #: int32 [C]: each code's token, in feature order; dense: [0].
    feature_offsets: Tensor  #: int64 [F + 1]; [0] without feature order.
    piece_offsets: Tensor  #: GPU: int32 [F + 1], prefix sums of the features' further pieces.
    window: Tensor  #: bool [N * F] for dense jumprelu, else [0].

    @property
    def dense(self) -> bool:
        """Whether `values` holds all entries of a."""
        return self.features.numel() == 0 and self.values.numel() > 0

    def live(self) -> Codes:
        """Return the codes without the unused tail of their buffers."""
        n = int(self.row_offsets[-1])
        return self._replace(
            values=self.values[:n],
            features=self.features[:n],
            order=self.order[:n],
            tokens=self.tokens[:n],
        )


def active_codes(codes: Codes, n_features: int) -> SparseCodes:
    """Return the active entries, without unused buffers and inactive entries of JumpReLU's window.

    On a GPU this synchronises once, to read the number of active entries.
    """
    values = codes.values.detach()
    active = values != 0
    if not codes.dense:
        active &= torch.arange(len(values), device=values.device) < codes.row_offsets[-1]
    index_C = active.nonzero().flatten()
    if codes.dense:
        tokens_C = index_C // n_features
        features_C = index_C - tokens_C * n_features
    else:
        tokens_C = torch.searchsorted(codes.row_offsets, index_C, right=True) - 1
        features_C = codes.features[index_C].long()
    return SparseCodes(tokens_C, features_C, values[index_C])


def activate_(
    z_NF: Tensor,
    n_rows: int,
    threshold_F: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
) -> Tensor:
    """Replace pre-activations z by activations a, in place.

    NaN counts as active, since `NaN <= cut` is false."""
    inactive_NF = None
    if activation == "topk":
        inactive_NF = ~_largest(z_NF, int(k))
    elif activation == "batch_topk" and threshold_F is None and z_NF.numel():
        inactive_NF = torch.empty_like(z_NF, dtype=torch.bool)
        for row, (z_TF, inactive_TF) in enumerate(
            zip(z_NF.chunk(n_rows), inactive_NF.chunk(n_rows), strict=True)
        ):
            n_tokens = len(z_TF)
            if padding_N is not None:
                padding_T = padding_N.chunk(n_rows)[row]
                n_tokens -= int(padding_T.sum())
                z_TF = z_TF.masked_fill(padding_T[:, None], -torch.inf)
            largest = _largest(z_TF.reshape(1, -1), codes_of(k, n_tokens))
            torch.logical_not(largest.view_as(inactive_TF), out=inactive_TF)
    elif threshold_F is not None:
        inactive_NF = z_NF <= threshold_F
    if inactive_NF is not None:
        z_NF.masked_fill_(inactive_NF, 0)
    if padding_N is not None:
        z_NF.masked_fill_(padding_N[:, None], 0)
    return z_NF.relu_()


def _largest(z_RM: Tensor, k: int) -> Tensor:
    """Return a mask of each row's k largest entries.

    Of equal entries, the lowest index ranks first; NaN ranks above all numbers. The mask is
    arbitrary at entries of at most 0, which are inactive at any rank.
    """
    if k >= z_RM.shape[1]:
        return torch.ones_like(z_RM, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(z_RM, dtype=torch.bool)
    cut_R = z_RM.topk(k, dim=-1, sorted=False).values.amin(-1)  # NaN if any value is
    keep_RM = z_RM >= cut_R[:, None]
    unclear_R = cut_R.isnan() | ((keep_RM.count_nonzero(-1) > k) & (cut_R > 0))
    for row in unclear_R.nonzero().flatten().tolist():
        keep_RM[row] = False
        keep_RM[row, z_RM[row].argsort(descending=True, stable=True)[:k]] = True
    return keep_RM


def in_window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return ``|z - max(θ, 0)| < ε/2``, computed in the accumulator's dtype."""
    acc = accumulator(z.dtype)
    return (z.to(acc) - threshold.to(acc).clamp(min=0)).abs() < bandwidth / 2


def prefers_dense(a_NF: Tensor, window_NF: Tensor | None) -> bool:
    """Return whether dense products are likely faster, estimated from a sample of tokens."""
    step = max(1, len(a_NF) // SAMPLE)
    present = a_NF[::step] != 0
    if window_NF is not None:
        present |= window_NF[::step]
    return int(present.count_nonzero()) > dense_share(a_NF.dtype, "cpu") * present.numel()


def dense_codes(a_NF: Tensor, window_NF: Tensor | None, *, ordered: bool) -> Codes:
    """Return all entries of a [N, F] in the dense layout."""
    N, F = a_NF.shape
    index = a_NF.new_empty(0, dtype=torch.int64)
    features, tokens, pieces = (index.new_empty(0, dtype=torch.int32) for _ in range(3))
    rows, columns = index.new_zeros(N + 1), index.new_zeros(F + 1 if ordered else 0)
    window = a_NF.new_empty(0, dtype=torch.bool) if window_NF is None else window_NF.flatten()
    return Codes(a_NF.flatten(), features, rows, index, tokens, columns, pieces, window)


def sparse_codes(
    a_NF: Tensor, window_NF: Tensor | None, plan: CodeLayout | None, *, ordered: bool
) -> Codes:
    """Return the active entries of a [N, F] and those in the window, in buffers of the plan's size.

    Raises:
        ValueError: the codes exceed ``plan.capacity``.
    """
    N, F = a_NF.shape
    index_C = _code_indices(a_NF, window_NF)
    rows_C = index_C // max(F, 1)
    features_C = index_C - rows_C * F
    count = torch.arange(max(N, F) + 1, device=a_NF.device)
    none = count.new_zeros(0)
    codes = Codes(
        a_NF.flatten()[index_C],
        features_C.int(),
        torch.searchsorted(rows_C, count[: N + 1]),
        none,
        none.int(),
        none.clone(),
        none.int(),
        none.bool(),
    )
    if ordered:
        by_feature_C, order_C = features_C.sort(stable=True)
        codes = codes._replace(
            order=order_C,
            tokens=rows_C[order_C].int(),
            feature_offsets=torch.searchsorted(by_feature_C, count[: F + 1]),
        )
    if plan is None or plan.capacity is None:
        return codes
    if len(index_C) > plan.capacity:
        raise ValueError(
            f"transcoder: plan.capacity must be at least the number of codes, {len(index_C)}; got "
            f"{plan.capacity}; raise it, or pass CodeLayout(dense=True) or no plan"
        )
    buffer = index_C.new_empty(plan.capacity)
    return codes._replace(
        values=pad(codes.values, buffer),
        features=pad(codes.features, buffer),
        order=pad(codes.order, buffer) if ordered else codes.order,
        tokens=pad(codes.tokens, buffer) if ordered else codes.tokens,
    )


def _code_indices(a_NF: Tensor, window_NF: Tensor | None) -> Tensor:
    """Return the indices of the codes in the flattened a, int64 [C], ascending."""
    if window_NF is not None or a_NF.shape[1] % BLOCK:
        present_NF = a_NF != 0
        if window_NF is not None:
            present_NF |= window_NF
        return present_NF.flatten().nonzero().flatten()
    if a_NF.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=a_NF.device)
    a_KB = a_NF.view(-1, BLOCK)
    blocks = (a_KB.amax(-1) != 0).nonzero().flatten()
    block, inside = (a_KB[blocks] != 0).nonzero(as_tuple=True)
    return blocks[block] * BLOCK + inside


def pad(t_C: Tensor, like: Tensor) -> Tensor:
    """Pad `t_C` with zeros to the length of `like`."""
    return nnf.pad(t_C, (0, len(like) - len(t_C))) if len(like) > len(t_C) else t_C
