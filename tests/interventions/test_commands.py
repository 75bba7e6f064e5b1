"""Every command that reads a run reads an intervention, which records pair and data only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import fastadapt
from fastadapt.cli.main import main

FINISHED = Path(__file__).parents[1] / "cli" / "old_files" / "finished"
KINDS = {
    "ablate": ("--ablate", "0/1,2/3"),
    "only": ("--only", "0/1,0/2,0/5,1/3,1/9,2/3,2/7,3/5,3/11"),
    "onto-target": ("--onto-target", "0/1,2/3", "--scale", "-1"),
}
PROMPT = "tom has 3 apples ."


@pytest.fixture(params=KINDS)
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    run, folder = shutil.copytree(FINISHED, tmp_path / "run"), tmp_path / request.param
    shutil.rmtree(run / "features")  # features that are named need no store
    assert main(["intervene", str(run), *KINDS[request.param], "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_every_command_reads_an_intervention(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*argv: object) -> str:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    few = ("--device", "cpu")
    assert not fastadapt.load(changed, device="cpu").store
    assert call("generate", changed, PROMPT, "--max_new_tokens", 2, *few).strip()
    for more in ((), ("--plain",)):
        assert "KL of adapter" in call("trace", changed, PROMPT, "--max_new_tokens", 1, *more, *few)
    shown = call("contrast", changed, "--n", 6, "--statistics.resamples", 200, *few)
    assert "adapter" in shown
    call("features", "collect", changed, "--n", 4, *few)
    call("features", "show", changed, "--top", 2)
    call(
        "changes",
        changed,
        "--texts",
        2,
        "--features",
        1,
        "--positions",
        1,
        "--prompts",
        1,
        "--max_new_tokens",
        2,
        *few,
    )
    call(
        "eval",
        changed,
        "--parts",
        "[outputs]",
        "--texts.n",
        2,
        "--sampling.max_new_tokens",
        4,
        *few,
    )
    assert json.loads((changed / "eval" / "eval.json").read_text())
    call("export", changed, "--output", changed.with_name("exported"))
