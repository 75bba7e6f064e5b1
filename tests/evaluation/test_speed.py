"""The speed of generation, measured side by side."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastadapt.errors import UserError
from fastadapt.evaluation.generation import throughput as module
from fastadapt.evaluation.generation.throughput import SpeedConfig, measure_speed
from fastadapt.evaluation.models_under_test import Students

QUICK = SpeedConfig(batch_size=2, prompt_tokens=3, new_tokens=4, rounds=3)


def test_models_take_turns_and_the_target_is_the_measure(make_run, tmp_path: Path) -> None:
    students = Students.open([make_run("a"), make_run("b", seed=1)])
    told: list[tuple[int, int]] = []
    path = tmp_path / "speed.json"
    found = measure_speed(students, path, QUICK, progress=lambda *at: told.append(at))
    assert list(found["models"]) == ["target", "hybrid", "a", "b"]
    assert found["models"]["target"]["overhead"] == 0
    assert all(each["tokens_per_s"] > 0 for each in found["models"].values())
    assert told == [(1, 3), (2, 3), (3, 3)]
    before = path.stat().st_mtime_ns
    assert measure_speed(students, path, QUICK) == found
    assert path.stat().st_mtime_ns == before
    more = SpeedConfig(batch_size=2, prompt_tokens=3, new_tokens=5, rounds=1)
    assert measure_speed(students, path, more)["new_tokens"] == 5


def test_the_median_of_the_turns_counts(make_run, tmp_path: Path, monkeypatch) -> None:
    students = Students.open([make_run("a")])
    #: one warm-up, then three turns of target, hybrid, a; a machine that slows down
    times = iter([9.0, 9.0, 9.0, 1.0, 1.1, 1.5, 2.0, 2.2, 3.0, 4.0, 4.4, 8.0])
    monkeypatch.setattr(module, "_time", lambda *_: next(times))
    found = measure_speed(students, tmp_path / "speed.json", QUICK)["models"]
    assert found["a"]["overhead"] == pytest.approx(0.5)
    assert found["hybrid"]["overhead"] == pytest.approx(0.1)
    assert found["target"]["tokens_per_s"] == 8 / 2.0


def test_a_stop_keeps_nothing(make_run, tmp_path: Path) -> None:
    stop = threading.Event()
    students = Students.open([make_run("a")])
    path = tmp_path / "speed.json"
    assert measure_speed(students, path, QUICK, progress=lambda *_: stop.set(), stop=stop) == {}
    assert not path.exists()
    with pytest.raises(UserError, match=r"speed\.rounds: expected 1 or more, got 0"):
        SpeedConfig(rounds=0)
