"""Transcoder op: encoder, ReLU-like activation, sparse decoder and decoder-norm penalty.

:func:`transcoder` is the op. :func:`transcode` is its output alone, for inference.

:data:`SAVED_OPS` lists the ops whose results selective checkpointing should save, so that a
recompute skips the encoder's matrix product. :func:`should_save` restricts this to sparse codes::

    context_fn = partial(create_selective_checkpoint_contexts, SAVED_OPS)
    checkpoint(block, h, use_reentrant=False, context_fn=context_fn)
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastadapt.kernels import device as devices

from . import autograd
from .autograd import SAVED_OPS, encode_and_decode, should_save
from .codes import SMALL_ENTRIES, CodeLayout, plan_for
from .reference import (
    L1,
    PENALTIES,
    Penalty,
    SparseCodes,
    TranscoderOutput,
    TranscoderStats,
    accumulator,
    is_ranked,
    reference,
    row_shape,
)

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "L1",
    "PENALTIES",
    "SAVED_OPS",
    "SMALL_ENTRIES",
    "CodeLayout",
    "Penalty",
    "SparseCodes",
    "TranscoderOutput",
    "TranscoderStats",
    "plan_for",
    "should_save",
    "transcode",
    "transcoder",
]

#: Names for the argument ``activation`` of :func:`transcoder`.
ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu")
#: Names for its argument ``implementation``.
IMPLEMENTATIONS = ("auto", "reference", "sparse", "triton")


def transcoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    activation: str = "relu",
    k: float | None = None,
    threshold: Tensor | None = None,
    bandwidth: float | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    penalty: str = "l1",
    penalty_scale: float | None = None,
    plan: CodeLayout | None = None,
    implementation: str = "auto",
    return_codes: bool = False,
) -> TranscoderOutput:
    """Compute ``out = residual + W_decᵀ a + b_dec`` with ``a = activation(W_enc x + b_enc)``.

    Formulas: arXiv 2602.20904 (adapter and penalty), arXiv 2407.14435 (jumprelu), Anthropic's
    "Circuits Updates", January 2025 (tanh penalty). An entry of a is
    a code where ``a > 0``. All floating arguments except `mask` and `threshold` have x's dtype.
    Autocast casts them to its dtype, except for float64. Sums accumulate in fp32 (float64 for
    float64 x).

    Args:
        x: ``[..., T, d_in]``: rows of T tokens, in any number of leading dimensions; ``[d_in]`` is
            one token.
        W_enc: ``[F, d_in]``, one row per feature.
        b_enc: ``[F]``.
        W_dec: ``[F, d_out]``, one row per feature.
        b_dec: ``[d_out]``.
        activation: one of

            - ``"relu"``: ``a = max(z, 0)``.
            - ``"topk"``: the `k` largest positive entries of each token. Of equal entries, the
              lowest feature ranks first.
            - ``"batch_topk"``: the ``floor(k·n)`` largest positive entries of each row of x
              (``[T, d_in]``), where n is the row's number of tokens without padding. Of equal
              entries, the lowest (token, feature) ranks first. With `threshold` instead of `k`
              (inference): ``a = z·1[z > max(threshold, 0)]``.
            - ``"jumprelu"``: ``a = z·1[z > θ⁺]`` with θ = `threshold`, θ⁺ = max(θ, 0).
              ``∂a/∂θ = -(|θ|/ε)·1[|z-θ⁺| < ε/2]``, also where ``a = 0``; ε = `bandwidth`.
        k: integer in 0..F (topk), number in 0..F (batch_topk), else None.
        threshold: ``[F]`` (jumprelu, differentiable); 0-d or ``[F]`` (batch_topk at inference).
        bandwidth: > 0 (jumprelu), else None.
        residual: x's leading shape and d_out; None is 0.
        mask: bool or floating, x's leading shape: weight of each token in `penalty`. Statistics
            count tokens of non-zero weight. None is weight 1. Not differentiable.
        padding: bool, x's leading shape, True on padding. Padding tokens have no codes (``out =
            residual + b_dec``), no rank and no weight, for any value of x. None is no padding.
        penalty: function φ of ``u = a_ti ‖W_dec,i‖₂``:

            - ``"l1"``: ``φ(u) = u``.
            - ``"tanh"``: ``φ(u) = tanh(c u)`` with c = `penalty_scale`. Near 0 it is ``c u``; a
              strong feature costs at most 1, and its gradient vanishes.
        penalty_scale: c > 0, in 1 / (the unit of out) (tanh), else None.
        plan: layout of the codes (:func:`plan_for`). Without a plan, the op reads the number of
            codes, which synchronises with a GPU once. Results are exact in both cases, unless
            there are more codes than ``plan.capacity``. A CPU then raises. A GPU cannot raise
            without synchronising; its results are invalid and ``stats.n_codes > plan.capacity``.
            The reference ignores the plan.
        implementation: ``"reference"`` (dense, plain autograd), ``"sparse"`` (CPU, on codes) or
            ``"triton"`` (GPU, on codes after the library's product), for 16-bit dtypes and
            float32. ``"auto"``: sparse on a CPU and, with a plan, on the meta device; triton on a
            GPU; the reference elsewhere and for float64 on a GPU.
        return_codes: also return the codes; on a GPU this synchronises once more.

    Returns:
        ``out`` with the shape of `residual`; ``penalty``, 0-d in fp32 or float64:
        ``Σ_t w_t Σ_i φ(a_ti ‖W_dec,i‖₂)``, a sum whose gradient includes the norm's and is 0 at a
        zero row; ``stats``; ``codes``: the active entries as :class:`SparseCodes` without gradient,
        or None.

    Non-finite values: a NaN pre-activation counts as active and ranks as largest together with
    ``+inf``, so that NaN reaches `out`. ``-0`` and ``-inf`` are inactive, denormals are active.
    It is unspecified whether a non-finite weight or gradient spreads to entries that it multiplies
    with 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, device, shape or value. The
            sparse implementation also raises for codes beyond ``plan.capacity``.

    Example:
        >>> x, W = torch.tensor([[1.0, -2.0]]), torch.eye(2)
        >>> result = transcoder(x, W, torch.zeros(2), W, torch.zeros(2), return_codes=True)
        >>> result.out, result.penalty, result.codes.features
        (tensor([[1., 0.]]), tensor(1.), tensor([0]))
    """
    _validate(x, W_enc, b_enc, W_dec, b_dec, residual, mask, padding)
    _validate_activation(activation, k, threshold, bandwidth, W_enc)
    _validate_penalty(penalty, penalty_scale)

    autocast = _autocasts(x)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W_enc, b_enc, W_dec, b_dec = (t.to(dtype) for t in (x, W_enc, b_enc, W_dec, b_dec))
        residual = None if residual is None else residual.to(dtype)
    chosen = resolve_implementation(implementation, x, threshold, plan)
    acc = accumulator(x.dtype)
    if threshold is not None and activation != "jumprelu":  # a constant, not a parameter
        threshold = threshold.detach().to(acc).expand(W_enc.shape[0])
    lead = x.shape[:-1]
    rows = row_shape(lead)
    extra: dict[str, Any] = {"plan": plan, "implementation": chosen}
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        result = (reference if chosen == "reference" else encode_and_decode)(
            x.reshape(*rows, x.shape[-1]),
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            activation=activation,
            k=k,
            threshold=threshold,
            bandwidth=bandwidth,
            residual_STE=None if residual is None else residual.reshape(*rows, W_dec.shape[1]),
            weight_ST=None if mask is None else mask.detach().reshape(rows).to(acc),
            padding_ST=None if padding is None else padding.reshape(rows),
            tanh_scale=None if penalty_scale is None else float(penalty_scale),
            return_codes=return_codes,
            **({} if chosen == "reference" else extra),
        )
    # torch 2.11 cannot compile _replace of a named tuple.
    out = result.out.view(*lead, W_dec.shape[1])
    return TranscoderOutput(out, result.penalty, result.stats, result.codes)


def transcode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    activation: str = "relu",
    k: float | None = None,
    threshold: Tensor | None = None,
    bandwidth: float | None = None,
    residual: Tensor | None = None,
    padding: Tensor | None = None,
    dense: bool | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Return ``out`` of :func:`transcoder` alone, faster for few tokens: for generation.

    Without penalty, statistics and codes, a call of up to 64 tokens takes two launches on a GPU
    (three with ``topk``), and nothing can exceed a capacity. The result equals that of
    :func:`transcoder` up to rounding. The output of a token does not depend on other tokens of the
    call, except by ``batch_topk`` with `k` and by rounding: of the encoder's product and, without
    `dense`, of the decoder, since the number of active entries of the call chooses between a
    product and sums over codes. If a gradient is needed, :func:`transcoder` computes the result.

    Args:
        x, W_enc, b_enc, W_dec, b_dec, activation, k, threshold, bandwidth, residual, padding: as
            in :func:`transcoder`.
        dense: whether to decode by a dense product. None chooses; a GPU then synchronises once if
            there are more than :data:`SMALL_ENTRIES` tokens times features.
        implementation: as in :func:`transcoder`. The reference computes all results of
            :func:`transcoder` and ignores `dense`.

    Returns:
        ``out`` with the shape of `residual`, in x's dtype.

    Raises:
        TypeError, ValueError: as in :func:`transcoder`.

    Example:
        >>> x, W = torch.tensor([[1.0, -2.0]]), torch.eye(2)
        >>> transcode(x, W, torch.zeros(2), W, torch.zeros(2), residual=torch.ones(1, 2))
        tensor([[2., 1.]])
    """
    _validate(x, W_enc, b_enc, W_dec, b_dec, residual, None, padding)
    _validate_activation(activation, k, threshold, bandwidth, W_enc)
    plan = None if dense is None else CodeLayout(dense)
    leaves = x, W_enc, b_enc, W_dec, b_dec, threshold, residual
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in leaves
    )
    chosen = resolve_implementation(implementation, x, threshold, plan)
    if differentiable or chosen == "reference":
        return transcoder(
            x,
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            activation=activation,
            k=k,
            threshold=threshold,
            bandwidth=bandwidth,
            residual=residual,
            padding=padding,
            plan=plan,
            implementation=chosen,
        ).out
    autocast = _autocasts(x)
    if autocast:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, W_enc, b_enc, W_dec, b_dec = (t.to(dtype) for t in (x, W_enc, b_enc, W_dec, b_dec))
        residual = None if residual is None else residual.to(dtype)
    lead = x.shape[:-1]
    rows = row_shape(lead)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        out = autograd.transcode(
            x.reshape(*rows, x.shape[-1]),
            W_enc,
            b_enc,
            W_dec,
            b_dec,
            activation=activation,
            k=k,
            threshold=None if threshold is None else threshold.expand(W_enc.shape[0]),
            residual_STE=None if residual is None else residual.reshape(*rows, W_dec.shape[1]),
            padding_ST=None if padding is None else padding.reshape(rows),
            dense=dense,
            implementation=chosen,
        )
    return out.view(*lead, W_dec.shape[1])


def _autocasts(x: Tensor) -> bool:
    """Return whether autocast applies to x; it excludes float64."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta:
        return False
    return torch.is_autocast_enabled(device)


def _expect(ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"transcoder: {argument} must be {expected}; got {got}")


def _validate(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
) -> None:
    """Check types, devices, dtypes and shapes of the tensors."""
    named = {"x": x, "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    named |= {n: t for n, t in [("residual", residual)] if t is not None}
    flags = {n: t for n, t in [("mask", mask), ("padding", padding)] if t is not None}
    for name, tensor in (named | flags).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"transcoder: {name} must be a tensor; got {type(tensor).__name__}")
        _expect(tensor.device == x.device, name, f"on x's device, {x.device}", tensor.device)
    _expect(x.is_floating_point(), "x", "of a floating dtype", x.dtype)
    if not _autocasts(x):
        for name, tensor in named.items():
            _expect(tensor.dtype == x.dtype, name, f"of x's dtype, {x.dtype}", tensor.dtype)
    _expect(x.dim() > 0, "x", "of shape [..., d_in]", list(x.shape))
    _expect(W_enc.dim() == 2, "W_enc", "of shape [F, d_in]", list(W_enc.shape))
    _expect(W_dec.dim() == 2, "W_dec", "of shape [F, d_out]", list(W_dec.shape))
    F, d_in, d_out = W_enc.shape[0], x.shape[-1], W_dec.shape[1]
    lead = list(x.shape[:-1])
    shapes = {"W_enc": [F, d_in], "b_enc": [F], "W_dec": [F, d_out], "b_dec": [d_out]}
    shapes |= {"residual": [*lead, d_out], "mask": lead, "padding": lead}
    origin = f"(x is {list(x.shape)}, W_enc has {F} features)"
    for name, tensor in (named | flags).items():
        if name in shapes:
            got = list(tensor.shape)
            _expect(got == shapes[name], name, f"of shape {shapes[name]} {origin}", got)
    if padding is not None:
        _expect(padding.dtype == torch.bool, "padding", "of dtype bool", padding.dtype)
    if mask is not None:
        ok = mask.dtype == torch.bool or mask.is_floating_point()
        _expect(ok, "mask", "bool or floating weights", mask.dtype)


def _validate_activation(
    activation: str,
    k: float | None,
    threshold: Tensor | None,
    bandwidth: float | None,
    W_enc: Tensor,
) -> None:
    """Check that exactly the activation's arguments are given, and their values."""
    F = W_enc.shape[0]
    _expect(activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", repr(activation))
    if is_ranked(activation, threshold):
        _expect(k is not None, "k", f"given for activation {activation!r}", None)
        assert k is not None
        _expect(0 <= k <= F, "k", f"in 0..{F}, the number of features", k)
        _expect(activation == "batch_topk" or int(k) == k, "k", "a whole number for topk", k)
    else:
        reason = "given threshold" if activation == "batch_topk" else activation
        _expect(k is None, "k", f"None with {reason}", k)
    jumps = activation == "jumprelu"
    if jumps:
        _expect(bandwidth is not None, "bandwidth", "given for jumprelu", None)
        assert bandwidth is not None
        _expect(0 < bandwidth < float("inf"), "bandwidth", "positive and finite", bandwidth)
        _expect(threshold is not None, "threshold", f"a tensor of shape [{F}] for jumprelu", None)
    else:
        _expect(bandwidth is None, "bandwidth", f"None with {activation}", bandwidth)
    if threshold is not None:
        takes = jumps or activation == "batch_topk"
        _expect(takes, "threshold", f"None with {activation}", "a tensor")
        if not isinstance(threshold, Tensor):
            raise TypeError(
                f"transcoder: threshold must be a tensor; got {type(threshold).__name__}"
            )
        got = list(threshold.shape)
        ok = got == [F] or (got == [] and not jumps)
        _expect(ok, "threshold", f"of shape [{F}]" if jumps else f"of shape [{F}] or []", got)
        _expect(threshold.is_floating_point(), "threshold", "floating", threshold.dtype)
        device = W_enc.device
        _expect(threshold.device == device, "threshold", f"on {device}", threshold.device)


def _validate_penalty(penalty: str, penalty_scale: float | None) -> None:
    """Check the name, and that exactly tanh has a scale."""
    _expect(penalty in PENALTIES, "penalty", f"one of {PENALTIES}", repr(penalty))
    if penalty == "l1":
        _expect(penalty_scale is None, "penalty_scale", "None with l1", penalty_scale)
        return
    _expect(penalty_scale is not None, "penalty_scale", f"given for {penalty}", None)
    assert penalty_scale is not None
    ok = 0 < penalty_scale < float("inf")
    _expect(ok, "penalty_scale", "positive and finite", penalty_scale)


def resolve_implementation(
    implementation: str, x: Tensor, threshold: Tensor | None, plan: CodeLayout | None
) -> str:
    """Replace "auto" by the implementation to run for x; raise for one that cannot run.

    Raises:
        TypeError, ValueError: the plan or the implementation is not as in :func:`transcoder`.
    """
    known = f"one of {IMPLEMENTATIONS}"
    _expect(implementation in IMPLEMENTATIONS, "implementation", known, repr(implementation))
    if plan is not None and not isinstance(plan, CodeLayout):
        raise TypeError(f"transcoder: plan must be a CodeLayout or None; got {type(plan).__name__}")
    device = x.device.type
    wide = x.dtype == torch.float64 or (threshold is not None and threshold.dtype == torch.float64)
    if implementation == "auto":
        if device == "cuda" and not wide:
            return "triton"
        return "sparse" if device == "cpu" or (device == "meta" and plan) else "reference"
    if implementation == "sparse":
        expected = f"'triton' or 'reference' on {device}"
        _expect(device in ("cpu", "meta"), "implementation", expected, "'sparse'")
    elif implementation != "reference":
        expected = f"'sparse' or 'reference' on {device}, where Triton kernels do not run"
        runs = device == "meta" or devices.runs_triton(device)
        _expect(runs, "implementation", expected, repr(implementation))
        _expect(
            not wide,
            "implementation",
            "'reference' for float64 (x or threshold)",
            repr(implementation),
        )
    return implementation
