"""Features of two runs, compared by their numbers, against planted changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from organism_runs import dense_activations, make_run

from fastadapt import load_adapters, save_adapters
from fastadapt.errors import UserError
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.comparison import (
    COMPARISON,
    changes_table,
    compare,
    layers_table,
)
from fastadapt.io.documents import read_json
from fastadapt.io.tensors import read_tensors

LAST = 3  # a layer whose features change no other layer
DOUBLED, TURNED, LOST, NEW = 2, 5, 7, 9


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "before", n_features=12, l0=1.0)
    _change(folder, folder, lambda last: last.b_enc[NEW].fill_(-1e3))
    collect(folder, None, CollectConfig(n=30))
    return folder


def _change(run: Path, out: Path, change: Callable[[Any], object]) -> Path:
    """Write a copy of a run, without its features, whose last adapter is changed."""
    if out != run:
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("features"))
    adapters, metadata = load_adapters(run / "adapter")
    with torch.no_grad():
        change(adapters[LAST])
    save_adapters(adapters, out / "adapter", metadata)
    return out


@pytest.fixture(scope="module")
def after(before: Path) -> Path:
    def change(last: Any) -> None:
        last.W_dec[DOUBLED] *= 2
        last.W_dec[TURNED].neg_()
        last.b_enc[LOST] = -1e3
        last.b_enc[NEW] = last.b_enc[LOST + 1]

    folder = _change(before, before.with_name("after"), change)
    collect(folder, None, CollectConfig(n=30))
    return folder


def test_planted_changes(before: Path, after: Path) -> None:
    compared = compare(before, after)
    assert compared.related
    assert compared.rows.schema == COMPARISON
    rows = {(row["layer"], row["feature"]): row for row in compared.rows.to_pylist()}
    for (layer, feature), row in rows.items():
        turned = (layer, feature) == (LAST, TURNED)
        assert row["encoder_cosine"] == pytest.approx(1)
        assert row["decoder_cosine"] == pytest.approx(-1 if turned else 1)
        if layer < LAST or feature not in (DOUBLED, LOST, NEW):
            assert row["other_density"] == row["density"]
            assert row["other_contribution"] == row["contribution"]
            assert row["same_examples"] == 1
    doubled, lost, new = (rows[LAST, feature] for feature in (DOUBLED, LOST, NEW))
    assert doubled["other_density"] == doubled["density"]
    assert doubled["other_contribution"] == pytest.approx(2 * doubled["contribution"], rel=1e-6)
    assert (lost["other_density"], lost["other_contribution"]) == (0, 0) < (lost["density"],)
    assert (new["density"], new["contribution"]) == (0, 0)
    assert new["other_density"] > 0


def test_contributions_are_those_of_dense_activations(before: Path, after: Path) -> None:
    """The contribution is the mean norm over tokens of what a feature adds."""
    compared = compare(before, after)
    for run, column in ((before, "contribution"), (after, "other_contribution")):
        norms = np.stack(
            [
                read_tensors(run / "adapter" / f"layer_{layer}.safetensors")["W_dec"].norm(dim=1)
                for layer in range(LAST + 1)
            ]
        )
        texts = dense_activations(run, run / "features", CollectConfig().batch_tokens)
        a_LNF = np.concatenate([a for _, a in texts], axis=1).astype(np.float64)
        expected = a_LNF.mean(1) * norms
        rows = compared.rows
        where = rows["layer"].to_numpy(), rows["feature"].to_numpy()
        np.testing.assert_allclose(rows[column].to_numpy(), expected[where], rtol=1e-5, atol=1e-9)


def test_the_tables(before: Path, after: Path) -> None:
    compared = compare(before, after)
    whole, *layers = layers_table(compared).rows
    counts = np.array([[int(cell) for cell in row[1:5]] for row in (whole, *layers)])
    assert (counts[0] == counts[1:].sum(0)).all()
    assert (counts[1:].sum(1) == 12).all()
    assert counts[LAST + 1].tolist()[1:3] == [1, 1]
    assert layers[0][5:] == ["100.0%", "1.00", "1.00"]
    changes = changes_table(compared, 3)
    assert len(changes.rows) == 3
    assert {row[0] for row in changes.rows} == {f"{LAST}/{f}" for f in (DOUBLED, LOST, NEW)}
    for row in changes.rows:
        store = compared.run if row[0] == f"{LAST}/{LOST}" else compared.other
        lens = store.read("lens", layer=LAST, features=[int(row[0].partition("/")[2])])
        assert row[-1].split()[0].strip("␣") == lens["promoted_tokens"][0].as_py()[0].strip()


def _tops(run: Path) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Return the tokens, as (text, position), of each feature's strongest activations."""
    tops: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for row in pq.read_table(run / "features" / "adapter" / "examples.parquet").to_pylist():
        if row["sample"] == "top":
            token = row["text"], row["position"]
            tops.setdefault((row["layer"], row["feature"]), set()).add(token)
    return tops


def test_a_run_with_new_weights_is_called_unrelated(before: Path) -> None:
    other = make_run(before.with_name("unrelated"), n_features=12, l0=1.0, seed=1)
    collect(other, None, CollectConfig(n=30))
    compared = compare(before, other)
    assert not compared.related
    tops = [_tops(before), _tops(other)]
    shared = 0
    for row in compared.rows.to_pylist():
        ours, theirs = (top.get((row["layer"], row["feature"]), set()) for top in tops)
        assert row["same_examples"] == len(ours & theirs) / max(1, min(len(ours), len(theirs)))
        shared += len(ours & theirs)
    assert shared  # of many features, some share a token by chance


def test_stores_with_other_numbers_of_examples_and_another_family(
    before: Path, after: Path, tmp_path: Path
) -> None:
    """Equal tokens are equal texts, and the fewer examples of the two stores are compared."""
    runs = [before, before.with_name("unrelated")]
    for top in (3, 1000):
        for number, run in enumerate(runs):
            copy = tmp_path / f"{number}-{top}"
            shutil.copytree(run, copy, ignore=shutil.ignore_patterns("features"))
            collect(copy, None, CollectConfig(n=30, top=top))
    fewer, more = (compare(tmp_path / "0-3", tmp_path / f"1-{top}") for top in (3, 1000))
    expected = fewer.rows["same_examples"].to_pylist()
    assert more.rows["same_examples"].to_pylist() == expected
    assert not more.related
    named = Path(shutil.copytree(after, tmp_path / "named"))
    manifest = read_json(named / "features" / "manifest.json")
    manifest["data"]["family"] = {"template": "the same, written by its owner"}
    (named / "features" / "manifest.json").write_text(json.dumps(manifest))
    assert compare(before, named).rows.equals(compare(before, after).rows)


def test_runs_without_a_common_feature_are_unrelated(before: Path, tmp_path: Path) -> None:
    for name, parity in (("even", 0), ("odd", 1)):
        run = tmp_path / name
        shutil.copytree(before, run, ignore=shutil.ignore_patterns("features"))
        halved, metadata = load_adapters(before / "adapter")
        with torch.no_grad():
            adapter: Any
            for adapter in halved:
                adapter.b_enc[parity::2] = -1e3
        save_adapters(halved, run / "adapter", metadata)
        collect(run, None, CollectConfig(n=30))
    compared = compare(tmp_path / "even", tmp_path / "odd")
    assert layers_table(compared).rows[0][1] == "0"
    assert not compared.related


def test_what_cannot_be_compared(before: Path, after: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no features yet"):
        compare(before, _change(before, tmp_path / "bare", lambda _: None))
    short = _change(before, tmp_path / "short", lambda _: None)
    collect(short, None, CollectConfig(n=20))
    with pytest.raises(UserError, match="were collected over different texts"):
        compare(before, short)
    wide = make_run(tmp_path / "wide", n_features=16, l0=1.0)
    collect(wide, None, CollectConfig(n=30))
    with pytest.raises(UserError, match=r"4 layers of 16 features, .* 4 of 12; expected"):
        compare(before, wide)
    for run, digest in ((before, "a" * 64), (after, "b" * 64)):
        adapters, metadata = load_adapters(run / "adapter")
        copy = Path(shutil.copytree(run, tmp_path / run.name))
        save_adapters(adapters, copy / "adapter", {**metadata, "weights": {"base": digest}})
        assert read_json(copy / "adapter" / "fastadapt.json")["metadata"]["weights"]
    with pytest.raises(UserError, match="trained beside another base than"):
        compare(tmp_path / "before", tmp_path / "after")
