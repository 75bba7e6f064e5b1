"""The speed of generation, relative to the target."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastadapt.errors import UserError
from fastadapt.evaluation.generation import throughput as module
from fastadapt.evaluation.generation.throughput import SpeedConfig, measure_speed
from fastadapt.evaluation.models_under_test import ModelSet

QUICK = SpeedConfig(batch_size=2, prompt_tokens=3, new_tokens=4, rounds=3)


def test_speeds_are_relative_to_the_target_and_stored(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    models = ModelSet.open([make_run("a"), make_run("b", seed=1)])
    calls: list[tuple[int, int]] = []
    path = tmp_path / "speed.json"
    result = measure_speed(models, path, QUICK, progress=lambda *counts: calls.append(counts))
    assert list(result["models"]) == ["target", "hybrid", "a", "b"]
    assert result["models"]["target"]["overhead"] == 0
    assert all(each["tokens_per_s"] > 0 for each in result["models"].values())
    assert calls == [(1, 3), (2, 3), (3, 3)]
    before = path.stat().st_mtime_ns
    assert measure_speed(models, path, QUICK) == result
    assert path.stat().st_mtime_ns == before
    more = SpeedConfig(batch_size=2, prompt_tokens=3, new_tokens=5, rounds=1)
    assert measure_speed(models, path, more)["new_tokens"] == 5


def test_medians_of_the_rounds_are_reported(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = ModelSet.open([make_run("a")])
    # A warm-up, then three rounds of target, hybrid, a on a machine that slows down.
    times = iter([9.0, 9.0, 9.0, 1.0, 1.1, 1.5, 2.0, 2.2, 3.0, 4.0, 4.4, 8.0])
    monkeypatch.setattr(module, "_time", lambda *_: next(times))
    speeds = measure_speed(models, tmp_path / "speed.json", QUICK)["models"]
    assert speeds["a"]["overhead"] == pytest.approx(0.5)
    assert speeds["hybrid"]["overhead"] == pytest.approx(0.1)
    assert speeds["target"]["tokens_per_s"] == 8 / 2.0


def test_a_stopped_measurement_is_not_stored(make_run: Callable[..., Path], tmp_path: Path) -> None:
    stop = threading.Event()
    models = ModelSet.open([make_run("a")])
    path = tmp_path / "speed.json"
    assert measure_speed(models, path, QUICK, progress=lambda *_: stop.set(), stop=stop) == {}
    assert not path.exists()
    with pytest.raises(UserError, match=r"speed\.rounds: expected 1 or more, got 0"):
        SpeedConfig(rounds=0)
