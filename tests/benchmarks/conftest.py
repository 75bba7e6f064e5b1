"""Make the benchmarks importable, which are not part of the package."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def device() -> str:
    """Device of Triton kernels: "cuda", or "cpu" for the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
