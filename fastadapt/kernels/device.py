"""Where Triton kernels run: on a GPU, or anywhere under Triton's interpreter."""

from __future__ import annotations

import os

__all__ = ["runs_triton"]


def runs_triton(device_type: str) -> bool:
    """Whether Triton kernels run on tensors of this device type, without importing Triton.

    ``TRITON_INTERPRET=1``, set before Triton is imported, interprets kernels on CPU tensors: slow,
    for tests; 16-bit matrix products only in float16.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return device_type in ("cpu", "cuda")
    return device_type == "cuda"
