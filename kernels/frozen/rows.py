"""The matrix view of activations that the kernels take."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """Return ``x [..., D]`` as [R, D] with contiguous rows, copied only if no view will do."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
