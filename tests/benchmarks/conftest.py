"""The benchmarks lie beside the package, not in it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))


@pytest.fixture
def device() -> str:
    """Where Triton kernels run: "cuda" or, interpreted, "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
