"""Measure the machine's copy bandwidth and rate of matrix products."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from benchmarks.timing import measure

__all__ = ["Roofs", "measure_roofs"]


class Roofs(NamedTuple):
    """Peak rates, measured in the run whose rows are compared with them."""

    copy_bytes_per_s: float  #: bytes read and written by a large copy
    gemm_flops_per_s: float  #: rate of the faster of two large products
    dtype: str

    def floor_s(self, flops: float, n_bytes: float) -> float:
        """Return the least time in seconds for these operations and bytes."""
        return max(flops / self.gemm_flops_per_s, n_bytes / self.copy_bytes_per_s)


def measure_roofs(device: str, dtype: torch.dtype, *, quick: bool = False) -> Roofs:
    """Measure both rates; takes about a second on a GPU."""
    large = device == "cuda" and not quick
    n = 2**30 if large else 2**25  # bytes
    make = functools.partial(torch.ones, dtype=torch.uint8, device=device)
    buffers = [(make(n), make(n)) for _ in range(2)]
    copy_s = measure(lambda pair: pair[1].copy_(pair[0]), buffers, device).median_s
    shapes = [(7500, 3584, 8192), (8192, 8192, 8192)] if large else [(512, 512, 512)]
    rate = 0.0
    for M, K, N in shapes:
        sizes = ((M, K), (N, K))
        operands = [[torch.randn(s, device=device).to(dtype) for s in sizes] for _ in range(2)]
        seconds = measure(lambda ab: ab[0] @ ab[1].T, operands, device).median_s
        rate = max(rate, 2 * M * K * N / seconds)
    return Roofs(2 * n / copy_s, rate, str(dtype)[6:])
