"""What every test runs under: no network, one thread, fixed seeds."""

import os

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"

torch.set_num_threads(1)
# Without a deadline: a first call compiles or loads. Drawn anew in `make proof`, fixed otherwise.
settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("proof", max_examples=200, deadline=None, print_blob=True)
settings.load_profile("proof" if PROOF else "quick")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills uninitialised memory with NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
