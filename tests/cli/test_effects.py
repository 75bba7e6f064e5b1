"""Output of the commands about what features do, on a trained run of the embedded pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: 16 features per layer, with a store of features.
FINISHED = Path(__file__).parent / "old_files" / "finished"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FINISHED, tmp_path / "run"))


def test_the_strongest_features_are_listed_and_shown(
    run: Path, fastadapt: Callable[..., Any]
) -> None:
    listed = fastadapt("features", "show", run, "--top", 3)
    assert listed.code == 0, listed.err
    names = [line.split()[0] for line in listed.out.splitlines() if "│" in line]
    units = json.loads(fastadapt("features", "show", run, "--top", 3, "--json").out)
    assert names == [f"{u['layer']}/{u['feature']}" for u in units]
    sizes = [u["density"] * u["mean"] * u["norm"] for u in units]
    assert sizes == sorted(sizes, reverse=True)
    assert [u["rank"] for u in units] == [1, 2, 3]

    shown = fastadapt("features", "show", run, names[0], "3/11", "--examples", 2)
    assert shown.code == 0, shown.err
    assert f"Layer {units[0]['layer']}, feature {units[0]['feature']}\n" in shown.out
    assert "Layer 3, feature 11\n" in shown.out
    for token, _ in units[0]["promoted"]:
        assert token in shown.out
    assert shown.out.count("strongest examples") == 2
    assert shown.out.count("(text ") == 4


def test_features_are_ablated_by_name(
    run: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    selected = fastadapt("features", "select", run, "mine", "--features", "2/3", "0/1")
    assert selected.code == 0, selected.err
    for name, ablate in (("set", "mine"), ("names", "0/1,2/3")):
        outcome = fastadapt("intervene", run, "--ablate", ablate, "--output", tmp_path / name)
        assert outcome.code == 0, outcome.err
    for layer in range(4):
        files = [tmp_path / n / "adapter" / f"layer_{layer}.safetensors" for n in ("set", "names")]
        assert files[0].read_bytes() == files[1].read_bytes()
        same = files[0].read_bytes() == (run / "adapter" / files[0].name).read_bytes()
        assert same == (layer in (1, 3))
