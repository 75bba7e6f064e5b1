"""Compute the encoder on a GPU: products, activations, and flags of the codes.

Both launchers produce flags and values::

    words   int32   [N, W]   bit j of word w: whether entry 32 w + j is a code
    values  x's     [N, F]   the activation at a code, arbitrary elsewhere

No buffer can overflow, and the order of programs does not matter.

- :func:`mark_product`: one pass over the result of the library's product, a row per program. It
  is bound by reading that result (123 MB at 7,500 tokens and 8,192 features in 16 bits).
- :func:`multiply_few_and_mark`: few tokens, bound by reading W_enc once.

Product and bias are summed in fp32 and rounded once to x's dtype (by the library's ``linear`` for
the first launcher). The rounded value is compared with 0 or the threshold, and is stored.

Shape suffixes: N tokens, D width, F features, W words of 32 features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_bits import pack, popcount

# Activations of the kernels. Ranked activations flag all positive entries; the cut follows later.
RELU, THRESHOLD, JUMPRELU = (tl.constexpr(kind) for kind in range(3))

MARK: dict[str, Any] = {"BLOCK_W": 64, "num_warps": 4}
# One word of features per program, so that about 256 programs saturate the memory bandwidth.
MULTIPLY_FEW_16_BITS: dict[str, Any] = {"BLOCK_D": 128, "num_warps": 4, "num_stages": 3}
MULTIPLY_FEW_32_BITS = MULTIPLY_FEW_16_BITS | {"BLOCK_D": 64}
#: Largest number of tokens in one block of rows, so that W_enc is read once.
FEW = 64


def words_for(n_tokens: int, n_features: int, like: Tensor) -> Tensor:
    """Return uninitialised words for the flags of all entries, int32 [N, W]."""
    return like.new_empty((n_tokens, -(-n_features // 32)), dtype=torch.int32)


@triton.jit
def load_cut(cut_ptr, features, inside, CUT_STRIDE: tl.constexpr):
    """Load max(θ, 0) in fp32. A NaN stays NaN, below which every positive entry is active."""
    if CUT_STRIDE == 0:
        cut = tl.where(inside, tl.load(cut_ptr).to(tl.float32), 0.0)
    else:
        cut = tl.load(cut_ptr + features, mask=inside, other=0.0).to(tl.float32)
    return tl.where(cut < 0, 0.0, cut)


@triton.jit
def activate(z, cut, half_bandwidth, ACTIVATION: tl.constexpr):
    """Return (a, flags) of pre-activations in x's dtype; flags are int32, and set for NaN."""
    wide = z.to(tl.float32)
    flags = ~((wide <= 0) | (wide <= cut))
    a = z
    if ACTIVATION == JUMPRELU:
        a = tl.where(flags, z, 0.0).to(z.dtype)
        flags = flags | (tl.abs(wide - cut) < half_bandwidth)
    return a, flags.to(tl.int32)


@triton.jit
def mark(
    values_ptr, cut_ptr, padding_ptr, words_ptr, before_ptr, counts_ptr, window_ptr, F,
    half_bandwidth, ACTIVATION: tl.constexpr, CUT_STRIDE: tl.constexpr, HAS_PADDING: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Replace a row of pre-activations by activations; write flags and their numbers.

    DENSE writes zeros at inactive entries and JumpReLU's window, and no numbers before a word.
    """
    row = tl.program_id(0).to(tl.int64)
    n_words = (F + 31) // 32
    n_codes = 0
    for w0 in tl.range(0, n_words, BLOCK_W):
        word = w0 + tl.arange(0, BLOCK_W)
        feature = word[:, None] * 32 + tl.arange(0, 32)[None, :]
        inside = feature < F
        place = row * F + feature
        z = tl.load(values_ptr + place, mask=inside, other=0.0)
        cut = 0.0
        if ACTIVATION != RELU:
            cut = load_cut(cut_ptr, feature, inside, CUT_STRIDE)
        a, flags = activate(z, cut, half_bandwidth, ACTIVATION)
        flags = tl.where(inside, flags, 0)
        if HAS_PADDING:
            flags = tl.where(tl.load(padding_ptr + row) != 0, 0, flags)
        words = pack(flags)
        counts = popcount(words)
        tl.store(words_ptr + row * n_words + word, words, mask=word < n_words)
        if DENSE:
            tl.store(values_ptr + place, tl.where(flags != 0, a, 0.0).to(a.dtype), mask=inside)
            if ACTIVATION == JUMPRELU:
                window = (flags != 0) & (tl.abs(z.to(tl.float32) - cut) < half_bandwidth)
                tl.store(window_ptr + place, window.to(tl.int8), mask=inside)
        else:
            before = n_codes + tl.cumsum(counts, 0) - counts
            tl.store(before_ptr + row * n_words + word, before, mask=word < n_words)
            if ACTIVATION == JUMPRELU:  # other codes' activations equal their pre-activations
                tl.store(values_ptr + place, a, mask=flags != 0)
        n_codes += tl.sum(counts, axis=0)
    tl.store(counts_ptr + row, n_codes)


@triton.jit(do_not_specialize=["N"])
def multiply_few_mark(
    x_ptr, W_ptr, bias_ptr, cut_ptr, padding_ptr, values_ptr, words_ptr, N, F, D, x_stride,
    W_stride, half_bandwidth, ACTIVATION: tl.constexpr, CUT_STRIDE: tl.constexpr,
    HAS_PADDING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute x Wᵀ for up to BLOCK_N tokens; write flags, and values where a flag is set.

    A program computes one word of features of all tokens, so each row of W is read once. The store
    of values, mostly masked out, has no branch around it: a branch saves little, and the compiler
    for Blackwell rejects it.
    """
    word = tl.program_id(0).to(tl.int64)
    features = word * 32 + tl.arange(0, 32)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, 32), dtype=tl.float32)
    for d0 in tl.range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + d[None, :],
            mask=(rows < N)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        W = tl.load(
            W_ptr + features[:, None] * W_stride + d[None, :],
            mask=(features < F)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, W.T, acc, input_precision="ieee")
    bias = tl.load(bias_ptr + features, mask=features < F, other=0.0).to(tl.float32)
    cut = 0.0
    if ACTIVATION != RELU:
        cut = load_cut(cut_ptr, features, features < F, CUT_STRIDE)[None, :]
    z = (acc + bias[None, :]).to(values_ptr.dtype.element_ty)
    a, flags = activate(z, cut, half_bandwidth, ACTIVATION)
    inside = (rows < N)[:, None] & (features < F)[None, :]
    if HAS_PADDING:
        inside = inside & (tl.load(padding_ptr + rows, mask=rows < N, other=1) == 0)[:, None]
    flags = tl.where(inside, flags, 0)
    tl.store(words_ptr + rows * ((F + 31) // 32) + word, pack(flags), mask=rows < N)
    tl.store(values_ptr + rows[:, None] * F + features[None, :], a, mask=flags != 0)


class Activation:
    """Kernel arguments of an activation.

    Args:
        threshold_F: θ, or None for relu and for the ranked activations.
        bandwidth: ε of jumprelu, whose window then holds codes too; 0 for no window.
        padding_N: bool, True on padding; or None.
    """

    def __init__(
        self, threshold_F: Tensor | None, bandwidth: float, padding_N: Tensor | None
    ) -> None:
        self.jumps = threshold_F is not None and bandwidth > 0
        kind = RELU if threshold_F is None else JUMPRELU if self.jumps else THRESHOLD
        self.half_bandwidth = bandwidth / 2
        if threshold_F is not None and threshold_F.stride(0) > 1:
            threshold_F = threshold_F.contiguous()
        self.threshold_F = threshold_F
        stride = 0 if threshold_F is None else min(threshold_F.stride(0), 1)  # 0: one θ for all
        self.padding_N = None if padding_N is None else padding_N.contiguous().view(torch.uint8)
        self.cut = {"ACTIVATION": kind.value, "CUT_STRIDE": stride}
        self.constants = self.cut | {"HAS_PADDING": padding_N is not None}


class Flags(NamedTuple):
    """Flags of the codes, and their numbers."""

    words: Tensor  #: int32 [N, W].
    before: Tensor  #: int32 [N, W]: number of a row's flags before each word.
    counts: Tensor  #: int32 [N]: number of a row's flags.


def empty_flags(words: Tensor) -> Flags:
    """Return the flags of `words`, with uninitialised numbers."""
    return Flags(words, torch.empty_like(words), words.new_empty(len(words)))


def mark_product(z_NF: Tensor, activation: Activation, *, dense: bool) -> tuple[Flags, Tensor]:
    """Replace pre-activations by activations, in place.

    With `dense`, `z_NF` becomes 0 at inactive entries, and `before` stays uninitialised.

    Returns:
        flags, and window: bool [N, F] for dense jumprelu, else [0].
    """
    N, F = z_NF.shape
    flags = empty_flags(words_for(N, F, z_NF))
    window = z_NF.new_empty((N, F) if dense and activation.jumps else 0, dtype=torch.bool)
    if N:
        mark[(N,)](
            z_NF,
            activation.threshold_F,
            activation.padding_N,
            *flags,
            window.view(torch.uint8),
            F,
            activation.half_bandwidth,
            **activation.constants,
            DENSE=dense,
            **MARK,
        )
    return flags, window


def multiply_few_and_mark(
    x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Compute words and values for few tokens, bound by the bandwidth of reading W_enc."""
    (N, D), F = x_ND.shape, W_enc_FD.shape[0]
    values = x_ND.new_empty(N, F)
    words = words_for(N, F, x_ND)
    if values.numel():
        x_ND, W_enc_FD = last_contiguous(x_ND), last_contiguous(W_enc_FD)
        block = 16 if N <= 16 else FEW  # two sizes only: every size compiles a kernel
        wide = x_ND.dtype == torch.float32
        options = MULTIPLY_FEW_32_BITS if wide else MULTIPLY_FEW_16_BITS
        if x_ND.stride(0) % 16 or W_enc_FD.stride(0) % 16:  # single elements take more registers
            options = options | {"BLOCK_D": options["BLOCK_D"] // 2}
        multiply_few_mark[(words.shape[1], triton.cdiv(N, block))](
            x_ND,
            W_enc_FD,
            b_enc_F.contiguous(),
            activation.threshold_F,
            activation.padding_N,
            values,
            words,
            N,
            F,
            D,
            x_ND.stride(0),
            W_enc_FD.stride(0),
            activation.half_bandwidth,
            **activation.constants,
            BLOCK_N=block,
            **options,
        )
    return words, values


def last_contiguous(t: Tensor) -> Tensor:
    """Return `t`, copied if its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.numel() == 0 else t.contiguous()
