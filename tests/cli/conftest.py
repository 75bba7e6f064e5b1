"""A command line in this process, and a pair on which training takes a second."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

# The training tests own the tiny pair; a fixture belongs to every conftest that names it.
_spec = importlib.util.spec_from_file_location(
    "fastadapt_tests_of_training", Path(__file__).parents[1] / "training" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)
tiny_pair = _training.tiny_pair


class Outcome(NamedTuple):
    """What a command did: its exit code and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def fastadapt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``fastadapt("train", "organism", ...)`` runs the command line in this process."""
    from fastadapt.cli import main

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(tiny_pair: Path, tmp_path: Path) -> Callable[..., Path]:
    """``recipe(**{"optimizer.lr": 1e-3})``: a YAML file of a run of 6 steps on the tiny pair."""

    def make(**changes: object) -> Path:
        values: dict[str, dict[str, object]] = {
            "pair": {
                "target": str(tiny_pair / "target"),
                "base": str(tiny_pair / "base"),
                "device": "cpu",
            },
            "adapter": {"n_features": 24},
            "data": {
                "train": str(tiny_pair / "train.jsonl"),
                "validation": str(tiny_pair / "validation.jsonl"),
            },
            "optimizer": {"batch_size": 2, "max_steps": 6, "lr": 1e-2},
            "run": {"output": str(tmp_path / "run"), "eval_every": 3, "checkpoint_every": 3},
        }
        for key, value in changes.items():
            section, name = key.split(".")
            values[section][name] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make
