"""Overlap, compared with sorted pre-activations from complete forwards of each model."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from organism_runs import make_run

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.errors import UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.overlap import (
    OverlapConfig,
    distribution,
    figure,
    medians,
    overlap,
    plot_of,
    pre_activations,
    strongest,
)
from fastadapt.features.store.source_run import students_of
from fastadapt.features.store.store import Store, writing
from fastadapt.reporting.rendering import write_png


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", n_features=12, l0=1.0)
    collect(folder, None, CollectConfig(n=30))
    return folder


def states(run: Path, ids: list[list[int]]) -> dict[str, list[np.ndarray]]:
    """Return pre-activations ``[N, F]`` of every layer's encoder in each model, text by text."""
    models = ModelSet.open([run], device="cpu")
    model = models.replacement(models.runs[0])
    adapters: Any = model.adapters
    actual: dict[str, list[np.ndarray]] = {}
    with models.base() as base:
        for name, whole in (("replacement", model.model), ("target", model.model), ("base", base)):
            seen: list[torch.Tensor] = []
            handles = [
                layer.mlp.register_forward_pre_hook(
                    lambda _, given, seen=seen: seen.append(given[0])
                )
                for layer in whole.model.layers
            ]
            mode = "target" if name == "target" else "replacement"
            with torch.no_grad(), model.mode(mode):  # type: ignore[arg-type]
                for text in ids:
                    whole(torch.tensor([text]))
            for handle in handles:
                handle.remove()
            actual[name] = [
                torch.cat([x[0] @ a.W_enc.T + a.b_enc for x in seen[layer :: model.n_layers]])
                .detach()
                .numpy()
                for layer, a in enumerate(adapters)
            ]
    return actual


@pytest.mark.slow
def test_agreements_equal_those_of_sorting(run: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = OverlapConfig(batch_tokens=500, features_at_once=5)
    table = overlap(run, config=config, progress=lambda *counts: calls.append(counts))
    assert table is not None
    assert calls == [(i + 1, 4) for i in range(4)]
    store = Store.open(run)
    assert store.read("overlap").equals(table)
    assert plot_of(store).read_bytes()[1:4] == b"PNG"
    z = states(run, store.read("texts")["tokens"].to_pylist())
    rows = {(row["layer"], row["feature"]): row for row in table.to_pylist()}
    counts = store.read("features", columns=["count"])["count"].to_pylist()
    checked = 0
    for layer in range(4):
        for feature in range(12):
            n = counts[layer * 12 + feature]
            assert ((layer, feature) in rows) == (n > 0)
            if n == 0:
                continue
            columns = {name: values[layer][:, feature] for name, values in z.items()}
            tops = {name: set(np.argsort(-c)[:n].tolist()) for name, c in columns.items()}
            for other in ("target", "base"):
                expected = len(tops["replacement"] & tops[other]) / n
                # Other batches: rounding may swap two tokens at the cut.
                assert abs(rows[layer, feature][other] - expected) <= 1 / n
                checked += 1
    assert checked > 40
    first = [row["target"] for (layer, _), row in rows.items() if layer == 0]
    assert set(first) == {1.0}  # both models have the same input of the first block
    assert medians(table)["base"] < medians(table)["target"] <= 1


def test_the_store_is_locked_until_the_plot_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, checks = Store.open(run).folder, []

    def check_locked(*_: object) -> None:
        with pytest.raises(UserError, match="another process is writing"), writing(folder):
            pass
        checks.append(True)

    def draw(*arguments: Any) -> None:
        check_locked()
        write_png(*arguments)

    monkeypatch.setattr("fastadapt.features.overlap.write_png", draw)
    assert overlap(run, config=OverlapConfig(tokens=1), progress=check_locked) is not None
    assert len(checks) == 4 + 1  # in each layer, and at the plot
    with writing(folder), pytest.raises(UserError, match="another process is writing"):
        overlap(run, config=OverlapConfig(tokens=1), progress=pytest.fail)  # type: ignore[arg-type]


@pytest.mark.slow
def test_models_have_the_dtype_of_the_collection(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("features")))
    store = collect(copy, None, CollectConfig(n=30), dtype="bfloat16")
    assert store is not None
    assert students_of(store).config.dtype == "bfloat16"
    assert students_of(store, run).config.dtype == "bfloat16"
    assert students_of(store, dtype="float32").config.dtype == "float32"
    fires = store.read("features").filter(pc.field("count") > 0)
    table = overlap(copy)
    assert table is not None
    assert table.select(["layer", "feature"]).equals(fires.select(["layer", "feature"]))
    wider = overlap(copy, dtype="float32")
    assert wider is not None
    assert not wider["base"].equals(table["base"])
    del store.manifest["pair"]["dtype"]  # a store without a recorded dtype
    assert students_of(store).config.dtype == "float32"


def test_a_part_of_the_tokens_and_a_stop(run: Path) -> None:
    assert overlap(run, config=OverlapConfig(tokens=1)) is not None  # one complete text
    stop = Event()
    stop.set()
    before = Store.open(run).path("overlap").read_bytes()
    assert overlap(run, stop=stop) is None
    assert Store.open(run).path("overlap").read_bytes() == before


@pytest.mark.parametrize("ties", [False, True])
def test_strongest_is_a_stable_sort(ties: bool) -> None:
    z = torch.randn(9, 40)
    z = z.round() if ties else z
    n = torch.tensor([1, 2, 3, 39, 40, 7, 7, 20, 11])
    top = strongest(z, n)
    for row, (values, k) in enumerate(zip(z, n.tolist(), strict=True)):
        expected = values.argsort(descending=True, stable=True)[:k]
        assert set(top[row].nonzero().flatten().tolist()) == set(expected.tolist())


def one_by_one(z_FN: torch.Tensor, n_F: torch.Tensor) -> torch.Tensor:
    """Return the top tokens, one feature at a time."""
    top = torch.zeros_like(z_FN, dtype=torch.bool)
    for row, (values, n) in enumerate(zip(z_FN, n_F.tolist(), strict=True)):
        top[row, values.argsort(descending=True, stable=True)[:n]] = True
    return top


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_result_equals_a_loop_over_features(
    run: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    actual = overlap(run, dtype=dtype)
    assert actual is not None
    monkeypatch.setattr("fastadapt.features.overlap.strongest", one_by_one)
    assert actual.equals(overlap(run, dtype=dtype))
    first = actual.filter(pc.equal(actual["layer"], 0))
    assert set(first["target"].to_pylist()) == {1.0}


def test_pre_activations_of_16_bit_adapters_are_not_rounded_to_16_bits() -> None:
    draw = torch.Generator().manual_seed(0)
    adapter = TranscoderAdapter(32, AdapterConfig(50), generator=draw)
    x, rows = torch.randn(20_000, 32, generator=draw), torch.arange(10, 30)
    expected = torch.nn.functional.linear(x, adapter.W_enc[rows], adapter.b_enc[rows]).T
    assert pre_activations(adapter, rows, x).equal(expected)

    def equal_at_the_cut(z_FN: torch.Tensor) -> int:
        ordered = z_FN.sort(dim=1, descending=True).values
        return int((ordered[:, 499] == ordered[:, 500]).sum())

    adapter, x = adapter.bfloat16(), x.bfloat16()
    z = pre_activations(adapter, rows, x)
    exact = x.double() @ adapter.W_enc[rows].double().T + adapter.b_enc[rows].double()
    torch.testing.assert_close(z.double(), exact.T, rtol=0, atol=1e-6)
    assert equal_at_the_cut(z.bfloat16()) > 10
    assert equal_at_the_cut(z) == 0


def test_distribution_is_of_all_features() -> None:
    columns = {
        "layer": [0, 0, 1],
        "feature": [0, 1, 0],
        "target": [1.0, 1.0, 0.5],
        "base": [0.0] * 3,
    }
    shares = distribution(pa.table(columns))
    assert shares["target"][-1] == pytest.approx(2 / 3)
    assert shares["target"][10] == pytest.approx(1 / 3)
    assert shares["base"][0] == 1
    assert [series.name for series in figure(pa.table(columns)).series] == [
        "reads the target",
        "reads the base",
    ]


def test_bad_settings_and_foreign_stores_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokens: expected 1 or more, got 0"):
        OverlapConfig(tokens=0)
    other = make_run(tmp_path / "other", n_features=12, seed=1)
    with pytest.raises(UserError, match="has no features yet"):
        overlap(other)
    shutil.copytree(run / "features", other / "features")
    with pytest.raises(UserError, match="were collected from other adapters"):
        overlap(other)
