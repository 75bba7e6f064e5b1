"""Codes, the sparse activations: which entries of a dense z are active, and their two orders.

Codes are CSR by token: `values`, `features` (ascending in a row) and `row_offsets`, with `order`,
the permutation to by-feature order (tokens ascending), each code's token in that order, `tokens`,
and `feature_offsets`; these three only where the weights get a gradient. An entry of value 0
is an inactive one in JumpReLU's window: it carries gradient to θ alone. Where dense products are
faster, `values` is all of a [N, F], flattened, `features` is empty and `window` marks JumpReLU's
window.

Shape suffixes: N tokens (of all rows of x), T tokens of a row, F features, C codes, K blocks of B
features; in ranking, R rows of M entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .reference import SparseCodes, accumulator, codes_of

# Share of entries that are codes above which dense products win. Measured on one AVX-512 core with
# AMX: at T=2048, d=1024, F=8192 in fp32 a step takes 0.3 + 27 * share seconds on codes and passes
# the dense 1.7 at 0.051 (0.065 to 0.075 for d of 128 and 512); a little less leaves room for
# features of uneven counts on more threads. In bf16, whose codes are multiplied in fp32, at 0.018.
DENSE_SHARE = {torch.float32: 0.045, torch.float64: 0.045}
DENSE_SHARE_16_BITS = 0.017
# On a GPU not yet measured: where gathering a row of 16 bits at 4.3 TB/s takes as long as its share
# of a product at 788 TFLOP/s; in fp32, of 4 bytes at some 60 TFLOP/s.
DENSE_SHARE_GPU = {torch.float32: 0.036}
DENSE_SHARE_GPU_16_BITS = 0.0055
# Buffers hold this many times the expected codes, and a few more, in steps that repeat.
HEADROOM = 1.5
CAPACITY_STEP = 16_384
# Entries up to which, without a plan or gradients, buffers for all of them cost less than to wait
# for a count; so generation never waits, and can be captured as a graph.
SMALL_ENTRIES = 2**22
# Tokens that the choice between codes and dense products looks at: it need not be exact.
SAMPLE = 256
# Features searched for codes together: most blocks hold none, and a maximum is a cheap test.
BLOCK = 64


class CodeLayout(NamedTuple):
    """How to lay the codes out: a host value, so that path and shapes are known beforehand."""

    dense: bool  #: dense products, or codes.
    capacity: int | None = None  #: length of the code buffers (sparse only); None: as needed.


def dense_share(dtype: torch.dtype, device_type: str) -> float:
    """Share of entries that are codes above which dense products win."""
    if device_type == "cuda":
        return DENSE_SHARE_GPU.get(dtype, DENSE_SHARE_GPU_16_BITS)
    return DENSE_SHARE.get(dtype, DENSE_SHARE_16_BITS)


def plan_for(
    codes_per_token: float, n_tokens: int, n_features: int, dtype: torch.dtype, device_type: str
) -> CodeLayout:
    """The plan of a call that should find about `codes_per_token` codes on each of its tokens.

    Args:
        codes_per_token: as a call before it found: ``stats.n_codes`` over its tokens.
        n_tokens: of the call, all rows of x together.
        n_features: F.
        dtype, device_type: of x: they decide where dense products win.

    Returns:
        Dense, or codes with room for half as many again, and never more than there are entries.
    """
    if codes_per_token > dense_share(dtype, device_type) * n_features:
        return CodeLayout(dense=True)
    entries = n_tokens * n_features
    wanted = int(HEADROOM * codes_per_token * n_tokens) + CAPACITY_STEP
    return CodeLayout(False, min(entries, -(-wanted // CAPACITY_STEP) * CAPACITY_STEP))


class Codes(NamedTuple):
    """What the encoder leaves for the decoder and for both backward passes."""

    values: Tensor  #: x's dtype, [C]; dense: [N * F].
    features: Tensor  #: int32 [C]; dense: [0].
    row_offsets: Tensor  #: int64 [N + 1].
    order: Tensor  #: int64 [C]: code indices by feature, tokens ascending; dense: [0].
    tokens: Tensor  #: int32 [C]: each code's token, in the order by feature; dense: [0].
    feature_offsets: Tensor  #: int64 [F + 1]; [0] where codes are not ordered by feature.
    window: Tensor  #: bool [N * F] for dense jumprelu, else [0].

    @property
    def dense(self) -> bool:
        """Whether `values` holds every entry."""
        return self.features.numel() == 0 and self.values.numel() > 0

    def live(self) -> Codes:
        """Without the unused tail of buffers longer than the codes."""
        n = int(self.row_offsets[-1])
        return self._replace(
            values=self.values[:n],
            features=self.features[:n],
            order=self.order[:n],
            tokens=self.tokens[:n],
        )


def active_codes(codes: Codes, n_features: int) -> SparseCodes:
    """What is active among `codes`, without buffers' tails and what only JumpReLU's window holds.

    On a GPU this waits for their number.
    """
    n_tokens = len(codes.row_offsets) - 1
    values = codes.values.detach()
    if codes.dense:
        a_NF = values.view(n_tokens, n_features)
        place_C = _places(a_NF, None)
        tokens_C = place_C // max(n_features, 1)
        return SparseCodes(tokens_C, place_C - tokens_C * n_features, values[place_C])
    n = int(codes.row_offsets[-1])
    every = torch.arange(n_tokens, device=values.device)
    tokens_C = every.repeat_interleave(codes.row_offsets.diff(), output_size=n)
    found = SparseCodes(tokens_C, codes.features[:n].long(), values[:n])
    active_C = found.values != 0
    return found if bool(active_C.all()) else SparseCodes(*(t[active_C] for t in found))


def activate_(
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


def in_window(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``|z - max(θ, 0)| < ε/2``, in the accumulator's dtype."""
    acc = accumulator(z.dtype)
    return (z.to(acc) - threshold.to(acc).clamp(min=0)).abs() < bandwidth / 2


def prefers_dense(a_NF: Tensor, window_NF: Tensor | None) -> bool:
    """Whether dense products are likely faster, by a sample of the tokens."""
    step = max(1, len(a_NF) // SAMPLE)
    present = a_NF[::step] != 0
    if window_NF is not None:
        present |= window_NF[::step]
    return int(present.count_nonzero()) > dense_share(a_NF.dtype, "cpu") * present.numel()


def dense_codes(a_NF: Tensor, window_NF: Tensor | None, *, ordered: bool) -> Codes:
    """All of a [N, F] as codes, for dense products."""
    N, F = a_NF.shape
    index = torch.zeros(0, dtype=torch.int64, device=a_NF.device)
    rows, columns = index.new_zeros(N + 1), index.new_zeros(F + 1 if ordered else 0)
    window = index.bool() if window_NF is None else window_NF.flatten()
    return Codes(a_NF.flatten(), index.int(), rows, index, index.int(), columns, window)


def sparse_codes(
    a_NF: Tensor, window_NF: Tensor | None, plan: CodeLayout | None, *, ordered: bool
) -> Codes:
    """The active entries of a [N, F] (and those in the window), in buffers of the plan's size."""
    N, F = a_NF.shape
    place_C = _places(a_NF, window_NF)
    rows_C = place_C // max(F, 1)
    features_C = place_C - rows_C * F
    count = torch.arange(max(N, F) + 1, device=a_NF.device)
    none = count.new_zeros(0)
    codes = Codes(
        a_NF.flatten()[place_C],
        features_C.int(),
        torch.searchsorted(rows_C, count[: N + 1]),
        none,
        none.int(),
        none.clone(),
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
    if len(place_C) > plan.capacity:
        raise ValueError(
            f"transcoder: plan.capacity must hold every code; got {plan.capacity} for "
            f"{len(place_C)} codes; raise it, or give CodeLayout(dense=True) or no plan"
        )
    buffer = place_C.new_empty(plan.capacity)
    return codes._replace(
        values=pad(codes.values, buffer),
        features=pad(codes.features, buffer),
        order=pad(codes.order, buffer) if ordered else codes.order,
        tokens=pad(codes.tokens, buffer) if ordered else codes.tokens,
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


def pad(t_C: Tensor, like: Tensor) -> Tensor:
    """`t_C` with zeros up to the length of `like`."""
    return nnf.pad(t_C, (0, len(like) - len(t_C))) if len(like) > len(t_C) else t_C
