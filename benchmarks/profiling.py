"""Times of single kernels, by torch's profiler."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronize

__all__ = ["by_category", "kernel_times"]

Kernel = dict[str, Any]
NAME = 120  # characters of a kernel's name to record
MOST = 60  # kernels to record
# In this order: attention and this library's kernels can contain the words of later categories.
CATEGORIES = {
    "attention": "flash|fmha|sdpa|attention|softmax_warp",
    "matrix products": r"gemm|nvjet|cutlass|cublas|gemv|splitk|aten::(?:addmm|mm|bmm|matmul)\b",
    "optimizer": "multi_tensor|adam|lpnorm",
    "copies": "memcpy|memset|copy|fill|catarray|aten::(?:cat|zero_)",
    "sorts and scans": "sort|scan|searchsorted|histogram",
    "elementwise work and reductions": "elementwise|reduce|softmax|norm|triton_|aten::",
}


def kernel_times(run: Callable[[], Any], device: str, most: int | None = MOST) -> list[Kernel]:
    """Return ``name``, ``calls`` and total ``us`` of the ``most`` kernels of a call, longest first.

    On a CPU, the ops of torch take the place of kernels. Call ``run`` before, so that nothing is
    compiled here.
    """
    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    synchronize(device)
    with profile(activities=[activity], acc_events=True) as recorded:
        run()
        synchronize(device)
    kernels = [
        {
            "name": event.key[:NAME],
            "calls": event.count,
            "us": event.self_device_time_total if on_gpu else event.self_cpu_time_total,
        }
        for event in recorded.key_averages()
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(kernels, key=lambda kernel: -kernel["us"])[:most]


def by_category(kernels: Sequence[Kernel], ours: Iterable[str]) -> list[Kernel]:
    """Return ``category``, ``calls`` and ``us``, longest first; ``ours`` are names of kernels."""
    names = set(ours)
    totals: dict[str, Kernel] = {}
    for kernel in kernels:
        name = kernel["name"]
        matching = (c for c, words in CATEGORIES.items() if re.search(words, name, re.IGNORECASE))
        category = "this library's kernels" if name in names else next(matching, "other")
        total = totals.setdefault(category, {"category": category, "calls": 0, "us": 0.0})
        total["calls"] += kernel["calls"]
        total["us"] += kernel["us"]
    return sorted(totals.values(), key=lambda total: -total["us"])
