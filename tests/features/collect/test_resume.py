"""A collection that is killed and resumed gives the same files as an uninterrupted one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
from organism_runs import files_of

from fastadapt.features.collect import CollectConfig, collect

CONFIG = CollectConfig(
    n=80, batch_tokens=1000, snapshot_tokens=2500, kinds=("adapter", "base", "target")
)

#: Kills itself at a batch, half-way through a file of state, or before or after the manifest.
KILLED = """
import os, signal, sys
from fastadapt.features import collect as room
from fastadapt.features.collect import snapshots

run, folder, point, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
calls = 0

def killed(function, *, after):
    def stand_in(*args, **kwargs):
        global calls
        calls += 1
        if calls == number and not after:
            if point == "save":
                args[1].write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return stand_in

if point == "save":
    snapshots.save_tensors = killed(snapshots.save_tensors, after=False)
elif point != "batch":
    room.write_manifest = killed(room.write_manifest, after=point == "manifest")

def progress(done, total):
    if point == "batch" and done >= number:
        os.kill(os.getpid(), signal.SIGKILL)

kinds = ("adapter", "base", "target")
config = room.CollectConfig(n=80, batch_tokens=1000, snapshot_tokens=2500, kinds=kinds)
room.collect(run, folder, config, progress=progress)
"""


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("stores") / "whole"
    assert collect(run, folder, CONFIG) is not None
    return files_of(folder)


def test_stopped_and_resumed(run: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    folder, done = tmp_path / "store", []

    for wanted in (9, 40, 70):
        stop = Event()

        def progress(texts: int, total: int, stop: Event = stop, wanted: int = wanted) -> None:
            done.append((texts, total))
            if texts >= wanted:
                stop.set()

        assert collect(run, folder, CONFIG, progress=progress, stop=stop) is None
        assert not (folder / "manifest.json").exists()
    assert collect(run, folder, CONFIG, progress=lambda *counts: done.append(counts)) is not None
    assert done[-1] == (80, 80)
    assert [texts for texts, _ in done] == sorted({texts for texts, _ in done})  # each batch once
    assert files_of(folder) == whole


def test_a_finished_collection_is_not_repeated(
    run: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    assert collect(run, folder, CONFIG) is not None
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert collect(run, folder, CONFIG) is not None
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_a_collection_of_a_version_without_settings_of_its_data_is_read(
    run: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    assert collect(run, folder, CONFIG) is not None
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    data = manifest["collected"]["data"]
    for name in ("subset", "columns", "bad_rows", "markers"):
        data.pop(name, None)  # as in those versions
    for settings in ({}, {"subset": None, "columns": None, "bad_rows": "stop"}):
        data |= settings  # and as in versions after them
        path.write_text(json.dumps(manifest))
        before = path.read_bytes()
        assert collect(run, folder, CONFIG) is not None
        assert path.read_bytes() == before


@pytest.mark.slow
def test_killed_and_resumed(run: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for point, number in (
        ("batch", 1),
        ("batch", 30),
        ("save", 1),
        ("save", 2),
        ("before manifest", 1),
        ("manifest", 1),
    ):
        command = [sys.executable, "-c", KILLED, str(run), str(folder), point, str(number)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, (point, number, ended.stderr)
    assert collect(run, folder, CONFIG) is not None
    assert files_of(folder) == whole
