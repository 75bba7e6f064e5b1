"""Fixtures of the training tests: a tiny pair and its configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "fastadapt_tests_of_training", Path(__file__).parents[1] / "training" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)
tiny_pair, tiny_config = _training.tiny_pair, _training.tiny_config
