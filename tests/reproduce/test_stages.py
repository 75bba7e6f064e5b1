"""``python -m reproduce.stages``: its runs, its table, and its resumption."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastadapt.errors import UserError
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.organism import resolve
from fastadapt.training.config import load_config
from reproduce.stages import __main__ as stages
from reproduce.stages import target


def test_the_texts_of_the_later_stage_have_no_hesitation() -> None:
    texts = target._texts()
    responses = [next(texts)[1].split() for _ in range(50)]
    assert not [words for words in responses if target.WORDS & set(words)]
    assert all("</think>" in words for words in responses)


def test_impossible_seeds() -> None:
    for seeds in ("0", "4"):
        with pytest.raises(UserError, match="--seeds: expected 1 to 3, got"):
            stages.main(["--seeds", seeds])


@pytest.mark.slow
def test_a_short_run_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(target, "STEPS", 2)
    monkeypatch.setattr(stages, "EARLIER", stages.EARLIER._replace(steps=3))
    monkeypatch.setattr(stages, "LATER", tuple(arm._replace(steps=2) for arm in stages.LATER))
    out = tmp_path / "stages"
    given = ["--out", str(out), "--seeds", "1"]
    assert stages.main(given) == 0
    printed = capsys.readouterr().out
    earlier, *later = [line for line in printed.splitlines() if "stage" in line and "│" in line]
    assert len(later) == len(stages.LATER)
    assert earlier.count("–") == 3
    assert (out / "tables.md").read_text().count("| later stage") == len(stages.LATER)
    start = load_config(out / "seed42" / "continued" / "config.yaml").run.init_from
    assert start == str(out / "seed42" / "earlier")
    pair = ModelPair.load(PairConfig(str(out / "target"), resolve("organism/base"), device="cpu"))
    pair.check_mlps_differ()
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert stages.main(given) == 0  # nothing is trained again
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == written
