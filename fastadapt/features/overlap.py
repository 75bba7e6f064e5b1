"""Does a feature mean the same in the model that it reads? (arXiv 2602.20904, appendix G)

An adapter is trained on the hidden states of the replacement model. For each feature, the tokens on
which its encoder answers most strongly there are held against those of the same encoder when it
reads the target's states, or the base's (the whole base model), at the same place: the MLP's input.
A feature that is active on n of N tokens in the replacement model has top sets of n tokens in each;
agreement is the share of the n that both hold. Tokens are ranked by pre-activation ``W_enc x +
b_enc``, so that a shift that stops a feature from firing does not hide that it ranks tokens alike.
It is computed in float32 at least: rounded to 16 bits, many tokens are equal at the cut. Of those
that still are (the first tokens of texts, for one), the first come first. What the first layer's
MLP reads is the same in the target as in the replacement model, and its agreement is 1.

All streams go through the layers together, a layer for all texts before the next one, so that what
is ranked is a layer's: memory is ``N x D`` for the hidden states and for the inputs of each of
three streams, and ``features_at_once x N`` thrice, whatever the number of layers and features.

N tokens, D width, F features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.features.collect.texts import Text, batch_of, batches_of, read_group
from fastadapt.features.store.schema import OVERLAP, TEXTS
from fastadapt.features.store.source_run import students_of
from fastadapt.features.store.store import Store, writing
from fastadapt.io.atomic import disk_errors, replacing
from fastadapt.io.parquet import open_parquet
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.block_inputs import record_inputs, record_module_inputs
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.self_check import check_traversal
from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.rendering import require_drawing, write_png

BINS = 20  # of the distribution
_WIDENED = 8192  # tokens whose inputs are in float32 at a time
OTHERS = ("target", "base")


@dataclass(frozen=True)
class OverlapConfig:
    """How much is compared at once.

    Args:
        tokens: the store's texts are taken in order, as many as have so many tokens together; at
            least one.
        batch_tokens: tokens of a batch, padding included; a longer text is a batch of its own.
        features_at_once: features whose pre-activations on all tokens exist at a time.
    """

    tokens: int = 100_000
    batch_tokens: int = 8192
    features_at_once: int = 64

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "features_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, got {getattr(self, name)}")


def overlap(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    config: OverlapConfig | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> pa.Table | None:
    """Measure every feature's agreement; adds ``overlap.parquet`` and ``overlap.png`` to the store.

    Args:
        run: folder of the run.
        source: of its store; the run's own if not given.
        config: how much.
        dtype: of the pair; the one that the features were collected in if not given.
        device, attention: of the pair, in place of the run's settings.
        trust_remote_code: run Python code that comes with the models.
        progress: told (layers done, layers).
        stop: ends after the layer at hand, with nothing written.

    Returns:
        The table, a row per feature that is active on some of the tokens; None if stopped.

    Raises:
        UserError: there is no store, it is of another adapter, another process writes there, or
            plots cannot be drawn.
        RunError: the store cannot be written.
    """
    require_drawing()
    config = config or OverlapConfig()
    store = Store.open(source or run)
    with writing(store.folder):
        students = students_of(
            store,
            run,
            dtype=dtype,
            device=device,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
        model = students.model
        batches = [batch_of(some) for some in _batches(store, config)]
        for batch in batches[:1]:
            check_traversal(model, batch.to(model.device))
        pieces: list[pa.Table] = []
        with students.base() as base:
            for layer, inputs, n_F in _layers(model, base, batches):
                pieces.append(_agreements(model.adapters[layer], layer, inputs, n_F, config))
                if progress is not None:
                    progress(layer + 1, model.n_layers)
                if stop is not None and stop.is_set():
                    return None
        table = pa.concat_tables(pieces)
        store.add("overlap", table)
        with disk_errors(plot_of(store)), replacing(plot_of(store)) as staged:
            write_png(figure(table), staged)
        return table


def _batches(store: Store, config: OverlapConfig) -> Iterator[list[Text]]:
    """The first texts of a store, as they were batched when they were collected."""
    tokens = 0
    with open_parquet(store.path("texts"), TEXTS) as file:
        for group in range(file.num_row_groups):
            texts: list[Text] = []
            for text in read_group(store.path("texts"), file, group):
                tokens += len(text.tokens)
                if tokens > config.tokens and (texts or group):
                    break
                texts.append(text)
            yield from batches_of(texts, config.batch_tokens)
            if tokens > config.tokens:
                return


@torch.no_grad()
def _layers(
    model: ReplacementModel, base: Any, batches: Sequence[Batch]
) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
    """Of each layer: the inputs of its MLP in each stream, ``[N, D]``; and features' counts."""
    paths, n_features = model.paths, model.n_features
    base_blocks = getattr(getattr(base, paths.decoder), paths.layers)
    streams = ("replacement", *OTHERS)
    hidden: list[dict[str, Tensor]] = [{} for _ in batches]
    for layer in range(model.n_layers):
        inputs: dict[str, list[Tensor]] = {stream: [] for stream in streams}
        counts = torch.zeros(n_features, dtype=torch.int64, device=model.device)
        for batch, states in zip(batches, hidden, strict=True):
            here = batch.to(model.device)
            real, padding = here.real, None if here.attention_mask is None else ~here.real
            # Asked for anew in each layer: to keep every batch's masks could take more than all.
            ours = model.block_inputs(here.input_ids, here.attention_mask)
            theirs = record_inputs(base, paths, here.input_ids, here.attention_mask)
            for stream in streams:
                own = theirs if stream == "base" else ours
                state, arguments = states.get(stream, own.hidden), own.arguments[layer]
                blocks = base_blocks if stream == "base" else model.blocks
                codes: list[SparseCodes] = []
                with record_module_inputs(getattr(blocks[layer], paths.mlp)) as seen:
                    if stream == "base":
                        states[stream] = blocks[layer](state, **arguments)
                    elif stream == "target":
                        states[stream], _ = model.block(layer, state, arguments, "target")
                    else:
                        states[stream], _ = model.block(
                            layer, state, arguments, "replacement", padding=padding, codes=codes
                        )
                inputs[stream].append(seen[0][real])
                for found in codes:
                    counts += torch.bincount(found.features, minlength=n_features)
        yield layer, {stream: torch.cat(parts) for stream, parts in inputs.items()}, counts


@torch.no_grad()
def _agreements(
    adapter: Any, layer: int, inputs: dict[str, Tensor], n_F: Tensor, config: OverlapConfig
) -> pa.Table:
    """Rows of :data:`~fastadapt.features.store.schema.OVERLAP` of one layer."""
    # Features of like counts together: what is looked at goes up to the largest of them.
    features = n_F.argsort(stable=True)
    features = features[n_F[features] > 0]
    found: dict[str, list[Tensor]] = {other: [] for other in OTHERS}
    for some in features.split(config.features_at_once):
        tops = {
            stream: strongest(pre_activations(adapter, some, x), n_F[some])
            for stream, x in inputs.items()
        }
        for other in OTHERS:
            both = (tops["replacement"] & tops[other]).sum(1)
            found[other].append(both.double() / n_F[some])
    order = features.argsort()
    none = torch.zeros(0, dtype=torch.float64, device=n_F.device)
    columns = {other: torch.cat([none, *parts])[order] for other, parts in found.items()}
    return pa.table(
        {
            "layer": np.full(len(features), layer, np.int32),
            "feature": features[order].cpu().numpy().astype(np.int32),
            **{other: values.cpu().numpy() for other, values in columns.items()},
        }
    ).cast(OVERLAP)


def pre_activations(adapter: Any, features: Tensor, x_ND: Tensor) -> Tensor:
    """Of some features, ``W_enc x + b_enc`` in float32 at least: ``[F, N]``."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    W_FD, b_F = adapter.W_enc[features].to(wide), adapter.b_enc[features].to(wide)
    parts = [x_ND] if x_ND.dtype == wide else x_ND.split(_WIDENED)
    return torch.cat([nn.functional.linear(x.to(wide), W_FD, b_F) for x in parts]).T


def strongest(z_FN: Tensor, n_F: Tensor) -> Tensor:
    """True at the ``n_F`` largest of each row, of equal ones the first: bool ``[F, N]``.

    Args:
        z_FN: floating.
        n_F: int64, 1 to N.
    """
    z_FN = z_FN.contiguous()
    cut = z_FN.topk(int(n_F.max()), dim=1).values.gather(1, (n_F - 1)[:, None])
    top, equal = z_FN > cut, z_FN == cut
    left_F1 = n_F[:, None] - top.sum(1, keepdim=True)
    return top | (equal & (equal.cumsum(1, dtype=torch.int32) <= left_F1))


def distribution(table: pa.Table) -> dict[str, list[float]]:
    """Share of features by agreement, in 20 bins from 0 to 1: of ``target`` and ``base``."""
    shares = {}
    for other in OTHERS:
        counts, _ = np.histogram(table[other].to_numpy(), bins=BINS, range=(0, 1))
        shares[other] = (counts / max(1, counts.sum())).tolist()
    return shares


def figure(table: pa.Table) -> Figure:
    """Both distributions."""
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    names = {"target": "reads the target", "base": "reads the base"}
    return Figure(
        "overlap",
        "Overlap with a feature's own top tokens",
        "share of the tokens that both sets hold",
        "share of features",
        [
            Series(names[other], other, middles, shares, shares, shares)
            for other, shares in distribution(table).items()
        ],
    )


def medians(table: pa.Table) -> dict[str, float]:
    """Of both agreements."""
    return {other: float(np.median(table[other].to_numpy())) for other in OTHERS}


def plot_of(store: Store) -> Path:
    """Where the plot lies."""
    return store.path("overlap").with_suffix(".png")
