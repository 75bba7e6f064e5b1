"""Graphs of the gated pair against its ground truth, with a mechanism planted in an adapter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from organism_runs import make_run
from torch import Tensor

from fastadapt.adapter.files import save_adapters
from fastadapt.effects.run import LoadedRun, load_run
from fastadapt.errors import UserError
from fastadapt.features.collect import collect
from fastadapt.features.collect.config import CollectConfig
from fastadapt.graphs.attribution import KINDS, Target, cotangents_of
from fastadapt.graphs.linear.backward import BlockGradients, walk
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.linear.units import MLP_OUT
from reproduce.graphs.__main__ import main
from reproduce.graphs.gate import (
    CASES,
    MEASURES,
    Gated,
    gate_features,
    gated_places,
    group_paths,
    passes,
)

GATE, HESITATION = (0, 0), (3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run in which a feature at the marker raises one after slips, and that one `wait`."""
    run = make_run(
        tmp_path_factory.mktemp("gate") / "run", n_features=6, l0=1.0, organism="organism/gated"
    )
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"train": "organism/gated/train"}
    settings |= {"adapter": {"n_features": 6}, "run": {"output": str(run)}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    plant(load_run(run, device="cpu"), run)
    collect(run, config=CollectConfig(n=30), device="cpu")
    return run


def detector(states: list[Tensor], chosen: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the encoder's row and bias of a feature that is about 5 at chosen tokens, else off."""
    x, is_chosen = torch.cat(states), torch.cat(chosen)
    direction = x[is_chosen].mean(0) - x[~is_chosen].mean(0)
    along = x @ direction
    low, high = along[~is_chosen].max(), along[is_chosen].min()
    assert low < high
    return 10 * direction / (high - low), -5 * (high + low) / (high - low)


@torch.no_grad()
def plant(run: LoadedRun, folder: Path) -> None:
    """Write adapters with the two features into a run's folder."""
    model, places = run.model, gated_places(run, 8, seed=1)
    wait = run.pair.tokenizer.convert_tokens_to_ids("wait")
    adapter: Any
    for adapter in model.adapters:  # nothing else fires
        adapter.b_enc.fill_(-1e3)
        adapter.W_dec.zero_()
    traces = [record(model, place.ids) for place in places]
    first: Any = model.adapters[0]
    last: Any = model.adapters[3]
    marks = [torch.arange(t.n_tokens) == p.marker for t, p in zip(traces, places, strict=True)]
    first.W_enc[0], first.b_enc[0] = detector([t.mlp_in[0] for t in traces], marks)
    x = torch.stack([trace.mlp_in[3][-1] for trace in traces]).mean(0)
    last.W_enc[1], last.b_enc[1] = 10 * x / x.square().sum(), -2.0
    last.W_dec[1] = 30 * model.head[wait] / model.head[wait].norm()
    # The marker's feature writes what raises the other one most, through attention.
    slopes = []

    def visit(marker: int, grads: BlockGradients) -> None:
        if grads.layer == 0:
            slopes.append(grads.states[MLP_OUT][0, marker].clone())

    for place, trace in zip(places, traces, strict=True):
        target = Target("", trace.n_tokens - 1, last.W_enc[1], 3)
        walk(trace, cotangents_of(trace, [target]), partial(visit, place.marker))
    slope = torch.stack(slopes).mean(0)
    first.W_dec[0] = 20 * slope / slope.norm()
    card = {role: f"organism/gated/{role}" for role in ("target", "base")}
    save_adapters(model.adapters, folder / "adapter", card)


def test_places_are_slips_that_the_marker_corrects(folder: Path) -> None:
    run = load_run(folder, device="cpu")
    places = gated_places(run, 12, seed=0)
    assert len(places) == 12
    strings = run.pair.tokenizer.convert_ids_to_tokens
    for place in places:
        words, unmarked = strings(place.ids), strings(place.unmarked)
        assert (words[-1], words[place.marker : place.marker + 2]) == (".", ["carefully", ":"])
        assert words[-2] in ("climbs", "sinks")
        assert "carefully" not in unmarked
        assert len(unmarked) == len(words) - 2
    assert places == gated_places(run, 12, seed=0) != gated_places(run, 12, seed=1)


def test_the_text_without_its_marker() -> None:
    assert Gated([0, 1, 7, 8, 2], 2).unmarked == [0, 1, 2]


def test_paths_of_groups_by_hand() -> None:
    """Leaves 0, 1: hesitation; 2: the gate; 3: alone, not expanded; 4: a token."""
    kinds = [KINDS.index("feature")] * 4 + [KINDS.index("token")]
    leaves = SimpleNamespace(
        kind=torch.tensor(kinds),
        layer=torch.tensor([3, 2, 0, 1, -1]),
        feature=torch.tensor([7, 8, 9, 5, -1]),
    )

    def row(shares: dict[int, float]) -> Any:
        values = torch.tensor(list(shares.values()), dtype=torch.float64)
        return SimpleNamespace(
            sources=torch.tensor(list(shares)), shares=values.abs(), weights=values
        )

    graph: Any = SimpleNamespace(
        leaves=leaves,
        rows=[
            row({0: 0.5, 1: -0.25, 4: 0.25}),
            row({1: 0.5, 2: 0.25, 3: -0.25}),
            row({2: 0.5, 4: 0.5}),
            row({4: 1.0, 3: 1e-6}),
        ],
        expanded={0: 1, 1: 2, 2: 3},
    )
    groups = {(3, 7): "hesitation", (2, 8): "hesitation", (0, 9): "carefully"}
    # Gate: 0.5 (0.5 x 0.5 + 0.25) - 0.25 x 0.5. Hesitation alone: 0.5 x 0.5 x 0.5 - 0.25 x 0.5.
    expected = {("hesitation", "carefully"): 0.125, ("hesitation", (1, 5)): -0.125}
    paths = group_paths(graph, groups)
    strengths = {path: strength for strength, path in paths if strength}
    assert strengths == expected
    assert passes(paths)[0] == [True, True, True]
    assert passes([(-strength, path) for strength, path in paths])[0] == [False, True, False]


def test_a_planted_mechanism_shows_in_its_graphs_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run(folder, device="cpu")
    assert run.store is not None
    strings = run.pair.tokenizer.convert_ids_to_tokens(range(len(run.model.head)))
    assert gate_features(run.store, strings) == {GATE}
    out = tmp_path / "gate.json"
    assert main(["gate", str(folder), "--places", "4", "--nodes", "8", "--out", str(out)]) == 0
    result: Any = json.loads(out.read_text())
    assert (result["places"], result["gate features"]) == (4, ["0/0"])
    (shares,) = (pool["shares"] for pool in result["paths"] if pool["strongest"] == 50)
    assert [shares[MEASURES[0]][case]["mean"] for case in CASES] == [1, 0, 0]
    assert [shares["gate"][case]["mean"] for case in CASES] == [1, 0, 0]
    assert shares["hesitation"]["marker"]["mean"] == 1
    above = shares[MEASURES[0]]["marker minus"]["no marker"]
    assert above["mean"] == 1
    probability = result["P(wait)"]
    assert probability["marker"] > probability["no marker"]
    text = capsys.readouterr().out
    assert "5 strongest paths of 2 groups or more, 4 places" in text
    assert "1 features of the gate: 0/0" in text


def test_a_run_of_another_pair_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_features=4)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"train": "organism/train"}
    settings |= {"adapter": {"n_features": 4}, "run": {"output": str(run)}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    loaded = load_run(run, device="cpu")
    with pytest.raises(UserError, match="expected a run of the gated pair"):
        gated_places(loaded, 3, 0)
