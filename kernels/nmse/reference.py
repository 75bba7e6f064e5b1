"""Reference of the normalised squared error: dense PyTorch with plain autograd.

B sequences, T tokens, D width.
"""

import torch
from torch import Tensor


def nmse_reference(
    x_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return nmse [B] and token_nmse [B,T]; all arithmetic is in ``dtype``."""
    D = x_BTD.shape[-1]
    counted = mask_BT[..., None]
    target = target_BTD.detach().to(dtype)
    difference = x_BTD.to(dtype) - target

    entries_B = (mask_BT.sum(-1) * D).clamp_min(1)
    error_B = torch.where(counted, difference, 0).square().sum((1, 2)) / entries_B
    power_B = torch.where(counted, target, 0).square().sum((1, 2)) / entries_B
    nmse_B = error_B / (power_B + eps)

    error_BT = difference.detach().square().sum(-1) / max(D, 1)
    power_BT = target.square().sum(-1) / max(D, 1)
    return nmse_B, error_BT / (power_BT + eps)
