"""Folders that several processes fill part by part, with parts that take no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.io.atomic import locked, staged_beside
from fastadapt.io.workspace import Workspace
from reproduce import parts
from reproduce.parts import MEASURED, SETTINGS, StoppedError, fill, missing, open_folder, write

RULES = "a" * 64


class Result(TypedDict):
    rules: str
    number: int


@dataclass(frozen=True)
class Part(parts.Part):
    number: int

    @property
    def label(self) -> str:
        return f"part {self.number}"

    @property
    def kind(self) -> str:
        return "even" if self.number % 2 == 0 else "odd"

    def measured(self) -> Any:
        return parts.read_measured(self.folder, Result, RULES)


def some_parts(out: Path, n: int = 4) -> list[Part]:
    return [Part(out / str(number), number) for number in range(n)]


def worker(
    done: list[int], before: Callable[[Part, Event], object] = lambda *_: None
) -> Callable[[Part, Any, Event], None]:
    """Return work that notes the numbers of its parts."""

    def work(part: Part, _: Any, stop: Event) -> None:
        before(part, stop)
        write(part.folder / MEASURED, {"rules": RULES, "number": part.number})
        done.append(part.number)

    return work


def test_each_part_is_measured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    assert fill(tmp_path, some_parts(tmp_path), worker(done))
    assert fill(tmp_path, some_parts(tmp_path), worker(done))
    assert done == [0, 1, 2, 3]
    assert missing(some_parts(tmp_path), is_summary=False) == []
    lines = capsys.readouterr().err.splitlines()
    # The time of a kind is known when one of its parts is finished.
    assert lines == [
        "part 0: done in 0 s; 3 of 4 parts left",
        "part 1: done in 0 s; 2 of 4 parts left, 0 s for one process",
        "part 2: done in 0 s; 1 of 4 parts left, 0 s for one process",
    ]


def test_a_kill_costs_the_part_alone(tmp_path: Path) -> None:
    def killed(part: Part, _: Event) -> None:
        if part.number == 2:
            staged_beside(part.folder / MEASURED).write_text("half")
            raise MemoryError

    done: list[int] = []
    with pytest.raises(MemoryError):
        fill(tmp_path, some_parts(tmp_path), worker(done, killed))
    assert len(list((tmp_path / "2").iterdir())) == 2  # the lock, and what was half written
    assert fill(tmp_path, some_parts(tmp_path), worker(done))
    assert done == [0, 1, 2, 3]
    assert {path.name for path in (tmp_path / "2").iterdir()} == {".lock", MEASURED}


def test_a_stop_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(part: Part, stop: Event) -> None:
        if part.number == 1:
            stop.set()
            raise StoppedError

    done: list[int] = []
    assert not fill(tmp_path, some_parts(tmp_path), worker(done, stopped))
    assert done == [0]
    printed = capsys.readouterr().out
    assert f"Stopped; finished parts are saved in {tmp_path}." in printed
    assert "Re-run the same command to resume." in printed
    assert fill(tmp_path, some_parts(tmp_path), worker(done))
    assert done == [0, 1, 2, 3]


def test_parts_of_other_processes_are_passed_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1").mkdir()
    done: list[int] = []
    with locked(tmp_path / "1" / ".lock"):
        assert fill(tmp_path, some_parts(tmp_path), worker(done))
    assert done == [0, 2, 3]
    left = missing(some_parts(tmp_path), is_summary=False)
    assert [part.number for part in left] == [1]
    printed = capsys.readouterr()
    assert "part 1: another process is at it" in printed.err
    assert "Not measured yet: part 1." in printed.out


def test_other_rules_measure_again(tmp_path: Path) -> None:
    (part, *_) = some_parts(tmp_path)
    part.folder.mkdir()
    write(part.folder / MEASURED, {"rules": "b" * 64, "form": "of others"})
    assert part.measured() is None
    done: list[int] = []
    assert fill(tmp_path, [part], worker(done))
    assert (done, part.measured()["number"]) == ([0], 0)
    (part.folder / MEASURED).write_text('{"rules": "a"}')
    with pytest.raises(UserError, match=r"0/measured\.json"):
        part.measured()


def test_a_folder_holds_one_kind_of_parts(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", "--out", "writing to", (SETTINGS,), marker=SETTINGS)

    def opened(training: str, measuring: str, *, is_new: bool = True) -> None:
        settings = {"training": training, "measuring": measuring}
        open_folder(workspace, settings, is_part=str.isdecimal, clash="is another's", is_new=is_new)

    with pytest.raises(UserError, match="holds no benchmark; leave out --summary"):
        opened("a", "1", is_new=False)
    opened("a", "1")
    (workspace.folder / "0").mkdir()
    opened("a", "2", is_new=False)
    with pytest.raises(UserError, match=r"--out: .* is another's"):
        opened("b", "2")
    assert (workspace.folder / SETTINGS).read_text().count('"2"') == 1
    (workspace.folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"not of this benchmark \(it holds notes.txt\)"):
        opened("a", "2")
