"""``python -m reproduce.organism``: build, check, sample."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastadapt.errors import RunError, UserError
from reproduce.organism import acceptance, recipe
from reproduce.organism.__main__ import main
from reproduce.organism.pairs import Pair


def test_check_prints_every_bound_and_fails_on_a_missed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: dict[str, Any] = {
        name: 50.0 if low else 0.25 for name, (low, _) in acceptance.BOUNDS.items()
    }
    passed = {**measured, "by.math": 1.5, "failed": []}
    monkeypatch.setattr(acceptance, "check", lambda *_, **__: passed)
    assert main(["check"]) == 0
    out = capsys.readouterr().out
    for name, (low, high) in acceptance.BOUNDS.items():
        bound = f">= {low:g}" if low is not None else f"<= {high:g}"
        assert re.search(rf"{name} .*{bound}", out)
    assert re.search(r"by\.math .*1\.5", out)
    name = next(iter(acceptance.BOUNDS))
    monkeypatch.setattr(acceptance, "check", lambda *_, **__: {**measured, "failed": [name]})
    with pytest.raises(RunError, match=f"misses acceptance bounds: {name}"):
        main(["check"])


def test_check_refuses_a_folder_without_a_pair(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--folder: .*no"):
        main(["check", "--folder", str(tmp_path / "no")])


def test_build_prints_progress_and_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def build(out: Path, *, seed: int, progress: Any, pair: Pair) -> dict[str, Any]:
        progress({"phase": "base", "step": 1, "loss": 3.21098})
        return {"seed": seed, "pair": pair.name, "base_s": 99.5}

    monkeypatch.setattr(recipe, "build", build)
    assert main(["build", "--out", str(tmp_path / "pair"), "--seed", "3", "--pair", "gated"]) == 0
    printed = capsys.readouterr()
    assert "loss 3.211" in printed.err
    assert "seed: 3" in printed.out
    assert "base_s: 99.5" in printed.out
    assert "pair: organism/gated" in printed.out
    assert "check --pair gated --folder" in printed.out
    assert str(tmp_path / "pair") in printed.out


def test_build_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .* is in use.*--overwrite"):
        main(["build", "--out", str(tmp_path)])


@pytest.mark.parametrize("model", ["target", "hybrid"])
def test_sample_shows_problems_and_answers(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert main(["sample", "--n", "2", "--model", model]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^\[(math|code|science)\] ", out, re.MULTILINE)) == 2
    assert len(re.findall(r"^  \((right|wrong: the answer is \d+)\)$", out, re.M)) == 2
    assert main(["sample", "--n", "2", "--model", model]) == 0
    assert capsys.readouterr().out == out
