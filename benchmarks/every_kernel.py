"""Run every Triton kernel once at small, odd shapes, under a sanitizer.

``python -m benchmarks.every_kernel DEVICE``
"""

from __future__ import annotations

import sys

import torch

from benchmarks import head_cases, transcoder_steps
from benchmarks.exactness import ACTIVATIONS, activation_options
from benchmarks.transcoder_cases import implementations
from fastadapt.kernels.transcoder import CodeLayout

SHAPES = [(67, 40, 200), (3, 64, 131), (300, 72, 520)]  # T, d, F


def main(device: str) -> None:
    """Run both implementations of the transcoder with every activation and plan, and linear_kl."""
    dtypes = [torch.float32, torch.bfloat16 if device == "cuda" else torch.float16]
    for dtype in dtypes:
        for T, d, F in SHAPES:
            inputs = transcoder_steps.make_inputs(T, d, F, 12.0, dtype, device, 0)
            for implementation in implementations(device):
                for name in ACTIVATIONS:
                    call = activation_options(name, F, dtype, device)
                    for plan in (
                        None,
                        CodeLayout(dense=True),
                        CodeLayout(dense=False, capacity=T * F),
                    ):
                        if implementation != "sparse":
                            transcoder_steps.step(inputs, implementation, plan, **call)
        hidden = head_cases.make_inputs(2, 37, 24, 1003, dtype, device, 0)
        for implementation in head_cases.implementations(device):
            head_cases.step(hidden, implementation)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
