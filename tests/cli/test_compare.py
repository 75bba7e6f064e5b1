"""`fastadapt features compare`: its output, its files and its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from organism_runs import make_run

from fastadapt import load_adapters, save_adapters
from fastadapt.features.collect import CollectConfig, collect
from fastadapt.features.comparison import PLOT, ROWS, TABLES, compare

DOUBLED = 2  # a feature of the last layer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run, of one with a feature doubled, and of one with other new weights."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("before", 0), ("after", 0), ("unrelated", 1)):
        run = make_run(folder / name, n_features=12, l0=1.0, seed=seed)
        adapters, metadata = load_adapters(run / "adapter")
        with torch.no_grad():
            last: Any = adapters[3]
            last.W_dec[DOUBLED] *= 2 if name == "after" else 1
        save_adapters(adapters, run / "adapter", metadata)
        collect(run, None, CollectConfig(n=20))
    return folder


def test_tables_and_files(runs: Path, fastadapt: Callable) -> None:
    before, after = runs / "before", runs / "after"
    outcome = fastadapt("features", "compare", before, after, "--n", 2)
    assert outcome.code == 0, outcome.err
    listed = outcome.out.partition("Largest changes")[2].splitlines()
    assert listed[3].startswith(f"3/{DOUBLED} ")
    assert "init_from" not in outcome.out
    folder = after / "comparison"
    assert {path.name for path in folder.iterdir()} == {ROWS, TABLES, PLOT}
    rows = pq.read_table(folder / ROWS)
    assert rows.equals(compare(before, after).rows)
    names = {k.decode(): v.decode() for k, v in rows.schema.metadata.items()}
    assert names["before"].startswith(f"{before} (")
    assert names["after"].startswith(f"{after} (")
    assert f"before: {names['before']}; after: {names['after']}." in (folder / TABLES).read_text()
    assert (folder / PLOT).read_bytes()[1:4] == b"PNG"
    assert "## Largest changes" in (folder / TABLES).read_text()
    for name in (ROWS, TABLES, PLOT):
        assert str((folder / name).resolve()) in outcome.out


def test_other_files_in_the_folder_stay(runs: Path, fastadapt: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    runs_compared = runs / "before", runs / "after"
    outcome = fastadapt("features", "compare", *runs_compared, "--output", tmp_path)
    assert outcome.code == 0, outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {ROWS, TABLES, PLOT, "mine.txt"}


def test_unrelated_runs_and_a_bad_number(runs: Path, fastadapt: Callable, tmp_path: Path) -> None:
    unrelated = fastadapt(
        "features", "compare", runs / "before", runs / "unrelated", "--output", tmp_path / "out"
    )
    assert unrelated.code == 0, unrelated.err
    assert "was OTHER trained with --run.init_from RUN?" in " ".join(unrelated.out.split())
    refused = fastadapt("features", "compare", runs / "before", runs / "after", "--n", 0)
    assert refused.code == 2
    assert "--n: expected 1 or more, got 0" in refused.err
