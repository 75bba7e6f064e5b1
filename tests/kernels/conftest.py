"""Triton kernels run on the GPU if there is one, else interpreted (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels are tested: "cuda" or, interpreted, "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def triton_dtypes() -> list[torch.dtype]:
    """Those in which kernels are tested: the interpreter multiplies bfloat16 wrongly."""
    exact = [torch.float32, torch.float16]
    return [*exact, torch.bfloat16] if torch.cuda.is_available() else exact
