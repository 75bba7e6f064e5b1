"""Make torch's vector functions accurate from their first call on a CPU.

On a CPU torch computes functions of contiguous floats with oneMKL's vector functions, a part of
a tensor on each thread. oneMKL 2024.2, which torch's packages hold, chooses the code of a function
at its first call. Where several threads make this call at once, one of them may run code of low
precision, with relative errors up to 2e-4 in its part of that result; later results are right
(https://github.com/pytorch/pytorch/issues/188792). Such an error in the cosines of the first
batch's rotary embedding changes the logits by 1e-4, so a run would not have the same bits twice.
"""

from __future__ import annotations

import torch

#: Functions that torch passes to oneMKL (``aten/src/ATen/cpu/vml.h``), by their names in torch.
FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2"),
    *("sin", "sqrt", "tan", "tanh", "trunc"),
)


def resolve_functions() -> None:
    """Call each of :data:`FUNCTIONS` on one number, so on one thread, in both precisions.

    Importing :mod:`fastadapt.kernels` does so. The calls take about a millisecond, and are left out
    where torch is built without oneMKL.

    Example:
        >>> resolve_functions()
    """
    if not torch.backends.mkl.is_available():
        return
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(number)
