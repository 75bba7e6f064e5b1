"""Compare two runs feature by feature, such as those of two stages of a fine-tuning.

Feature i of a layer in the one run is compared with feature i of that layer in the other. That has
a meaning if the other run began with the weights of the first (``run.init_from``); in runs with new
weights, equal numbers are a coincidence. Both runs' features are collected over the same texts, so
that a feature that stayed what it is has its strongest activations at the same tokens.

The *contribution* of a feature is the mean norm that it adds to the residual stream per token:
density times mean activation times the norm of its row of ``W_dec``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastadapt.adapter.files import adapter_digest, adapters_of, read_transcoders
from fastadapt.errors import UserError
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import writing_folder
from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.formatting import number, percent
from fastadapt.reporting.rendering import write_png
from fastadapt.reporting.tables import Table, as_markdown
from fastadapt.reporting.visible import token_text, visible

#: A row per feature that is active in either run.
COMPARISON = pa.schema(
    [
        pa.field("layer", pa.int32(), False),
        pa.field("feature", pa.int32(), False),
        pa.field("density", pa.float64(), False),  # share of the tokens at which it is active
        pa.field("other_density", pa.float64(), False),
        pa.field("contribution", pa.float64(), False),
        pa.field("other_contribution", pa.float64(), False),
        pa.field("encoder_cosine", pa.float64(), False),  # of its rows of W_enc in both runs
        pa.field("decoder_cosine", pa.float64(), False),
        pa.field("same_examples", pa.float64(), False),  # of the strongest, share at equal tokens
    ]
)
#: Names of the files of :func:`write`.
ROWS, TABLES, PLOT = "comparison.parquet", "tables.md", "comparison.png"
#: Median of ``same_examples`` below which equal numbers are taken for a coincidence.
RELATED = 0.1
_N_TOKENS = 5  # promoted tokens in a table
_BINS = 40  # of the distribution of cosines


@dataclass(frozen=True)
class FeatureComparison:
    """The features of two runs, by their numbers.

    Attributes:
        run, other: the collected features of each.
        rows: a row of :data:`COMPARISON` per feature that is active in either run.
        n_layers, n_features: layers, and features per layer.
    """

    run: Store
    other: Store
    rows: pa.Table
    n_layers: int
    n_features: int

    @property
    def related(self) -> bool:
        """Whether most features of equal numbers are strongest at some tokens in common."""
        both = _active(self.rows, "density") & _active(self.rows, "other_density")
        shares = self.rows["same_examples"].to_numpy()[both]
        return len(shares) > 0 and float(np.median(shares)) >= RELATED


def compare(run: str | os.PathLike[str], other: str | os.PathLike[str]) -> FeatureComparison:
    """Compare the features of two runs by their numbers.

    Reads the weights of one layer of each run at a time, and no model.

    Args:
        run: folder of a run with collected features, such as that of an earlier stage.
        other: the same of a later stage.

    Raises:
        UserError: no collected features, features of other adapters, other texts, another base, or
            other numbers of layers or features.
    """
    stores = [Store.open(source) for source in (run, other)]
    shape, theirs = (store.shape("adapter") for store in stores)
    if shape != theirs:
        raise UserError(
            f"{other} has {theirs[0]} layers of {theirs[1]:,} features, {run} has {shape[0]} of "
            f"{shape[1]:,}; expected equal numbers"
        )
    _check_texts(run, other, stores)
    weights = [_weights(source, store) for source, store in zip((run, other), stores, strict=True)]
    bases = [(card["metadata"].get("weights") or {}).get("base") for _, card in weights]
    if None not in bases and bases[0] != bases[1]:
        raise UserError(
            f"{other} was trained beside another base than {run}; a feature means the same in two "
            "runs only beside the same base"
        )
    columns = ["count", "density", "mean", "norm"]
    collected = [store.read("features", columns=columns) for store in stores]
    same = _same_examples(stores, *shape)
    pieces = []
    for layer, readers in enumerate(zip(*(layers for layers, _ in weights), strict=True)):
        ours, new = (read() for read in readers)
        cosines = [_cosines(getattr(ours, name), getattr(new, name)) for name in ("W_enc", "W_dec")]
        rows = [table.slice(layer * shape[1], shape[1]) for table in collected]
        pieces.append(_rows(layer, rows, [*cosines, same[layer]]))
    return FeatureComparison(stores[0], stores[1], pa.concat_tables(pieces), *shape)


def _check_texts(run: Any, other: Any, stores: list[Store]) -> None:
    data = [store.manifest["data"] for store in stores]
    # A digest is over all tokens. Stores of earlier versions have none: their counts are compared.
    keys = ["digest"] if all(each.get("digest") for each in data) else ["texts", "tokens"]
    if any(data[0].get(key) != data[1].get(key) for key in keys):
        raise UserError(
            f"the features of {run} and of {other} were collected over different texts; collect "
            "both over the same (fastadapt features collect --data ... --n ...)"
        )


def _weights(source: str | os.PathLike[str], store: Store) -> tuple[list[Any], dict[str, Any]]:
    folder = adapters_of(source)
    layers, card = read_transcoders(folder, "a comparison of features")
    if adapter_digest(folder) != store.manifest["adapter"]:
        raise UserError(
            f"{store.folder}: these features were collected from other adapters than {source} has "
            "now; collect the features again (fastadapt features collect --overwrite)"
        )
    return list(layers), card


@torch.no_grad()
def _cosines(ours: Tensor, theirs: Tensor) -> np.ndarray:
    """Return the cosine of each row with the same row of the other matrix; 0 of a zero row."""
    cosines = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), eps=1e-300)
    return cosines.numpy()


def _same_examples(stores: list[Store], n_layers: int, n_features: int) -> np.ndarray:
    """Return the share of strongest activations at the same tokens, ``[L, F]``; 0 of none."""
    columns = ["layer", "feature", "sample", "rank", "text", "position"]
    tables = [store.read("examples", columns=columns) for store in stores]
    tables = [table.filter(pc.equal(table["sample"], "top")) for table in tables]
    # Stores may hold different numbers of strongest activations: those of the fewer count.
    largest = min((pc.max(table["rank"]).as_py() or 0 for table in tables), default=0)
    tables = [table.filter(pc.less_equal(table["rank"], largest)) for table in tables]
    n_texts = stores[0].manifest["data"]["texts"]
    length = 1 + max((pc.max(t["position"]).as_py() or 0 for t in tables), default=0)
    keys, counts = [], []
    for table in tables:
        unit, text, position = (
            table["layer"].to_numpy().astype(np.int64) * n_features + table["feature"].to_numpy(),
            table["text"].to_numpy(),
            table["position"].to_numpy(),
        )
        keys.append((unit * n_texts + text) * length + position)
        counts.append(np.bincount(unit, minlength=n_layers * n_features))
    both = np.intersect1d(keys[0], keys[1], assume_unique=True) // (n_texts * length)
    shared = np.bincount(both, minlength=n_layers * n_features)
    shares = shared / np.maximum(np.minimum(*counts), 1)
    return shares.reshape(n_layers, n_features)


def _rows(layer: int, collected: list[pa.Table], measured: list[np.ndarray]) -> pa.Table:
    columns = [{name: t[name].to_numpy() for name in t.column_names} for t in collected]
    contributions = [c["density"] * c["mean"].astype(np.float64) * c["norm"] for c in columns]
    (active,) = np.nonzero(columns[0]["count"] + columns[1]["count"])
    return pa.table(
        {
            "layer": np.full(len(active), layer, np.int32),
            "feature": active.astype(np.int32),
            "density": columns[0]["density"][active],
            "other_density": columns[1]["density"][active],
            "contribution": contributions[0][active],
            "other_contribution": contributions[1][active],
            "encoder_cosine": measured[0][active],
            "decoder_cosine": measured[1][active],
            "same_examples": measured[2][active],
        },
        schema=COMPARISON,
    )


def _active(rows: pa.Table, column: str) -> np.ndarray:
    return np.asarray(rows[column].to_numpy() > 0)


def layers_table(compared: FeatureComparison) -> Table:
    """Return how many features are active in both runs or in one, by layer, and their cosines."""
    rows = compared.rows
    lines = [_line("all", rows, compared.n_layers * compared.n_features)]
    for layer in range(compared.n_layers):
        part = rows.filter(pc.equal(rows["layer"], layer))
        lines.append(_line(str(layer), part, compared.n_features))
    head = ["layer", "active in both", "only before", "only after", "in neither"]
    return Table(
        "Features by layer",
        [*head, "same examples", "cosine of encoders", "of decoders"],
        lines,
        "Same examples: share of a feature's strongest activations that are at the same tokens in "
        "both runs. It and the cosines are medians over the features that are active in both. "
        + "; ".join(f"{role}: {name}" for role, name in _names(compared).items())
        + ".",
    )


def _names(compared: FeatureComparison) -> dict[str, str]:
    """Return the run of either side, and the digest of its adapters, for tables and files."""
    sides = {"before": compared.run, "after": compared.other}
    folders = {
        role: store.folder.parent if store.folder.name == "features" else store.folder
        for role, store in sides.items()
    }
    return {
        role: f"{visible(str(folders[role]))} ({visible(store.manifest['adapter'][:12])})"
        for role, store in sides.items()
    }


def _line(name: str, rows: pa.Table, total: int) -> list[str]:
    before, after = _active(rows, "density"), _active(rows, "other_density")
    both = before & after
    same = rows["same_examples"].to_numpy()[both]
    cosines = [rows[f"{part}_cosine"].to_numpy()[both] for part in ("encoder", "decoder")]
    counts = (both.sum(), (before & ~after).sum(), (after & ~before).sum(), total - rows.num_rows)
    medians = (f"{np.median(c):.2f}" if len(c) else "–" for c in cosines)
    shared = percent(float(np.median(same))) if len(same) else "–"
    return [name, *(f"{count:,}" for count in counts), shared, *medians]


def changes_table(compared: FeatureComparison, n: int = 20) -> Table:
    """Return the ``n`` features whose contribution has changed most, largest change first.

    The tokens are those that a feature promotes: after, or before if it is active no longer.
    """
    rows = compared.rows
    change = np.abs(rows["other_contribution"].to_numpy() - rows["contribution"].to_numpy())
    largest = rows.take(pa.array(np.argsort(-change, kind="stable")[:n]))
    lines = []
    for row in largest.to_pylist():
        is_lost = row["other_density"] == 0
        store = compared.run if is_lost else compared.other
        lens = store.read("lens", layer=row["layer"], features=[row["feature"]])
        tokens = lens["promoted_tokens"][0].as_py()[:_N_TOKENS]
        lines.append(
            [
                f"{row['layer']}/{row['feature']}",
                f"{number(row['contribution'])} → {number(row['other_contribution'])}",
                f"{percent(row['density'])} → {percent(row['other_density'])}",
                percent(row["same_examples"]),
                f"{row['encoder_cosine']:.2f}",
                f"{row['decoder_cosine']:.2f}",
                _quoted(tokens),
            ]
        )
    cosines = ["cosine of encoders", "of decoders"]
    head = ["feature", "contribution", "active on", "same examples", *cosines, "promotes"]
    return Table(
        "Largest changes",
        head,
        lines,
        "Contribution: density times mean activation times the norm of the feature's row of W_dec. "
        "Tokens are those promoted after; before, of a feature that is active no longer.",
    )


def _quoted(tokens: Iterable[str]) -> str:
    return " ".join(map(token_text, tokens))


def figure(compared: FeatureComparison) -> Figure:
    """Return the distribution of the cosines of the features that are active in both runs."""
    rows = compared.rows
    both = _active(rows, "density") & _active(rows, "other_density")
    edges = np.linspace(-1, 1, _BINS + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    series = []
    for part, kind in (("encoder", "transcoder"), ("decoder", "norms")):
        counts, _ = np.histogram(rows[f"{part}_cosine"].to_numpy()[both].clip(-1, 1), edges)
        if counts.sum():
            shares = (counts / counts.sum()).tolist()
            series.append(Series(f"rows of the {part}", kind, middles, shares))
    return Figure(
        "comparison",
        "How far features moved",
        "cosine of a feature's rows before and after",
        "share of features",
        series,
        empty="no feature is active in both runs",
    )


def write(compared: FeatureComparison, folder: Path, n: int = 20) -> None:
    """Write ``comparison.parquet``, ``tables.md`` and ``comparison.png`` into a folder.

    Raises:
        RunError: the folder cannot be written.
        UserError: plots cannot be drawn.
    """
    tables = [layers_table(compared), changes_table(compared, n)]
    with writing_folder(folder, last=ROWS, ours=(ROWS, TABLES, PLOT)) as staged:
        (staged / TABLES).write_text(as_markdown(tables), encoding="utf-8")
        write_png(figure(compared), staged / PLOT)
        pq.write_table(compared.rows.replace_schema_metadata(_names(compared)), staged / ROWS)
