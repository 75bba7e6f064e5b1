"""Measurements over places: their places, their parts, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from organism_runs import make_run

from fastadapt.effects.run import load_run
from fastadapt.graphs.attribution import KINDS, Leaves, edges, unit_target
from fastadapt.graphs.linear.trace import record
from reproduce.graphs.__main__ import main
from reproduce.graphs.effects import PREDICTORS
from reproduce.graphs.places import places, texts
from reproduce.graphs.shares import PARTS, _parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with random adapters whose file names all that a trained run's does."""
    run = make_run(tmp_path_factory.mktemp("measures") / "run", n_features=48, l0=6.0)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"train": "organism/train", "max_validation": 20}
    settings |= {"adapter": {"n_features": 48}, "run": {"output": str(run)}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_places_are_where_the_models_differ_most(folder: Path) -> None:
    run = load_run(folder, dtype="float64", device="cpu")
    chosen = list(places(run, 3, seed=0))
    assert [place.ids.tolist() for place in chosen] != [
        place.ids.tolist() for place in places(run, 3, seed=1)
    ]
    whole = [text.tolist() for text in texts(run, seed=0)]
    for place in chosen:
        ids, (position, token, against, kl) = place
        assert len(ids) == position + 1
        assert any(text[: len(ids)] == ids.tolist() for text in whole)
        tops = []
        for mode in ("target", "hybrid"):
            with run.model.mode(mode), torch.no_grad():
                tops.append(int(run.model(ids[None]).logits[0, -1].argmax()))
        assert tops == [token, against]
        assert kl > 0


def test_shares_are_parts_of_the_absolute_edges(folder: Path) -> None:
    run = load_run(folder, dtype="float64", device="cpu")
    trace = record(run.model, texts(run, 0)[0][:20], rows=2)
    leaves = Leaves(trace)
    node = int((leaves.layer[: leaves.n_features] == 3).nonzero()[-1])
    target = unit_target(trace, leaves, node)
    row = edges(trace, leaves, [target])[0].abs()
    by_kind = {k: float(row[leaves.kind == i].sum()) for i, k in enumerate(KINDS)}
    whole = float(row.sum()) + abs(target.constant)
    (parts,) = _parts(trace, leaves, [node])
    assert sum(parts[: len(PARTS)]) == pytest.approx(1)
    assert parts[0] == pytest.approx(by_kind["feature"] / whole)
    assert parts[1] == pytest.approx(by_kind["token"] / whole)
    assert parts[2] == pytest.approx(by_kind["decoder bias"] / whole)
    assert min(parts[:2]) > 0  # these adapters have no bias
    features = row[: leaves.n_features].sort(descending=True).values
    half = int(parts[-1])
    assert features[:half].sum() >= 0.5 * features.sum() > features[: half - 1].sum()


@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_the_command_of_effects(
    stream: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "effects.json"
    arguments = ["effects", str(folder), "--places", "3", "--ablations", "6", "--out", str(out)]
    assert main([*arguments, "--stream", stream]) == 0
    result: Any = json.loads(out.read_text())
    assert (result["places"], result["stream"]) == (3, stream)
    text = capsys.readouterr().out
    for sample in result["samples"]:
        for measure in ("spearman", "pearson"):
            means = sample[measure]["mean"]
            assert list(means) == list(PREDICTORS)
            for value in means.values():
                assert -1 <= value["mean"] <= 1
            for name, above in sample[measure]["graph minus"].items():
                expected = means["graph"]["mean"] - means[name]["mean"]
                assert above["mean"] == pytest.approx(expected)
        assert f"6 {sample['name']} features, 3 places" in text
