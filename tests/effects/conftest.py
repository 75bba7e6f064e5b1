"""A run of a tiny random pair, saved to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from by_hand import TinyRun, random_adapters

from fastadapt.adapter.files import save_adapters


@pytest.fixture
def tiny_run(save_model: Callable[..., str], tmp_path: Path) -> TinyRun:
    target, base = save_model("target", 0), save_model("base", 1)
    folder = tmp_path / "run"
    save_adapters(random_adapters(), folder / "adapter", {"target": target, "base": base})
    return TinyRun(folder, target, base)
