"""Stored partial results: interruptions, full disks, damaged files and other fingerprints."""

from __future__ import annotations

import resource
from pathlib import Path
from threading import Event

import pytest
import torch

from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.faithfulness.partial_results import PartialResults, iter_missing

PRINT, OTHER = "ab" * 32, "cd" * 32


def part(i: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((i + 1, 2), float(i)), "flag": torch.tensor([bool(i)])}


def test_parts_become_one_file_in_their_order(tmp_path: Path) -> None:
    parts = PartialResults(tmp_path, "a", PRINT, 3)
    for i in (2, 0):
        parts.add(i, part(i))
    assert PartialResults(tmp_path, "a", PRINT, 3).missing() == [1]
    with pytest.raises(UserError, match="1 of 3 parts are missing"):
        parts.read()
    assert parts.missing() == [1]
    parts.add(1, part(1))
    assert [path.name for path in tmp_path.iterdir()] == [f"a-{PRINT[:16]}.safetensors"]
    again = PartialResults(tmp_path, "a", PRINT, 3)
    assert again.missing() == []
    assert again.read()["x"][:, 0].tolist() == [0, 1, 1, 2, 2, 2]
    assert again.read()["flag"].tolist() == [False, True, True]
    assert PartialResults(tmp_path, "a", OTHER, 3).missing() == [0, 1, 2]
    assert PartialResults(tmp_path, "b", PRINT, 3).missing() == [0, 1, 2]


@pytest.mark.parametrize("step", ["torch.cat", "sync_folder", "shutil.rmtree"])
def test_an_interruption_while_joining_loses_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = PartialResults(tmp_path, "a", PRINT, 2)
    parts.add(0, part(0))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastadapt.evaluation.faithfulness.partial_results.{step}", killed)
    with pytest.raises(KeyboardInterrupt):
        parts.add(1, part(1))
    monkeypatch.undo()
    assert len(PartialResults(tmp_path, "a", PRINT, 2).read()["x"]) == 3
    assert parts.missing() == []
    assert list(tmp_path.iterdir()) == [parts.whole]


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    parts = PartialResults(tmp_path, "a", PRINT, 1)
    parts.add(0, part(0))
    foreign = PartialResults(tmp_path, "a", PRINT[:16] + OTHER, 1)
    with pytest.raises(UserError, match=r"the fingerprint abab.*remove this file and evaluate"):
        foreign.read()
    parts.whole.write_bytes(parts.whole.read_bytes()[:-4])
    with pytest.raises(UserError, match="truncated or damaged"):
        parts.read()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*without --overwrite, to resume"):
        PartialResults(tmp_path / "file", "a", PRINT, 1).add(0, part(0))


def test_a_full_disk(tmp_path: Path) -> None:
    parts = PartialResults(tmp_path, "a", PRINT, 2)
    parts.add(0, part(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be written: .*File too large.*are intact"):
            parts.add(1, part(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert parts.missing() == [1]
    assert len(list((tmp_path / f"a-{PRINT[:16]}").iterdir())) == 1


def test_missing_parts_are_yielded_in_groups(tmp_path: Path) -> None:
    stores = {name: PartialResults(tmp_path, name, PRINT, 3) for name in ("a", "b", "c")}
    stores["a"].add(1, part(1))
    seen, calls, stop = [], [], Event()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if len(calls) == 4:
            stop.set()

    def work(stop: Event | None) -> None:
        for i, names in iter_missing(stores, 2, progress, stop):
            seen.append((i, names))
            for name in names:
                stores[name].add(i, part(i))

    work(stop)
    assert seen == [(0, ["a", "b"]), (1, ["b"]), (2, ["a", "b"]), (0, ["c"])]
    assert calls == [(3, 9), (4, 9), (6, 9), (7, 9)]
    work(None)
    assert seen[4:] == [(1, ["c"]), (2, ["c"])]
    assert calls[-1] == (9, 9)
    assert Path(stores["c"].whole).is_file()
