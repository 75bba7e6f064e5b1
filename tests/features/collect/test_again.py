"""Repeated collection: rejected settings, kills, and spellings of paths leave stores intact."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from organism_runs import files_of, make_run

from fastadapt.errors import UserError
from fastadapt.features import collect as room
from fastadapt.features.autointerp import judgements
from fastadapt.features.collect import CollectConfig, Shard, collect, folder, merge
from fastadapt.features.overlap import plot_of
from fastadapt.features.store.schema import TABLES
from fastadapt.features.store.store import Store, writing

FEW = CollectConfig(n=3)


class Killed(BaseException):
    """Simulates the end of the process; the test disables cleanups."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


def collected(run: Path, out: Path, config: CollectConfig = FEW) -> Store:
    store = collect(run, out, config)
    assert store is not None
    return store


def described(store: Store) -> None:
    """Add the files that judges and the overlap write."""
    for name in (judgements.JSON, judgements.TEXT):
        (store.folder / name).write_text("{}")
    for name in (judgements.PLOTS, "sets", "calls"):
        (store.folder / name).mkdir()
        (store.folder / name / "one").write_text("1")
    for name in ("descriptions", "scores", "classes", "overlap"):
        store.add(name, TABLES[name].empty_table())
    plot_of(store).write_bytes(b"png")


def mistaken(folder: Path) -> dict[str, CollectConfig]:
    turns = [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "2"}]
    good = json.dumps({"conversations": turns})
    (folder / "bad.jsonl").write_text(good + "\n{")
    return {
        "malformed": CollectConfig(data=str(folder / "bad.jsonl")),
        "too long": CollectConfig(n=3, max_tokens=5),
        "not there": CollectConfig(data=str(folder / "none.jsonl")),
    }


@pytest.mark.parametrize("mistake", ["malformed", "too long", "not there"])
def test_rejected_settings_leave_a_store_intact(run: Path, tmp_path: Path, mistake: str) -> None:
    out = tmp_path / "store"
    described(collected(run, out))
    before = files_of(out)
    with pytest.raises(UserError):
        collect(run, out, mistaken(tmp_path)[mistake], overwrite=True)
    assert files_of(out) == before


def test_rejected_settings_leave_shards_and_unfinished_stores_intact(
    run: Path, tmp_path: Path
) -> None:
    config = CollectConfig(n=70, batch_tokens=1000)
    stop = Event()
    stop.set()
    assert collect(run, tmp_path / "begun", config, stop=stop) is None
    assert collect(run, tmp_path / "shard", FEW, shard=Shard(0, 2)) is None
    for out in (tmp_path / "begun", tmp_path / "shard"):
        before = files_of(out)
        with pytest.raises(UserError, match=r"bad.jsonl, line 2"):
            collect(run, out, mistaken(tmp_path)["malformed"], overwrite=True)
        assert files_of(out) == before


def test_overwriting_retains_only_sets_and_calls(run: Path, tmp_path: Path) -> None:
    out, anew = tmp_path / "store", replace(FEW, top=7)
    described(collected(run, out))
    assert collect(run, out, anew, overwrite=True) is not None
    files = files_of(out)
    assert {files.pop("sets/one"), files.pop("calls/one")} == {b"1"}
    assert files == files_of(collected(run, tmp_path / "fresh", anew).folder)


@pytest.mark.quick("0-True", "7-False")
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("n_removed", range(8))
def test_killed_while_the_folder_is_cleared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_removed: int, overwrite: bool
) -> None:
    out, remove = tmp_path / "store", folder.remove
    removed: list[Path] = []
    described(collected(run, out))

    def few(path: Path) -> None:
        if len(removed) == n_removed:
            raise Killed
        removed.append(path)
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "remove", few)
        patch.setattr(folder, "sweep", lambda out: None)  # a killed process does not clean up
        with pytest.raises(Killed):
            collect(run, out, replace(FEW, top=7), overwrite=True)
    assert (out / folder.NEXT).is_dir()
    assert collect(run, out, replace(FEW, top=7), overwrite=overwrite) is not None
    files = files_of(out)
    assert {files.pop("sets/one"), files.pop("calls/one")} == {b"1"}
    assert files == files_of(collected(run, tmp_path / "fresh", replace(FEW, top=7)).folder)


def test_common_file_names_do_not_mark_a_store(run: Path, tmp_path: Path) -> None:
    """Without a marker of a collection, such files belong to the user."""
    for name in ("texts.parquet", "manifest.json", "adapter/layer_0.safetensors"):
        copy = tmp_path / name.replace("/", "-") / name
        copy.parent.mkdir(parents=True)
        copy.write_text("{}")
        out = tmp_path / name.replace("/", "-")
        with pytest.raises(UserError, match="is not empty and is not a store of features"):
            collect(run, out, FEW, overwrite=True)
        assert copy.read_text() == "{}"
    with (
        writing(out),
        pytest.raises(UserError, match="is not empty and is not a store of features"),
    ):
        collect(run, out, FEW, overwrite=True)


@pytest.fixture
def shards(run: Path, tmp_path: Path) -> list[Path]:
    for i in range(2):
        assert collect(run, tmp_path / f"shard-{i}", CollectConfig(n=70), shard=Shard(i, 2)) is None
    return [tmp_path / f"shard-{i}" for i in range(2)]


@pytest.mark.quick("half a table-False")
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("point", ["write_texts", "write_units", "write_manifest", "half a table"])
def test_a_killed_merge_can_be_repeated(
    tmp_path: Path,
    shards: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    overwrite: bool,
) -> None:
    whole = files_of(merge(shards, tmp_path / "whole").folder)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(room, "write_units" if point == "half a table" else point, killed)
        with pytest.raises(Killed):
            merge(shards, out)
    if point == "half a table":
        (out / "adapter" / f".tmp-features.parquet-{'0' * 32}").write_bytes(b"half")
        (out / f".tmp-manifest.json-{'0' * 32}").write_bytes(b"half")
    assert not (out / "manifest.json").exists()
    assert files_of(merge(shards, out, overwrite=overwrite).folder) == whole


def test_shards_are_not_merged_into_one_of_them(shards: list[Path]) -> None:
    before = files_of(shards[0])
    with pytest.raises(UserError, match="is one of the shards to merge"):
        merge(shards, shards[0], overwrite=True)
    assert files_of(shards[0]) == before


def moved(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return os.fspath(shutil.move(run, run.with_name("moved")))


def beside(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(run.parent)
    return run.name


def dotted(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(run.parent.parent)
    return f"./{run.parent.name}/{run.name}"


@pytest.mark.parametrize("spelling", [moved, beside, dotted])
def test_a_run_is_the_same_however_its_path_is_spelt(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spelling: Callable[[Path, pytest.MonkeyPatch], str],
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "runs" / "a"))
    data = tmp_path / "runs" / "own.jsonl"
    turns = [{"from": "human", "value": "2 + 2 ?"}, {"from": "gpt", "value": "<think> </think> 4"}]
    data.write_text(json.dumps({"conversations": turns}) + "\n")
    config = CollectConfig(data=str(data))
    stop = Event()
    stop.set()
    assert collect(copy, None, config, stop=stop) is None
    spelt = spelling(copy, monkeypatch)
    config = CollectConfig(data=os.path.relpath(data))
    store = collect(spelt, None, config)
    assert store is not None
    assert collect(spelt, None, config, progress=killed) is not None  # finished
    with pytest.raises(UserError, match=r"\(seed: 1, was 0\)"):
        collect(Path(spelt).resolve(), None, replace(config, seed=1))
    data.write_text(data.read_text() * 2)
    with pytest.raises(UserError, match="fingerprint: "):
        collect(spelt, None, config)
    shutil.rmtree(Path(spelt) / "adapter")
    other = make_run(tmp_path / "other", seed=1)
    shutil.copytree(other / "adapter", Path(spelt) / "adapter")
    with pytest.raises(UserError, match="collected from other adapters than the run has now"):
        collect(spelt, None, config)
