"""What a power cut must find: the order of fsync and rename, recorded, and each call needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fastadapt.adapter import AdapterConfig, TranscoderAdapter
from fastadapt.adapter_files import save_adapters
from fastadapt.checkpoint_files import write_checkpoint
from fastadapt.data.outdir import finish
from fastadapt.errors import RunError
from fastadapt.features.store import write_manifest
from fastadapt.io.atomic import (
    disk_errors,
    half_filled,
    replacing,
    staged_beside,
    sweep,
    sweep_tree,
    writing_folder,
)
from fastadapt.training.checkpoint import save_checkpoint

Event = tuple[str, Path, Path]


def record(write: Callable[[], object], monkeypatch: pytest.MonkeyPatch, skip: int = -1) -> list:
    """The calls of fsync and rename, in order; the one at index ``skip`` of fsync is left out."""
    events: list[Event] = []
    synced = 0
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced - 1 == skip:
            return
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path, path))
        fsync(descriptor)

    def note(function: Callable) -> Callable:
        def stand_in(old: os.PathLike, new: os.PathLike) -> None:
            held = list(Path(old).rglob("*")) if Path(old).is_dir() else []
            events.append(("rename", Path(old), Path(new)))
            contents[Path(old)] = {path: path.is_dir() for path in (Path(old), *held)}
            function(old, new)

        return stand_in

    contents: dict[Path, dict[Path, bool]] = {}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note_sync)
        patch.setattr(os, "rename", note(rename))
        patch.setattr(os, "replace", note(replace))
        write()
    return [events, contents, synced]


def faults(
    events: list[Event], contents: dict[Path, dict[Path, bool]], last: str | None
) -> list[str]:
    """What of the order is not kept: all in a renamed tree, ``last``, folders; then the parent."""
    wrong = []
    for i, (kind, old, new) in enumerate(events):
        if kind != "rename" or ".tmp-" in str(new):  # within what is staged
            continue
        before = [path for what, path, _ in events[:i] if what == "sync"]
        for path in contents[old]:
            if path not in before and ".tmp-" in str(old):
                wrong.append(f"{path} is not synced before its rename")
        # Files, of which the last one says that all are there, and then the folders.
        rank = {
            p: 2 if is_dir else int(p == old / (last or "")) for p, is_dir in contents[old].items()
        }
        ranks = [rank[path] for path in before if path in rank]
        if ranks != sorted(ranks):
            wrong.append(f"{old} is synced in another order: {ranks}")
        if not any(what == "sync" and path == new.parent for what, path, _ in events[i + 1 :]):
            wrong.append(f"{new.parent} is not synced after the rename of {new}")
    return wrong


def adapters() -> list[TranscoderAdapter]:
    return [TranscoderAdapter(8, AdapterConfig(4)) for _ in range(2)]


def write_file(folder: Path) -> None:
    with replacing(folder / "summary.json") as staged:
        staged.write_text("{}")


def write_tree(folder: Path) -> None:
    with writing_folder(folder / "site", last="site.json") as staged:
        (staged / "data").mkdir()
        (staged / "data" / "a.js").write_text("a")
        (staged / "site.json").write_text("{}")


def write_checkpoint_set(folder: Path) -> None:
    save_checkpoint(folder, 1, {"weights": {"W": torch.ones(3)}}, {"step": 1})


def write_store_manifest(folder: Path) -> None:
    (folder / "texts.parquet").write_bytes(b"texts")
    write_manifest(folder, {}, [folder / "texts.parquet"])


def write_export(folder: Path) -> None:
    tensors = {"w": lambda: torch.ones(3)}
    write_checkpoint(folder / "out", tensors, "{}", companions=str(folder))


ARTEFACTS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "summary": (write_file, None),
    "pages": (write_tree, "site.json"),
    "adapters": (lambda folder: save_adapters(adapters(), folder / "adapter"), "fastadapt.json"),
    "checkpoint": (write_checkpoint_set, "manifest.json"),
    "store manifest": (write_store_manifest, None),
    "data manifest": (lambda folder: finish(folder, {"files": {}}), None),
    "export": (write_export, "config.json"),
}


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_the_order_is_kept_and_every_call_is_needed(
    artefact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, last = ARTEFACTS[artefact]
    (tmp_path / "whole").mkdir()
    events, contents, n = record(lambda: write(tmp_path / "whole"), monkeypatch)
    assert faults(events, contents, last) == []
    assert n >= 2
    for skip in range(n):
        folder = tmp_path / f"without-{skip}"
        folder.mkdir()
        events, contents, _ = record(lambda: write(folder), monkeypatch, skip)  # noqa: B023
        assert faults(events, contents, last), f"fsync {skip} of {n} is not missed"


def test_what_stays_in_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_adapters([*adapters(), *adapters()], tmp_path)
    save_adapters(adapters(), tmp_path)
    names = {"README.md", "fastadapt.json", "layer_0.safetensors", "layer_1.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not half_filled(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_tree(tmp_path)

    def fail() -> None:
        with writing_folder(tmp_path / "site", last="site.json") as staged:
            (staged / "site.json").write_text("half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(RunError, match=r"site cannot be written: No space left.*MiB free"):
        fail()
    assert (tmp_path / "site" / "site.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with writing_folder(tmp_path / "site") as first:
        (first / "mine").write_text("")
        write_tree(tmp_path)
        assert (first / "mine").exists()
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["mine"]


def test_a_sweep_follows_links_and_leaves_others(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "disk" / "real")
    staged = staged_beside(tmp_path / "disk" / "real")
    staged.mkdir()
    mine = tmp_path / "disk" / ".tmp-real-mine"
    mine.write_text("")
    assert sweep(tmp_path / "run" / "adapter") == [staged]
    assert mine.exists()
    for name in ("site", "a"):
        staged_beside(tmp_path / "run" / name).write_text("")
    assert len(sweep_tree(tmp_path / "run", but=["site"])) == 1


def test_a_file_that_is_too_large_is_no_full_disk(tmp_path: Path) -> None:
    message = r"out cannot be written: File too large\. Run the same"
    with pytest.raises(RunError, match=message), disk_errors(tmp_path / "out"):
        raise OSError(27, "File too large")
