"""A run of the embedded pair, shared by the tests of a module."""

from __future__ import annotations

from pathlib import Path

import pytest
from organism_runs import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with random adapters of 24 features and an L0 of about 3."""
    return make_run(tmp_path_factory.mktemp("runs") / "random")
