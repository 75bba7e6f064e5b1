"""Device and dtypes of kernel tests: the GPU if available, else Triton's interpreter."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Device of Triton kernels: "cuda", or "cpu" for the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def triton_dtypes() -> list[torch.dtype]:
    """Dtypes of Triton kernels; the interpreter multiplies bfloat16 incorrectly."""
    exact = [torch.float32, torch.float16]
    return [*exact, torch.bfloat16] if torch.cuda.is_available() else exact
