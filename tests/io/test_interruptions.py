"""Every command that writes gives the same files after kills and full disks.

By default, two commands are tested with one kill and one full disk. `make proof` tests all
commands with ten kills and three full disks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import openthoughts
import pytest
import yaml

from fastadapt.cli.main import main

PROOF = os.environ.get("FASTADAPT_PROOF") == "1"
KILLS, SHARES = (10, [0.1, 0.5, 0.9]) if PROOF else (1, [0.5])
PROGRAM = Path(__file__).with_name("interruptions.py")


def run(*command: object) -> None:
    assert main([str(word) for word in command]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("interruptions")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """Return a configuration of two steps on the embedded pair, into ``folder/workdir/run``."""
    values = {
        "pair": {"target": "organism/target", "base": "organism/base", "device": "cpu"},
        "adapter": {"n_features": 16},
        "data": {
            "train": "organism/train",
            "validation": "organism/validation",
            "max_validation": 2,
            "family": "r1-distill",
        },
        "optimizer": {"batch_size": 1, "max_steps": 2},
        "run": {"output": str(folder / "workdir" / "run"), "threads": 1, "eval_every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path, folder: Path) -> Path:
    """Return a finished run outside of the workdir, with features and a set of features."""
    run("train", recipe)
    finished = folder / "finished"
    (folder / "workdir").rename(finished)
    run("features", "collect", finished / "run", "--n", 12)
    sql = "SELECT layer, feature FROM features WHERE layer = 0"
    run("features", "select", finished / "run", "some", "--sql", sql)
    return finished / "run"


@pytest.fixture(scope="module")
def disturb(folder: Path) -> Callable[..., dict]:
    """``disturb(before, *command)``: interrupt a command and return the program's report."""

    def trial(before: Path | None, *command: object, varying: tuple[str, ...] = ()) -> dict:
        workdir = folder / "workdir"
        shutil.rmtree(workdir, ignore_errors=True)
        plan = {
            "command": [str(word) for word in command],
            "workdir": str(workdir),
            "before": None if before is None else str(before),
            "kills": KILLS,
            "full": SHARES,
            "varying": varying,
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        ended = subprocess.run(
            [sys.executable, PROGRAM, folder / "plan.json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        report = json.loads(ended.stdout)
        print(command[:2], report)
        assert report["faults"] == []
        assert report["kills"] == KILLS
        assert sum(report["full"].values()) == len(SHARES)
        assert report["moments"] >= KILLS
        return report

    return trial


@pytest.mark.slow
@pytest.mark.parametrize("has_others", [False, True])
def test_the_end_of_training(
    trained: Path, recipe: Path, folder: Path, disturb: Callable, has_others: bool
) -> None:
    before = folder / f"before-{has_others}"
    shutil.copytree(trained, before / "run", ignore=shutil.ignore_patterns("features"))
    if has_others:
        (before / "run" / "adapter" / "notes.md").write_text("mine")
    else:
        shutil.rmtree(before / "run" / "adapter")
    for name in ("summary.json", "report.html"):
        (before / "run" / name).unlink()
    times = ("run/metrics.jsonl", "run/summary.json", "run/report.html")
    disturb(before, "train", recipe, "--resume", varying=times)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hu2026", "huggingface", "adapters"])
def test_export(trained: Path, folder: Path, disturb: Callable, format: str) -> None:
    source = trained
    if format == "adapters":
        source = folder / "published"
        if not source.exists():
            run("export", trained, "--output", source, "--format", "hu2026")
    disturb(None, "export", source, "--output", folder / "workdir" / "out", "--format", format)


@pytest.mark.slow
def test_intervene(trained: Path, folder: Path, disturb: Callable) -> None:
    disturb(None, "intervene", trained, "--ablate", "some", "--output", folder / "workdir" / "out")


@pytest.mark.slow
def test_features_export(trained: Path, folder: Path, disturb: Callable) -> None:
    disturb(None, "features", "export", trained, "--output", folder / "workdir" / "out")


@pytest.mark.slow
def test_features_collect(trained: Path, folder: Path, disturb: Callable) -> None:
    out = folder / "workdir" / "out"
    small = ("--n", 12, "--batch_tokens", 500, "--snapshot_tokens", 500)
    disturb(None, "features", "collect", trained, "--output", out, *small)


@pytest.mark.slow
def test_features_merge(trained: Path, folder: Path, disturb: Callable) -> None:
    shards = [folder / f"shard-{i}" for i in range(2)]
    for i, shard in enumerate(shards):
        if not shard.exists():
            cut = ("--shard", f"{i}/2", "--output", shard)
            run("features", "collect", trained, "--n", 80, "--batch_tokens", 2000, *cut)
    disturb(None, "features", "merge", *shards, "--output", folder / "workdir" / "out")


@pytest.mark.slow
def test_data_prepare(folder: Path, disturb: Callable) -> None:
    source = openthoughts.write_jsonl(folder / "rows.jsonl", 1200)
    sizes = ("--train", 100, "--validation", 10, "--max_tokens", 60)
    where = ("--output", folder / "workdir" / "out", "--tokenizer", "organism/target")
    disturb(None, "data", "prepare", source, *where, *sizes)


@pytest.mark.slow
def test_eval(trained: Path, folder: Path, disturb: Callable) -> None:
    few = ("--texts.n", 3, "--texts.n_partial", 2, "--sampling.max_new_tokens", 8)
    parts = ("--parts", "[outputs, partial]", *few, "--output", folder / "workdir" / "out")
    disturb(None, "eval", trained, *parts, varying=("out/texts/*", "out/report.html"))
