"""A graph that is killed goes on from its finished rows and ablations, and has the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from organism_runs import make_run

from fastadapt.errors import UserError
from fastadapt.graphs.unfinished import LEDGER, Batches, Stopped, unfinished
from fastadapt.io.ledger import Ledger

PROMPT = "tom has 3 apples and gets 4 apples . how many now ?"
SMALL = ("--nodes", 12, "--rows", 3, "--evidence.ablations", 4, "--evidence.copies", 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("graph") / "run")


def command(run: Path, output: Path, *changes: Any) -> list[str]:
    arguments = ("graph", run, PROMPT, "--token", "4", *SMALL, "--output", output, *changes)
    return [str(word) for word in (*arguments, "--device", "cpu")]


def kill_after(batches: int, arguments: list[str]) -> None:
    """Run a command in a process that kills itself once it has stored this number of batches."""
    from fastadapt.cli.main import main

    child = os.fork()
    if child == 0:
        try:
            add, seen = Ledger.add, 0

            def adding(self: Ledger, entries: Any) -> None:
                nonlocal seen
                entries = list(entries)
                add(self, entries)
                seen += entries[0][0] == "batch"
                if seen == batches:
                    os.kill(os.getpid(), signal.SIGKILL)

            Ledger.add = adding  # type: ignore[method-assign]
            main(arguments)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of the batches that were computed, as they are stored."""
    numbers: list[int] = []
    add = Ledger.add

    def adding(self: Ledger, entries: Any) -> None:
        entries = list(entries)
        numbers.extend(part for key, part, _ in entries if key == "batch")
        add(self, entries)

    monkeypatch.setattr(Ledger, "add", adding)
    return numbers


def test_a_killed_graph_goes_on_from_its_rows(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any], added: list[int]
) -> None:
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    outcome = fastadapt(*command(run, whole))
    assert outcome.code == 0, outcome.err
    assert list(tmp_path.iterdir()) == [whole]
    n = len(added)
    assert added == list(range(n))
    n_rows = 1 + 12 // 3  # the target's, and four of expanded features
    assert n > n_rows
    # While rows are computed; in the same graph a second time; and while ablations are measured.
    for first, second in ((2, 2), (n_rows + 2, 0)):
        kill_after(first, command(run, broken))
        if second:
            kill_after(second, command(run, broken))
        assert not broken.exists()
        assert broken.with_suffix(".unfinished").is_dir()
        added.clear()
        outcome = fastadapt(*command(run, broken))
        assert outcome.code == 0, outcome.err
        assert added == list(range(first + second, n))  # none is computed twice
        assert broken.read_bytes() == whole.read_bytes()
        assert sorted(tmp_path.iterdir()) == [broken, whole]
        broken.unlink()


def test_other_settings_and_weights_do_not_go_on(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any], added: list[int]
) -> None:
    output = tmp_path / "a.json"
    kill_after(2, command(run, output))
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("graphs"))
    file = other / "adapter" / "layer_3.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    for arguments, names in (
        (command(run, output, "--top", 3), "graph settings"),
        (command(run, output, "--evidence.seed", 3), "evidence settings"),
        (command(other, output), "weights"),
        (command(run, output, "--stream", "target", "--position", 2), "question, stream"),
    ):
        outcome = fastadapt(*arguments)
        assert outcome.code == 2
        expected = f"has finished rows of a graph with other {names}. Give the same settings"
        assert expected in outcome.err
    assert fastadapt(*command(run, output, "--top", 3, "--overwrite")).code == 0
    assert added[0] == 0
    assert list(tmp_path.glob("*.unfinished")) == []


def test_a_damaged_or_foreign_ledger_gets_one_message(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    from safetensors.torch import load, save

    output = tmp_path / "a.json"
    kill_after(2, command(run, output))
    path = output.with_suffix(".unfinished") / LEDGER
    with Ledger(path) as ledger:
        stored = ledger.get("batch", 1)
        assert stored is not None
        rows = load(stored)
        ledger.add([("batch", 1, save({**rows, "value": rows["value"] + 1e-9}))])
    outcome = fastadapt(*command(run, output))
    assert outcome.code == 1
    assert "the stored rows are not those of this computation" in outcome.err
    path.write_bytes(path.read_bytes()[:500])
    outcome = fastadapt(*command(run, output))
    assert outcome.code == 1
    assert "is damaged" in outcome.err
    assert "Begin the graph again (--overwrite)" in outcome.err


def test_an_impossible_question_leaves_nothing(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any]
) -> None:
    arguments = ("graph", run, PROMPT, "--token", "xyzzy", "--output", tmp_path / "a.json")
    assert fastadapt(*arguments, "--device", "cpu").code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_question_with_overwrite_keeps_the_finished_rows(
    run: Path, tmp_path: Path, fastadapt: Callable[..., Any], added: list[int]
) -> None:
    output = tmp_path / "a.json"
    kill_after(2, command(run, output))
    assert fastadapt(*command(run, output, "--token", "xyzzy", "--overwrite")).code == 2
    assert fastadapt(*command(run, output)).code == 0
    assert added[0] == 2


def test_a_stop_waits_for_the_batch(tmp_path: Path) -> None:
    graph, stop, ones = tmp_path / "a.json", Event(), {"x": torch.ones(2)}
    with suppress(Stopped), unfinished(graph, {"a": 1}, stop=stop) as batches:
        assert batches.next(lambda: ones)["x"].tolist() == [1, 1]
        stop.set()
        with pytest.raises(Stopped):
            batches.next(lambda: ones)
        raise Stopped
    with (
        pytest.raises(UserError, match="another process is explaining into"),
        unfinished(graph, {"a": 1}),
        unfinished(graph, {"a": 1}),
    ):
        pass
    with unfinished(graph, {"a": 1}, stop=stop) as batches:
        assert batches.next(dict)["x"].tolist() == [1, 1]  # stored, so not computed
    assert list(tmp_path.iterdir()) == []
    assert Batches().next(lambda: ones) is ones
