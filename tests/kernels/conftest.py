"""Triton kernels run on the GPU if there is one, else interpreted (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton kernels are tested: "cuda" or, interpreted, "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
