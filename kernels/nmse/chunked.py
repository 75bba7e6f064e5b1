"""Compute the normalised squared error over small blocks of tokens.

Every result derives from two numbers per token, its error and its power. The difference x - target
is saved in x's dtype, so that the backward pass needs neither stream. In float16 half the
difference is saved, since two values can differ by more than the largest float16. No operation
synchronises with the device.

B sequences, T tokens, D width, R = B*T rows.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 2**18}  # of fp32 temporaries: 1 MiB
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def block_elements(device_type: str) -> int:
    """Return how many elements a block of temporaries holds on a device type."""
    return _BLOCK_ELEMENTS.get(device_type, _BLOCK_ELEMENTS_ELSEWHERE)


def saved_share(dtype: torch.dtype) -> float:
    """Return the share of the difference that is saved for an x of ``dtype``."""
    return 0.5 if dtype == torch.float16 else 1.0


def nmse_chunked(
    x_BTD: Tensor,
    target_BTD: Tensor,
    mask_BT: Tensor,
    eps: float,
    dtype: torch.dtype,
    x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the values, and the gradient up to one factor per sequence.

    Returns:
        nmse [B], token_nmse [B,T] in ``dtype``;
        difference [B,T,D] in x's dtype (half the difference in float16), 0 at masked-out tokens
        ([0] unless ``x_grad``);
        factor [B]: d nmse_b / dx_bti = factor_b * difference_bti.
    """
    B, T, D = x_BTD.shape
    x_RD, target_RD, mask_R = x_BTD.flatten(0, 1), target_BTD.flatten(0, 1), mask_BT.flatten()
    difference_RD = x_RD.new_empty((B * T, D) if x_grad else (0,))
    error_R = torch.empty(B * T, dtype=dtype, device=x_BTD.device)
    power_R = torch.empty_like(error_R)
    share = saved_share(x_BTD.dtype)
    step = max(1, block_elements(x_BTD.device.type) // max(1, D))
    for start in range(0, B * T, step):
        rows = slice(start, start + step)
        target = target_RD[rows].to(dtype)
        difference = x_RD[rows].to(dtype) - target
        if x_grad:
            difference_RD[rows] = difference if share == 1 else share * difference
            difference_RD[rows].masked_fill_(~mask_R[rows, None], 0)
        error_R[rows] = difference.square_().sum(-1)
        power_R[rows] = target.square().sum(-1)
    error_BT, power_BT = error_R.view(B, T), power_R.view(B, T)

    entries_B = (mask_BT.sum(-1) * D).clamp_min(1)
    error_B = torch.where(mask_BT, error_BT, 0).sum(-1) / entries_B
    denominator_B = torch.where(mask_BT, power_BT, 0).sum(-1) / entries_B + eps
    token_nmse = (error_BT / max(D, 1)) / (power_BT / max(D, 1) + eps)
    factor_B = 2 / share / (entries_B * denominator_B)
    shape = (B, T, D) if x_grad else (0,)
    return error_B / denominator_B, token_nmse, difference_RD.view(shape), factor_B


def nmse_backward_chunked(
    cotangent_B: Tensor, difference_BTD: Tensor, factor_B: Tensor, mask_BT: Tensor
) -> Tensor:
    """Return the gradient of x, in its dtype."""
    gradient_BTD = (difference_BTD * (cotangent_B * factor_B)[:, None, None]).to(
        difference_BTD.dtype
    )
    # The factor of a sequence with NaN is NaN, and so is its product with 0.
    return gradient_BTD.masked_fill_(~mask_BT[..., None], 0)
