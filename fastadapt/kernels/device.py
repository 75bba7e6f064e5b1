"""Detect whether Triton kernels can run: on a GPU, or on any device in Triton's interpreter."""

from __future__ import annotations

import os

__all__ = ["runs_triton"]


def runs_triton(device_type: str) -> bool:
    """Return whether Triton kernels run on tensors of a device type, without importing Triton.

    With ``TRITON_INTERPRET=1``, set before Triton is imported, kernels are interpreted on CPU
    tensors. The interpreter is slow, meant for tests, and multiplies 16-bit matrices in float16
    only.

    Example:
        >>> runs_triton("mps")
        False
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return device_type in ("cpu", "cuda")
    return device_type == "cuda"
