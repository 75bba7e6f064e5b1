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

# Share of entries that are codes above which dense products win. Measured on one AVX-512 core with
# AMX: at T=2048, d=1024, F=8192 in fp32 a step takes 0.3 + 27 * share seconds on codes and passes
# the dense 1.7 at 0.051 (0.065 to 0.075 for d of 128 and 512); a little less leaves room for
# features of uneven counts on more threads. In bf16, whose codes are multiplied in fp32, at 0.018.
DENSE_SHARE = {torch.float32: 0.045, torch.float64: 0.045}
DENSE_SHARE_16_BITS = 0.017
# Tokens that the choice between codes and dense products looks at: it need not be exact.
SAMPLE = 256
# Features searched for codes together: most blocks hold none, and a maximum is a cheap test.
BLOCK = 64
# The longest run of codes that is summed one by one.
PIECE = 256
# Rows counted together: a small product of ones and zeros beats a sum of booleans eightfold.
COUNTED_ROWS = 128


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


def encode(
    x_STD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    threshold_F: Tensor | None,
    weight_N: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
    bandwidth: float,
    plan: Plan | None,
) -> tuple[Codes, Tensor, Tensor, Tensor, Tensor]:
    """Codes and the four statistics of ``TranscoderStats``, by one dense product.

    `min_active` is -1 where there is none: NaN, which equals nothing, is put in by the caller.
    """
    S, T, _ = x_STD.shape
    N, F = S * T, W_enc_FD.shape[0]
    if padding_N is not None:
        x_STD = x_STD.masked_fill(padding_N.view(S, T, 1), 0)
    z_NF = nnf.linear(x_STD, W_enc_FD, b_enc_F).reshape(N, F)
    window_NF = None
    if activation == "jumprelu":
        assert threshold_F is not None
        window_NF = _in_window(z_NF, threshold_F, bandwidth)
        if padding_N is not None:
            window_NF &= ~padding_N[:, None]
    a_NF = _activate_(z_NF, S, threshold_F, padding_N, activation, k)

    counted_N = torch.ones(N, dtype=torch.bool, device=a_NF.device)
    if weight_N is not None:
        counted_N = weight_N != 0
    if padding_N is not None:
        counted_N = counted_N & ~padding_N

    min_active = torch.full((), -1.0, device=a_NF.device)
    if plan.dense if plan else _prefers_dense(a_NF, window_NF):
        codes = _dense_codes(a_NF, window_NF)
        counts_F = _column_counts(a_NF, counted_N)
        if activation == "batch_topk":
            active_NF = (a_NF != 0) & counted_N[:, None]
            offsets_S = torch.arange(S + 1, device=a_NF.device) * (T * F)
            min_active = _mean_smallest(a_NF.flatten(), active_NF.flatten(), offsets_S)
    else:
        codes = _sparse_codes(a_NF, window_NF, plan)
        live = codes.live()
        active_C = (live.values != 0) & counted_N[_segments(live.row_offsets)]
        counts_F = torch.bincount(live.features[active_C], minlength=F)
        if activation == "batch_topk":
            min_active = _mean_smallest(live.values, active_C, live.row_offsets[:: max(T, 1)])
    return codes, counts_F.sum(), counts_F, counted_N.sum(), min_active


def encode_backward(
    da: Tensor,
    x_ND: Tensor,
    W_enc_FD: Tensor,
    threshold_F: Tensor | None,
    padding_N: Tensor | None,
    codes: Codes,
    bandwidth: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, W_enc, b_enc and θ from the codes' `da`; those not needed are empty.

    ``dz_ti = da_ti·1[a_ti > 0]``; only JumpReLU has entries where the two differ.
    """
    (N, _), F, acc = x_ND.shape, W_enc_FD.shape[0], accumulator(x_ND.dtype)
    dx, dW, db, dtheta = (x_ND.new_empty(0) for _ in range(4))
    live = codes if codes.dense else codes.live()
    da = dz = da[: live.values.numel()]
    if threshold_F is not None:
        dz = torch.where(live.values != 0, da, 0)
    if codes.dense:
        dz_NF = dz.view(N, F)
        if need[0]:
            dx = dz_NF @ W_enc_FD
        if need[1]:
            if padding_N is not None:
                x_ND = x_ND.masked_fill(padding_N[:, None], 0)
            dW = dz_NF.T @ x_ND
        if need[2]:
            db = dz_NF.sum(0, dtype=acc)
        if need[3]:
            dtheta = torch.where(codes.window, da, 0).view(N, F).sum(0, dtype=acc)
    else:
        rows_C, by = _segments(live.row_offsets), live.order
        if need[0]:
            dx = _gather_sum(W_enc_FD, live.features, live.row_offsets, dz)
        if need[1]:
            dW = _gather_sum(x_ND, rows_C[by], live.feature_offsets, dz[by])
        if need[2]:
            db = _segment_sum(dz[by], live.feature_offsets)
        if need[3]:
            assert threshold_F is not None
            near_C = _in_window(live.values, threshold_F[live.features], bandwidth)
            near_C |= live.values == 0
            dtheta = _segment_sum(torch.where(near_C, da, 0)[by], live.feature_offsets)
    if need[3]:
        assert threshold_F is not None
        dtheta = (-(threshold_F.double() / bandwidth) * dtheta).to(threshold_F.dtype)
    return dx.to(x_ND.dtype), dW.to(x_ND.dtype), db.to(x_ND.dtype), dtheta


def decode(
    codes: Codes,
    W_dec_FE: Tensor,
    b_dec_E: Tensor,
    residual_NE: Tensor | None,
    weight_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out = residual + W_decᵀ a + b_dec``, rounded once, and the penalty."""
    norm_F = _norm(W_dec_FE)
    if codes.dense:
        a_NF = codes.values.view(-1, W_dec_FE.shape[0])
        penalty_N = a_NF.to(norm_F.dtype) @ norm_F
        penalty = penalty_N.sum() if weight_N is None else penalty_N @ weight_N
        if residual_NE is None:
            return torch.addmm(b_dec_E, a_NF, W_dec_FE), penalty
        return torch.addmm(residual_NE, a_NF, W_dec_FE).add_(b_dec_E), penalty
    live = codes.live()
    cost_C = live.values.to(norm_F.dtype) * norm_F[live.features]
    if weight_N is not None:
        cost_C *= weight_N[_segments(live.row_offsets)]
    out_NE = _gather_sum(W_dec_FE, live.features, live.row_offsets, live.values)
    out_NE += b_dec_E
    if residual_NE is not None:
        out_NE += residual_NE
    return out_NE.to(W_dec_FE.dtype), cost_C.sum()


def decode_backward(
    g_NE: Tensor | None,
    c: Tensor | None,
    codes: Codes,
    W_dec_FE: Tensor,
    weight_N: Tensor | None,
    need_values: bool,
    need_W: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the codes and of W_dec, given those of out (`g`) and penalty (`c`).

    ``da_ti = g_t·W_dec,i + c w_t ‖W_dec,i‖`` and
    ``dW_dec,i = Σ_t a_ti g_t + c Σ_t w_t a_ti W_dec,i/‖W_dec,i‖`` (0 at a zero row).
    Dense: `da` is 0 where there is no code. What is not needed is empty.
    """
    F, E = W_dec_FE.shape
    da = dW = W_dec_FE.new_empty(0)
    norm_F = _norm(W_dec_FE)
    spent_F = norm_F.new_zeros(F)  # Σ_t w_t a_ti
    if codes.dense:
        a_NF = codes.values.view(-1, F)
        if need_values:
            da = _dense_da(g_NE, c, a_NF, W_dec_FE, norm_F, weight_N)
            if codes.window.numel() == 0:
                torch.ops.aten.threshold_backward.grad_input(da, a_NF, 0, grad_input=da)
            da = da.flatten()
        if need_W:
            dW = a_NF.new_zeros(F, E) if g_NE is None else a_NF.T @ g_NE
            ones_N = norm_F.new_ones(len(a_NF)) if weight_N is None else weight_N
            spent_F = spent_F if c is None else a_NF.to(norm_F.dtype).T @ ones_N
    else:
        live = codes.live()
        rows_C, by = _segments(live.row_offsets), live.order
        g_NE = norm_F.new_zeros(len(codes.row_offsets) - 1, E) if g_NE is None else g_NE
        if need_values:
            da = _sampled_product(g_NE, W_dec_FE, rows_C, live)
            if c is not None:
                cost_C = c * norm_F[live.features]
                da += cost_C if weight_N is None else cost_C * weight_N[rows_C]
            da = _pad(da.to(codes.values.dtype), codes.values)
        if need_W:
            dW = _gather_sum(g_NE, rows_C[by], live.feature_offsets, live.values[by])
            if c is not None:
                weighed_C = live.values.to(norm_F.dtype)
                weighed_C = weighed_C if weight_N is None else weighed_C * weight_N[rows_C]
                spent_F = _segment_sum(weighed_C[by], live.feature_offsets)
    if need_W and c is not None:
        scale_F = torch.where(norm_F > 0, c * spent_F / norm_F, 0)
        dW.addcmul_(W_dec_FE.to(dW.dtype), scale_F.to(dW.dtype)[:, None])
    return da, dW.to(W_dec_FE.dtype)


def _dense_da(
    g_NE: Tensor | None,
    c: Tensor | None,
    a_NF: Tensor,
    W_dec_FE: Tensor,
    norm_F: Tensor,
    weight_N: Tensor | None,
) -> Tensor:
    """``g_t·W_dec,i + c w_t ‖W_dec,i‖`` at every entry."""
    if c is None:
        assert g_NE is not None
        return g_NE @ W_dec_FE.T
    cost = c * norm_F if weight_N is None else weight_N[:, None] * (c * norm_F)
    cost = cost.to(a_NF.dtype)
    if g_NE is None:
        return cost.expand_as(a_NF).clone()
    return torch.addmm(cost, g_NE, W_dec_FE.T)


def _norm(W_dec_FE: Tensor) -> Tensor:
    """``‖W_dec,i‖₂`` in the accumulator's dtype."""
    return torch.linalg.vector_norm(W_dec_FE, dim=-1, dtype=accumulator(W_dec_FE.dtype))


# --- which entries are active ---------------------------------------------------------------------


def _activate_(
    z_NF: Tensor,
    n_rows: int,
    threshold_F: Tensor | None,
    padding_N: Tensor | None,
    activation: str,
    k: float,
) -> Tensor:
    """Turns z into a, in place. NaN is active: `z <= cut` is false for it."""
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
            largest = _largest(z_TF.reshape(1, -1), int(k * n_tokens))
            torch.logical_not(largest.view_as(inactive_TF), out=inactive_TF)
    elif threshold_F is not None:
        inactive_NF = z_NF <= threshold_F
    if inactive_NF is not None:
        z_NF.masked_fill_(inactive_NF, 0)
    if padding_N is not None:
        z_NF.masked_fill_(padding_N[:, None], 0)
    return z_NF.relu_()


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


def _prefers_dense(a_NF: Tensor, window_NF: Tensor | None) -> bool:
    """Whether dense products are likely faster, by a sample of the tokens."""
    step = max(1, len(a_NF) // SAMPLE)
    present = a_NF[::step] != 0
    if window_NF is not None:
        present |= window_NF[::step]
    share = DENSE_SHARE.get(a_NF.dtype, DENSE_SHARE_16_BITS)
    return int(present.count_nonzero()) > share * present.numel()


# --- codes ----------------------------------------------------------------------------------------


def _dense_codes(a_NF: Tensor, window_NF: Tensor | None) -> Codes:
    N, F = a_NF.shape
    index = torch.zeros(0, dtype=torch.int64, device=a_NF.device)
    window = index.bool() if window_NF is None else window_NF.flatten()
    offsets = index.new_zeros(N + 1), index.new_zeros(F + 1)
    return Codes(a_NF.flatten(), index.int(), offsets[0], index, offsets[1], window)


def _sparse_codes(a_NF: Tensor, window_NF: Tensor | None, plan: Plan | None) -> Codes:
    N, F = a_NF.shape
    place_C = _places(a_NF, window_NF)
    rows_C = place_C // max(F, 1)
    features_C = place_C - rows_C * F
    by_feature_C, order_C = features_C.sort(stable=True)
    count = torch.arange(max(N, F) + 1, device=a_NF.device)
    codes = Codes(
        a_NF.flatten()[place_C],
        features_C.int(),
        torch.searchsorted(rows_C, count[: N + 1]),
        order_C,
        torch.searchsorted(by_feature_C, count[: F + 1]),
        torch.zeros(0, dtype=torch.bool, device=a_NF.device),
    )
    if plan is None or plan.capacity is None:
        return codes
    if len(place_C) > plan.capacity:
        raise ValueError(
            f"transcoder: plan.capacity must hold every code; got {plan.capacity} for "
            f"{len(place_C)} codes; raise it, or give Plan(dense=True) or no plan"
        )
    buffer = place_C.new_empty(plan.capacity)
    return codes._replace(
        values=_pad(codes.values, buffer),
        features=_pad(codes.features, buffer),
        order=_pad(codes.order, buffer),
    )


def _places(a_NF: Tensor, window_NF: Tensor | None) -> Tensor:
    """int64 [C]: where in the flattened a there is a code, ascending."""
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


def _pad(t_C: Tensor, like: Tensor) -> Tensor:
    """`t_C` with zeros up to the length of `like`."""
    return nnf.pad(t_C, (0, len(like) - len(t_C))) if len(like) > len(t_C) else t_C


# --- statistics -----------------------------------------------------------------------------------


def _column_counts(a_NF: Tensor, counted_N: Tensor) -> Tensor:
    """int64 [F]: active entries of counted rows."""
    counts_F = torch.zeros(a_NF.shape[1], dtype=torch.int64, device=a_NF.device)
    for a_nF, counted_n in zip(
        a_NF.split(COUNTED_ROWS), counted_N.split(COUNTED_ROWS), strict=True
    ):
        counts_F += (counted_n.float() @ (a_nF != 0).float()).long()
    return counts_F


def _mean_smallest(values: Tensor, is_active: Tensor, offsets_S: Tensor) -> Tensor:
    """Each segment's smallest active value, averaged over the segments that have one; else -1."""
    smallest_S = torch.segment_reduce(
        torch.where(is_active, values, torch.inf).float(), "min", offsets=offsets_S
    )
    total = nnf.pad(is_active.cumsum(0), (1, 0))
    fires_S = total[offsets_S[1:]] > total[offsets_S[:-1]]
    mean = torch.where(fires_S, smallest_S, 0).sum() / fires_S.sum()
    return torch.where(fires_S.any(), mean, -1)


# --- sparse products ------------------------------------------------------------------------------


def _segments(offsets: Tensor) -> Tensor:
    """int64 [C]: the segment of each entry."""
    segments = torch.arange(len(offsets) - 1, device=offsets.device)
    return segments.repeat_interleave(offsets.diff())


def _segment_sum(values_C: Tensor, offsets: Tensor) -> Tensor:
    """Sums of consecutive entries; in float64, since a hot feature's are summed one by one."""
    return torch.segment_reduce(values_C.double(), "sum", offsets=offsets)


def _gather_sum(table_MD: Tensor, index_C: Tensor, offsets: Tensor, scale_C: Tensor) -> Tensor:
    """``out_r = Σ_{c in segment r} scale_c · table[index_c]``, in the accumulator's dtype.

    Segments longer than PIECE (features that fire on most tokens) are summed in pieces and the
    pieces in order, as rounding grows with the length of a sum.
    """
    acc = accumulator(table_MD.dtype)
    if index_C.numel() == 0 or table_MD.numel() == 0:
        return table_MD.new_zeros(len(offsets) - 1, table_MD.shape[1], dtype=acc)
    table_MD, index_C, scale_C = table_MD.to(acc).contiguous(), index_C.long(), scale_C.to(acc)
    counts = offsets.diff()
    hot = (counts > PIECE).nonzero().flatten()
    if len(hot) == 0:
        return _bags(table_MD, index_C, offsets, scale_C)
    in_hot_C = (counts > PIECE).repeat_interleave(counts)
    short = counts.masked_fill(counts > PIECE, 0)
    out = _bags(table_MD, index_C[~in_hot_C], _offsets(short), scale_C[~in_hot_C])
    pieces_H = (counts[hot] + PIECE - 1) // PIECE
    lengths = torch.full((int(pieces_H.sum()),), PIECE, device=offsets.device)
    lengths[pieces_H.cumsum(0) - 1] -= pieces_H * PIECE - counts[hot]  # each one's last piece
    pieces = _bags(table_MD, index_C[in_hot_C], _offsets(lengths), scale_C[in_hot_C])
    every = torch.arange(len(lengths), device=offsets.device)
    out[hot] = _bags(pieces, every, _offsets(pieces_H), pieces.new_ones(len(lengths)))
    return out


def _offsets(lengths: Tensor) -> Tensor:
    return nnf.pad(lengths.cumsum(0), (1, 0))


def _bags(table_MD: Tensor, index_C: Tensor, offsets: Tensor, scale_C: Tensor) -> Tensor:
    return torch.embedding_bag(
        table_MD, index_C, offsets, mode=0, per_sample_weights=scale_C, include_last_offset=True
    )[0]


def _sampled_product(g_NE: Tensor, W_FE: Tensor, rows_C: Tensor, codes: Codes) -> Tensor:
    """``g[row_c] · W[feature_c]`` for every code, in the accumulator's dtype."""
    acc = accumulator(W_FE.dtype)
    if rows_C.numel() == 0 or W_FE.numel() == 0:
        return W_FE.new_zeros(len(rows_C), dtype=acc)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_NE.to(acc).contiguous(),
        W_FE.to(acc).contiguous(),
        codes.features.long(),
        codes.row_offsets,
        rows_C,
        0,
    )
