"""A run of the embedded pair, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from organism_runs import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters of 24 features, some 3 of them active on a token."""
    return make_run(tmp_path_factory.mktemp("runs") / "random")
