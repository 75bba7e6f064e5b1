"""Names that no file can have, and files that are none: one clear error of every command."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import organism_runs
import pytest

from fastadapt.features.collect import CollectConfig, collect

NAMES = {"long": "x" * 300, "endless": "y/" * 2500, "null": "a\0b", "half": "a\ud800b"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a store of it, with a set."""
    run = organism_runs.make_run(tmp_path_factory.mktemp("names") / "run")
    collect(run, config=CollectConfig(n=8), device="cpu")
    from fastadapt.cli.main import main

    assert main(["features", "select", str(run), "some", "--promotes", "wait"]) == 0
    return run


OUTPUTS: dict[str, Callable[[Path], list[object]]] = {
    "export": lambda run: ["export", run],
    "intervene": lambda run: ["intervene", run, "--ablate", "some"],
    "features export": lambda run: ["features", "export", run],
    "features collect": lambda run: ["features", "collect", run, "--n", 4],
    "eval": lambda run: ["eval", run, "--parts", "[speed]"],
    "data prepare": lambda run: ["data", "prepare", run / "config.yaml"],
}
SOURCES: dict[str, Callable[[str], list[object]]] = {
    "export": lambda name: ["export", name, "--output", "out"],
    "eval": lambda name: ["eval", name, "--output", "out"],
    "features check": lambda name: ["features", "check", name],
    "features serve": lambda name: ["features", "serve", name],
    "intervene": lambda name: ["intervene", name, "--ablate", "some", "--output", "out"],
    "train": lambda name: ["train", name],
    "train on": lambda name: ["train", "organism", "--data.train", name, "--run.output", "out"],
    "train for": lambda name: ["train", "organism", "--pair.target", name, "--run.output", "out"],
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output(
    command: str, name: str, whole: Path, fastadapt: Callable, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fastadapt(*OUTPUTS[command](whole), "--output", name)
    assert outcome.code in (1, 2)
    assert outcome.err.startswith("error: ") or "\nerror: " in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir())


def test_the_output_of_a_training(fastadapt: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES.values():
        outcome = fastadapt("train", "organism", "--run.output", name)
        assert outcome.code in (1, 2)
        assert "error: " in outcome.err
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("command", SOURCES)
def test_a_source(
    command: str, name: str, fastadapt: Callable, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in (name, f"/{name}"):
        outcome = fastadapt(*SOURCES[command](source))
        assert outcome.code == 2
        assert "error: " in outcome.err
        assert "Traceback" not in outcome.err


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, _loop], ids=["pipe", "folder", "loop"])
@pytest.mark.parametrize(
    "file",
    [
        "manifest.json",
        "texts.parquet",
        "adapter/units.parquet",
        "sets/some.json",
        "judgements.json",
    ],
)
def test_what_is_no_file_of_a_store(
    file: str, put: Callable, whole: Path, fastadapt: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    path = run / "features" / file
    if not path.exists() and file != "judgements.json":
        path = next((run / "features" / path.parent.name).glob("*.parquet"))
    path.unlink(missing_ok=True)
    put(path)
    outcome = fastadapt("features", "check", run)
    assert outcome.code in (1, 2)
    assert path.name in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, _loop], ids=["pipe", "folder", "loop"])
def test_a_configuration_that_is_no_file(
    put: Callable, whole: Path, fastadapt: Callable, tmp_path: Path
) -> None:
    """A run without one is adapters alone; what stands in its place is a mistake."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "config.yaml").unlink()
    put(run / "config.yaml")
    for command in (
        ["intervene", run, "--ablate", "some", "--output", tmp_path / "out"],
        ["eval", run, "--output", tmp_path / "out"],
    ):
        outcome = fastadapt(*command)
        assert outcome.code == 2
        assert "config.yaml" in outcome.err
        assert not (tmp_path / "out").exists()
