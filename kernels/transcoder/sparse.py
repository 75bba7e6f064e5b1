"""The transcoder on codes: after the encoder's dense product, active entries only.

This is the CPU's default and the readable account of the device code. No autograd here: each
function is the body of one op of ``autograd.py``.

Codes are CSR by token: `values`, `features` (ascending in a row) and `row_offsets`, with `order`,
the permutation to by-feature order (tokens ascending), and `feature_offsets`. An entry of value 0
is an inactive one in JumpReLU's window: it carries gradient to θ alone. Where dense products are
faster, `values` is all of a [N, F], flattened, `features` is empty and `window` marks JumpReLU's
window. Every sum runs in a fixed order (no atomics, no scatter), so the same inputs give the same
bits on any number of runs.

Shape suffixes: S rows of x, T tokens of a row, N = S * T, D and E widths in and out, F features,
C codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .reference import accumulator

DENSE_SHARE = 0.035
COUNT_ROWS = 128


class Plan(NamedTuple):
    """How to lay the codes out: a host value, so that path and shapes are known beforehand."""

    dense: bool  #: dense products, or codes.
    capacity: int | None = None  #: length of the code buffers (sparse only); None: as needed.


class Codes(NamedTuple):
    """What the encoder leaves for the decoder and for both backward passes."""

    values: Tensor  #: x's dtype, [C]; dense: [N * F].
    features: Tensor  #: int32 [C]; dense: [0].
    row_offsets: Tensor  #: int64 [N + 1].
    order: Tensor  #: int64 [C]: code indices by feature, tokens ascending; dense: [0].
    feature_offsets: Tensor  #: int64 [F + 1].
    window: Tensor  #: bool [N * F] for dense jumprelu, else [0].

    @property
    def dense(self) -> bool:
        """Whether `values` holds every entry."""
        return self.features.numel() == 0 and self.values.numel() > 0

    def live(self) -> Codes:
        """Without the unused tail of buffers longer than the codes."""
        n = int(self.row_offsets[-1])
        return self._replace(
            values=self.values[:n], features=self.features[:n], order=self.order[:n]
        )


class Encoded(NamedTuple):
    """Codes, penalty and statistics (see ``TranscoderStats``)."""

    codes: Codes
    penalty: Tensor
    n_active: Tensor
    feature_counts: Tensor
    n_tokens: Tensor
    min_active: Tensor


def encode(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    norm_F: Tensor,
    threshold_F: Tensor | None,
    weight_N: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
    bandwidth: float,
    plan: Plan | None,
) -> Encoded:
    """Pre-activations by one dense product, then codes, penalty and statistics."""
    S, T, _ = x_STD.shape
    N, F = S * T, W_enc_FD.shape[0]
    z_NF = nnf.linear(x_STD, W_enc_FD, b_enc_F).reshape(N, F)
    inactive_NF = _inactive(z_NF, S, threshold_F, padding_N, activation, k)
    absent_NF, window_NF = inactive_NF, None
    if activation == "jumprelu":
        assert threshold_F is not None
        window_NF = _in_window(z_NF, threshold_F, bandwidth)
        if padding_N is not None:
            window_NF &= ~padding_N[:, None]
        absent_NF = inactive_NF & ~window_NF

    counted_N = torch.ones(N, dtype=torch.bool, device=z_NF.device)
    if weight_N is not None:
        counted_N = weight_N != 0
    if padding_N is not None:
        counted_N = counted_N & ~padding_N

    dense = plan.dense if plan else _prefers_dense(absent_NF)
    if dense:
        codes = _dense_codes(z_NF, inactive_NF, window_NF, activation)
        a_NF = codes.values.view(N, F)
        penalty_N = a_NF.to(norm_F.dtype) @ norm_F
        penalty = penalty_N.sum() if weight_N is None else penalty_N @ weight_N
        counts_F = _column_counts(inactive_NF, counted_N)
        ranked_a, offsets = a_NF.flatten(), torch.arange(S + 1, device=a_NF.device) * T * F
        is_active = ~inactive_NF.flatten()
        if activation == "batch_topk":
            is_active = (~inactive_NF & counted_N[:, None]).flatten()
    else:
        codes = _sparse_codes(z_NF, absent_NF, inactive_NF, window_NF, plan)
        live = codes.live()
        rows_C = _segments(live.row_offsets)
        cost_C = live.values.to(norm_F.dtype) * norm_F[live.features]
        penalty = (cost_C if weight_N is None else cost_C * weight_N[rows_C]).sum()
        is_active = (live.values != 0) & counted_N[rows_C]
        counts_F = torch.bincount(live.features[is_active], minlength=F)
        ranked_a, offsets = live.values, live.row_offsets[:: max(T, 1)]
    min_active = torch.full((), torch.nan, device=z_NF.device)
    if activation == "batch_topk":
        min_active = _mean_smallest(ranked_a, is_active, offsets)
    return Encoded(codes, penalty, counts_F.sum(), counts_F, counted_N.sum(), min_active)


def decode(codes: Codes, W_dec_FE: Tensor, b_dec_E: Tensor, residual_NE: Tensor | None) -> Tensor:
    """``out = residual + W_decᵀ a + b_dec``, rounded once."""
    if codes.dense:
        a_NF = codes.values.view(-1, W_dec_FE.shape[0])
        if residual_NE is None:
            return torch.addmm(b_dec_E, a_NF, W_dec_FE)
        return torch.addmm(residual_NE, a_NF, W_dec_FE).add_(b_dec_E)
    live, acc = codes.live(), accumulator(W_dec_FE.dtype)
    out_NE = _gather_sum(W_dec_FE, live.features, live.row_offsets, live.values).add_(b_dec_E)
    if residual_NE is not None:
        out_NE += residual_NE.to(acc)
    return out_NE.to(W_dec_FE.dtype)


def decode_backward(
    g_NE: Tensor, codes: Codes, W_dec_FE: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor, Tensor]:
    """``da_ti = g_t·W_dec,i`` at the codes and ``dW_dec,i = Σ_t a_ti g_t``; empty if not needed."""
    da = dW = g_NE.new_empty(0)
    if codes.dense:
        a_NF = codes.values.view(-1, W_dec_FE.shape[0])
        if need_values:
            da = (g_NE @ W_dec_FE.T).flatten()
        return da, a_NF.T @ g_NE if need_W else dW
    live, g_NE = codes.live(), g_NE.contiguous()
    rows_C = _segments(live.row_offsets)
    if need_values:
        da = _pad(_sampled_product(g_NE, W_dec_FE, rows_C, live), codes.values)
    if need_W:
        by = live.order
        dW = _gather_sum(g_NE, rows_C[by], live.feature_offsets, live.values[by])
    return da, dW.to(g_NE.dtype)


def encode_backward(
    da: Tensor | None,
    c: Tensor | None,
    x_ND: Tensor,
    W_enc_FD: Tensor,
    norm_F: Tensor,
    threshold_F: Tensor | None,
    weight_N: Tensor | None,
    padding_N: Tensor | None,
    codes: Codes,
    bandwidth: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W_enc, b_enc, the decoder norms and θ; those not needed are empty.

    ``dz_ti = (da_ti + c w_t ‖W_dec,i‖)·1[a_ti > 0]``, `c` being the penalty's gradient.
    """
    (N, _), F, acc = x_ND.shape, W_enc_FD.shape[0], norm_F.dtype
    dx, dW, db, dnorm, dtheta = (x_ND.new_empty(0) for _ in range(5))
    if codes.dense:
        a_NF = codes.values.view(N, F)
        up_NF = a_NF.new_zeros(()).expand(N, F) if da is None else da.view(N, F)
        if c is not None:
            cost_NF = c * norm_F if weight_N is None else weight_N[:, None] * (c * norm_F)
            up_NF = up_NF + cost_NF
        dz_NF = torch.ops.aten.threshold_backward(up_NF, a_NF.to(up_NF.dtype), 0).to(x_ND.dtype)
        if need[0]:
            dx = dz_NF @ W_enc_FD
        if need[1]:
            if padding_N is not None:
                x_ND = x_ND.masked_fill(padding_N[:, None], 0)
            dW = dz_NF.T @ x_ND
        if need[2]:
            db = dz_NF.sum(0, dtype=acc)
        if need[3] and c is not None:
            ones_N = torch.ones(N, dtype=acc, device=a_NF.device)
            dnorm = c * (a_NF.to(acc).T @ (ones_N if weight_N is None else weight_N))
        if need[4] and threshold_F is not None:
            dtheta = torch.where(codes.window.view(N, F), up_NF, 0).sum(0, dtype=acc)
    else:
        live = codes.live()
        rows_C, by = _segments(live.row_offsets), live.order
        values_C = live.values.to(acc)
        up_C = torch.zeros_like(values_C) if da is None else da[: len(values_C)].to(acc)
        if c is not None:
            cost_C = c * norm_F[live.features]
            up_C = up_C + (cost_C if weight_N is None else cost_C * weight_N[rows_C])
        dz_C = torch.where(values_C != 0, up_C, 0)
        if need[0]:
            dx = _gather_sum(W_enc_FD, live.features, live.row_offsets, dz_C)
        if need[1]:
            dW = _gather_sum(x_ND, rows_C[by], live.feature_offsets, dz_C[by])
        if need[2]:
            db = _segment_sum(dz_C[by], live.feature_offsets)
        if need[3] and c is not None:
            weighed_C = values_C if weight_N is None else values_C * weight_N[rows_C]
            dnorm = c * _segment_sum(weighed_C[by], live.feature_offsets)
        if need[4] and threshold_F is not None:
            near_C = (values_C == 0) | _in_window(values_C, threshold_F[live.features], bandwidth)
            dtheta = _segment_sum(torch.where(near_C, up_C, 0)[by], live.feature_offsets)
    if need[3] and c is None:
        dnorm = torch.zeros_like(norm_F)
    if need[4] and threshold_F is not None:
        dtheta = (-(threshold_F.to(acc) / bandwidth) * dtheta).to(threshold_F.dtype)
    return dx.to(x_ND.dtype), dW.to(W_enc_FD.dtype), db.to(x_ND.dtype), dnorm, dtheta


# --- which entries are active ---------------------------------------------------------------------


def _inactive(
    z_NF: Tensor,
    n_rows: int,
    threshold_F: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
) -> Tensor:
    """Bool [N, F]: where a = 0. NaN is active: `z <= cut` is false for it."""
    inactive_NF = z_NF <= (0 if threshold_F is None else threshold_F.clamp(min=0))
    if padding_N is not None:
        inactive_NF |= padding_N[:, None]
    if activation == "topk":
        inactive_NF |= ~_largest(z_NF, int(k))
    elif activation == "batch_topk" and threshold_F is None and z_NF.numel():
        for group, (z_TF, out_TF) in enumerate(
            zip(z_NF.chunk(n_rows), inactive_NF.chunk(n_rows), strict=True)
        ):
            n_tokens = z_TF.shape[0]
            if padding_N is not None:
                padding_T = padding_N.chunk(n_rows)[group]
                n_tokens -= int(padding_T.sum())
                z_TF = z_TF.masked_fill(padding_T[:, None], -torch.inf)
            out_TF |= ~_largest(z_TF.reshape(1, -1), int(k * n_tokens)).view_as(out_TF)
    return inactive_NF


def _largest(z_RM: Tensor, k: int) -> Tensor:
    """True at each row's k largest; equal ones by lowest index; NaN above all.

    Entries at or below 0 may come out either way: they are inactive whatever their rank.
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


def _in_window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``|z - θ| < ε/2``, in the accumulator's dtype."""
    acc = accumulator(z.dtype)
    return (z.to(acc) - threshold.to(acc)).abs() < bandwidth / 2


def _prefers_dense(absent_NF: Tensor) -> bool:
    """Whether dense products are faster at this number of codes."""
    n_codes = absent_NF.numel() - int(absent_NF.count_nonzero())
    return n_codes > DENSE_SHARE * absent_NF.numel()


# --- codes ----------------------------------------------------------------------------------------


def _dense_codes(
    z_NF: Tensor, inactive_NF: Tensor, window_NF: Tensor | None, activation: str
) -> Codes:
    N, F = z_NF.shape
    # Equal to the general form for relu without padding, and eight times as fast.
    a_NF = z_NF.relu_() if activation == "relu" else z_NF
    a_NF.masked_fill_(inactive_NF, 0)
    index = torch.zeros(0, dtype=torch.int64, device=z_NF.device)
    window = index.bool() if window_NF is None else window_NF.flatten()
    return Codes(
        a_NF.flatten(), index.int(), index.new_zeros(N + 1), index, index.new_zeros(F + 1), window
    )


def _sparse_codes(
    z_NF: Tensor,
    absent_NF: Tensor,
    inactive_NF: Tensor,
    window_NF: Tensor | None,
    plan: Plan | None,
) -> Codes:
    N, F = z_NF.shape
    place_C = (~absent_NF).flatten().nonzero().flatten()
    rows_C = place_C // max(F, 1)
    features_C = place_C - rows_C * F
    values_C = z_NF.flatten()[place_C]
    if window_NF is not None:
        values_C.masked_fill_(inactive_NF.flatten()[place_C], 0)
    by_feature_C, order_C = features_C.sort(stable=True)
    count = torch.arange(max(N, F) + 1, device=z_NF.device)
    codes = Codes(
        values_C,
        features_C.int(),
        torch.searchsorted(rows_C, count[: N + 1]),
        order_C,
        torch.searchsorted(by_feature_C, count[: F + 1]),
        torch.zeros(0, dtype=torch.bool, device=z_NF.device),
    )
    if plan is None or plan.capacity is None:
        return codes
    if len(place_C) > plan.capacity:
        raise ValueError(
            f"transcoder: plan.capacity must hold every code; got {plan.capacity} for "
            f"{len(place_C)} codes; raise it, or give Plan(dense=True) or no plan"
        )
    buffer = values_C.new_empty(plan.capacity)
    return codes._replace(
        values=_pad(values_C, buffer),
        features=_pad(codes.features, buffer),
        order=_pad(order_C, buffer),
    )


def _pad(t_C: Tensor, like: Tensor) -> Tensor:
    """`t_C` with zeros up to the length of `like`."""
    return nnf.pad(t_C, (0, like.numel() - t_C.numel())) if len(like) > len(t_C) else t_C


# --- statistics -----------------------------------------------------------------------------------


def _column_counts(inactive_NF: Tensor, counted_N: Tensor) -> Tensor:
    """int64 [F]: active entries of counted rows. Small products beat a sum of bools eightfold."""
    counts_F = torch.zeros(inactive_NF.shape[1], dtype=torch.int64, device=inactive_NF.device)
    for inactive_nF, counted_n in zip(
        inactive_NF.split(COUNT_ROWS), counted_N.split(COUNT_ROWS), strict=True
    ):
        counts_F += (counted_n.float() @ (~inactive_nF).float()).long()
    return counts_F


def _mean_smallest(values: Tensor, is_active: Tensor, offsets_S: Tensor) -> Tensor:
    """Each segment's smallest active value, averaged over the segments that have one; else NaN."""
    smallest_S = torch.segment_reduce(
        torch.where(is_active, values, torch.inf).float(), "min", offsets=offsets_S
    )
    total = torch.cat([is_active.new_zeros(1, dtype=torch.int64), is_active.cumsum(0)])
    fires_S = total[offsets_S[1:]] > total[offsets_S[:-1]]
    return torch.where(fires_S, smallest_S, 0).sum() / fires_S.sum()


# --- sparse products ------------------------------------------------------------------------------


def _segments(offsets: Tensor) -> Tensor:
    """int64 [C]: the segment of each entry."""
    segments = torch.arange(len(offsets) - 1, device=offsets.device)
    return segments.repeat_interleave(offsets.diff())


def _segment_sum(values_C: Tensor, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(values_C, "sum", offsets=offsets)


def _gather_sum(table_MD: Tensor, index_C: Tensor, offsets: Tensor, scale_C: Tensor) -> Tensor:
    """``out_r = Σ_{c in segment r} scale_c · table[index_c]``, in the accumulator's dtype."""
    acc = accumulator(table_MD.dtype)
    if index_C.numel() == 0 or table_MD.numel() == 0:
        return table_MD.new_zeros(len(offsets) - 1, table_MD.shape[1], dtype=acc)
    return torch.embedding_bag(
        table_MD.to(acc).contiguous(),
        index_C.long(),
        offsets,
        mode=0,
        per_sample_weights=scale_C.to(acc),
        include_last_offset=True,
    )[0]


def _sampled_product(g_NE: Tensor, W_FE: Tensor, rows_C: Tensor, codes: Codes) -> Tensor:
    """``g[row_c] · W[feature_c]`` for every code, in the codes' dtype."""
    acc = accumulator(g_NE.dtype)
    if rows_C.numel() == 0 or g_NE.numel() == 0:
        return codes.values.new_zeros(rows_C.shape)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_NE.to(acc), W_FE.to(acc).contiguous(), codes.features.long(), codes.row_offsets, rows_C, 0
    ).to(codes.values.dtype)
