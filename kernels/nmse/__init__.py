"""Normalised mean squared error between two streams of hidden states."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.kernels.device import runs_triton

from .autograd import nmse_op
from .reference import nmse_reference

__all__ = ["NMSEOutput", "nmse"]

_IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
#: Dtypes of x and target that the Triton kernels read.
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NMSEOutput(NamedTuple):
    """Results of :func:`nmse`, in float64 if an input is float64, else in float32."""

    nmse: Tensor  #: [B], or 0-d for inputs [T,D]; differentiable
    token_nmse: Tensor  #: [B,T], or [T]; not differentiable


def nmse(
    x: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    implementation: str = "auto",
) -> NMSEOutput:
    """Compute the squared error of ``x`` relative to the uncentred power of ``target``.

    Means run over the tokens t of sequence b that ``mask`` selects, and over the width i::

        nmse[b]         = mean_ti (x_bti - target_bti)^2 / (mean_ti target_bti^2 + eps)
        token_nmse[b,t] = mean_i  (x_bti - target_bti)^2 / (mean_i  target_bti^2 + eps)

    Formula: arXiv 2602.20904, the activation loss of one layer. ``nmse`` is 0 for a sequence
    without selected tokens, or NaN (0 / 0) with ``eps=0``. It is once differentiable in ``x``;
    ``target`` is a constant. The gradient has x's dtype and is of the order ``1 / (T D)``: in
    float16, entries below 3e-8 round to 0.

    Args:
        x, target: [B,T,D] or [T,D], floating, of equal shape. Squares are summed in float32
            (float64 if either is float64). Of the two, the backward pass saves only their
            difference, in x's dtype.
        mask: [B,T] or [T], bool: tokens that count; None is all tokens. Other tokens give no
            gradient, even if not finite; ``token_nmse`` is computed for every token.
        eps: added to the mean square of ``target``, >= 0.
        implementation: "reference" (dense PyTorch that defines the results), "chunked" (PyTorch
            over small blocks of tokens, any device and dtype), "triton" (three Triton kernels; a
            GPU, inputs in float32, bfloat16 or float16), or "auto": "triton" if it runs on the GPU,
            else "chunked".

    Returns:
        :class:`NMSEOutput`. NaN and infinities give NaN or infinity in their tokens and, if
        selected, in their sequence. Equal inputs give bitwise equal results.

    Raises:
        TypeError, ValueError: an argument is not as above, or "triton" cannot run on it.

    Example:
        >>> target = torch.ones(1, 4, 8)
        >>> nmse(0.5 * target, target).nmse
        tensor([0.2500])
    """
    _validate(x, target, mask, eps, implementation)
    implementation = resolve_implementation(implementation, x.device.type, x.dtype, target.dtype)
    dtype = torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32
    if mask is None:
        mask = x.new_ones(x.shape[:-1], dtype=torch.bool)
    single = x.ndim == 2
    target = target.detach()
    if single:
        x, target, mask = x[None], target[None], mask[None]
    if implementation == "reference":
        per_sequence, per_token = nmse_reference(x, target, mask, eps, dtype)
    else:
        x_grad = torch.is_grad_enabled() and x.requires_grad
        per_sequence, per_token, *_ = nmse_op(x, target, mask, eps, dtype, implementation, x_grad)
        per_token = per_token.detach()
    return (
        NMSEOutput(per_sequence[0], per_token[0]) if single else NMSEOutput(per_sequence, per_token)
    )


def _validate(
    x: Tensor, target: Tensor, mask: Tensor | None, eps: float, implementation: str
) -> None:
    for name, tensor in (("x", x), ("target", target)):
        _expect_tensor(name, tensor)
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected [B,T,D] or [T,D], got {list(x.shape)}")
    if target.shape != x.shape:
        raise ValueError(f"target: expected {list(x.shape)} like x, got {list(target.shape)}")
    if target.device != x.device:
        raise ValueError(f"target: expected device {x.device}, got {target.device}")
    if mask is not None:
        _expect_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"mask: expected {list(x.shape[:-1])}, got {list(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"mask: expected device {x.device}, got {mask.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )


def resolve_implementation(implementation: str, device_type: str, *dtypes: torch.dtype) -> str:
    """Replace "auto" by the implementation to run; raise if "triton" cannot run."""
    narrow = all(dtype in _TRITON_DTYPES for dtype in dtypes)
    if implementation == "auto":
        on_gpu = device_type == "cuda" and runs_triton(device_type)
        return "triton" if on_gpu and narrow else "chunked"
    if implementation == "triton" and not narrow:
        got = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            'implementation: "triton" reads float32, bfloat16 and float16, got x and target in '
            f'{got}; use "auto" or "chunked"'
        )
    if implementation == "triton" and not runs_triton(device_type):
        raise ValueError(
            f'implementation: "triton" needs a GPU, got tensors on {device_type}; use "auto", or '
            "set TRITON_INTERPRET=1 to interpret the kernels (for tests)"
        )
    return implementation


def _expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
