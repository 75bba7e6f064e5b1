"""Fixtures: run commands in this process, and train on a tiny pair in a second."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

# A conftest shares a fixture of another folder by naming it: the training tests define this one.
_spec = importlib.util.spec_from_file_location(
    "fastadapt_tests_of_training", Path(__file__).parents[1] / "training" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_training = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_training)
tiny_pair = _training.tiny_pair


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def fastadapt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``fastadapt("train", "organism", ...)``: run a command in this process."""
    from fastadapt.cli.main import main

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(tiny_pair: Path, tmp_path: Path) -> Callable[..., Path]:
    """``recipe(**{"optimizer.lr": 1e-3})``: write a YAML file of 6 steps on the tiny pair."""

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
            "run": {
                "output": str(tmp_path / "run"),
                "eval_every": 3,
                "checkpoint_every": 3,
                "report": False,
            },
        }
        for key, value in changes.items():
            section, name = key.split(".")
            values[section][name] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return make


class Desk:
    """Functions with which a test case prepares files and a command line."""

    def __init__(
        self, pair: Path, folder: Path, recipe: Callable[..., Path], run: Callable
    ) -> None:
        self.pair, self.folder, self.recipe, self.run = pair, folder, recipe, run

    def train(self, *options: object, **changes: object) -> list[object]:
        """Return `fastadapt train` with a changed recipe and options."""
        return ["train", self.recipe(**changes), *options]

    def yaml(self, change: Callable[[dict], Any]) -> list[object]:
        """Return `fastadapt train`; `change` edits the recipe or returns its text."""
        path = self.recipe()
        values = yaml.safe_load(path.read_text())
        changed = change(values)
        path.write_text(yaml.safe_dump(values) if changed is None else changed)
        return ["train", path]

    def over(self, text: str) -> Path:
        """Write a YAML file that overrides the recipe."""
        path = self.folder / "over.yaml"
        path.write_text(text)
        return path

    def model(self, which: str, **config: object) -> Path:
        """Copy a model of the pair and change its config.json."""
        copy = self.folder / f"other-{which}"
        shutil.copytree(self.pair / which, copy)
        self.edit(copy / "config.json", **config)
        return copy

    def edit(self, path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def data(self, *rows: object) -> str:
        """Write a file of rows; strings are written unchanged."""
        path = self.folder / "rows.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
        path.write_text("".join(line + "\n" for line in lines))
        return str(path)

    def finished_run(self, **changes: object) -> Path:
        """Train the recipe and return the run directory."""
        outcome = self.run("train", self.recipe(**changes))
        assert outcome.code == 0, outcome.err
        return self.folder / "run"


@pytest.fixture
def desk(tiny_pair: Path, tmp_path: Path, recipe: Callable, fastadapt: Callable) -> Desk:
    return Desk(tiny_pair, tmp_path, recipe, fastadapt)


@pytest.fixture(scope="session")
def emitted() -> dict[str, str]:
    """Error messages by test, with paths removed."""
    return {}


@pytest.fixture
def expect_error(
    desk: Desk, fastadapt: Callable, emitted: dict[str, str], request: pytest.FixtureRequest
) -> Callable[..., None]:
    """``expect_error(arrange, message, code)``: check that the command `arrange(desk)` is refused.

    The command must print one error that matches `message` and no other output, exit with `code`,
    show no traceback, and leave the output folder unchanged.
    """

    def check(arrange: Callable[[Desk], list[object]], message: str, code: int = 2) -> None:
        argv = arrange(desk)
        before = _contents(desk.folder / "run")
        outcome = fastadapt(*argv)
        said = " ".join(outcome.err.split())
        emitted[request.node.nodeid] = re.sub(r"(?<![\w.])/[^\s',:]+", "PATH", said)
        assert re.search(message, said), outcome.err
        assert outcome.code == code
        assert outcome.out == ""
        assert outcome.err.count("error: ") == 1
        assert "Traceback" not in outcome.err
        assert _contents(desk.folder / "run") == before, "the output was touched"

    return check


def _contents(path: Path) -> Any:
    if not path.is_dir():
        return path.read_bytes() if path.is_file() else None
    return {p.name: _contents(p) for p in path.iterdir() if p.name != ".lock"}
