"""Agreement of a feature's top tokens between models (arXiv 2602.20904, appendix G).

An adapter is trained on the hidden states of the replacement model. For each feature, the tokens
that its encoder ranks highest in the replacement model are compared with those that the same
encoder ranks highest on the MLP inputs of the target, or of the whole base model. A feature that is
active on n of N tokens in the replacement model has a top set of n tokens in each model; agreement
is the share of the n tokens that are in both sets. Tokens rank by pre-activation ``W_enc x +
b_enc``, so a shift that stops a feature from firing does not hide that it ranks tokens alike.
Pre-activations are float32 or wider: in 16 bits many tokens tie at the cut. Remaining ties (such as
the first tokens of texts) go to the earlier token. The first layer's MLP has the same input in the
target and the replacement model, and its agreement with the target is 1.

All texts pass a layer before the next one, in all streams. Memory is ``N x D`` for the hidden
states and for the inputs of each of three streams, and three times ``features_at_once x N``,
whatever the number of layers and features.

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
from fastadapt.models.block_inputs import record_inputs, record_module_inputs
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.self_check import check_traversal
from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.rendering import write_png

BINS = 20  # of the distribution
_WIDENED = 8192  # tokens whose inputs are float32 at once
OTHERS = ("target", "base")


@dataclass(frozen=True)
class OverlapConfig:
    """Number of tokens to compare, and limits of memory.

    Args:
        tokens: the store's first texts are compared, up to this number of tokens; at least one.
        batch_tokens: tokens of a batch, padding included; a longer text is a batch of its own.
        features_at_once: features whose pre-activations on all tokens are in memory at once.
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
    """Measure every feature's agreement; add ``overlap.parquet`` and ``overlap.png`` to the store.

    Args:
        run: folder of the run.
        source: folder of the store; the run's own if not given.
        config: number of tokens, and limits of memory.
        dtype: dtype of the pair; by default the dtype that the features were collected in.
        device, attention: override the run's settings of the pair.
        trust_remote_code: run Python code that comes with the models.
        progress: called with (layers done, layers).
        stop: when set, returns after the current layer and writes nothing.

    Returns:
        The table, a row per feature that is active on any of the tokens; None if stopped.

    Raises:
        UserError: the store does not exist or was collected from other adapters, another process
            writes to it, or plots cannot be drawn.
        RunError: the store cannot be written.
    """
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
        batches = [batch_of(texts) for texts in _batches(store, config)]
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
    """Yield the first texts of a store, batched as they were collected."""
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
    """Yield each layer, its MLP inputs ``[N, D]`` by stream, and active tokens by feature."""
    paths, n_features = model.paths, model.n_features
    base_blocks = getattr(getattr(base, paths.decoder), paths.layers)
    streams = ("replacement", *OTHERS)
    hidden: list[dict[str, Tensor]] = [{} for _ in batches]
    for layer in range(model.n_layers):
        inputs: dict[str, list[Tensor]] = {stream: [] for stream in streams}
        counts = torch.zeros(n_features, dtype=torch.int64, device=model.device)
        for batch, states in zip(batches, hidden, strict=True):
            batch = batch.to(model.device)
            real, padding = batch.real, None if batch.attention_mask is None else ~batch.real
            # Recorded again in each layer: the masks of all batches could need more memory than
            # everything else.
            of_target = model.block_inputs(batch.input_ids, batch.attention_mask)
            of_base = record_inputs(base, paths, batch.input_ids, batch.attention_mask)
            for stream in streams:
                recorded = of_base if stream == "base" else of_target
                state, arguments = states.get(stream, recorded.hidden), recorded.arguments[layer]
                blocks = base_blocks if stream == "base" else model.blocks
                with record_module_inputs(getattr(blocks[layer], paths.mlp)) as seen:
                    if stream == "base":
                        states[stream] = blocks[layer](state, **arguments)
                    elif stream == "target":
                        states[stream], _ = model.block(layer, state, arguments, "target")
                    else:
                        states[stream], aux = model.block(
                            layer,
                            state,
                            arguments,
                            "replacement",
                            padding=padding,
                            return_codes=True,
                        )
                        if aux is not None and aux.codes is not None:
                            counts += torch.bincount(aux.codes.features, minlength=n_features)
                inputs[stream].append(seen[0][real])
        yield layer, {stream: torch.cat(parts) for stream, parts in inputs.items()}, counts


@torch.no_grad()
def _agreements(
    adapter: Any, layer: int, inputs: dict[str, Tensor], n_F: Tensor, config: OverlapConfig
) -> pa.Table:
    """Return a layer's agreements as rows of :data:`~fastadapt.features.store.schema.OVERLAP`."""
    # Sorted by count, since a chunk of features costs a top-k of its largest count.
    features = n_F.argsort(stable=True)
    features = features[n_F[features] > 0]
    agreements: dict[str, list[Tensor]] = {other: [] for other in OTHERS}
    for chunk in features.split(config.features_at_once):
        tops = {
            stream: strongest(pre_activations(adapter, chunk, x), n_F[chunk])
            for stream, x in inputs.items()
        }
        for other in OTHERS:
            both = (tops["replacement"] & tops[other]).sum(1)
            agreements[other].append(both.double() / n_F[chunk])
    order = features.argsort()
    none = torch.zeros(0, dtype=torch.float64, device=n_F.device)
    columns = {other: torch.cat([none, *parts])[order] for other, parts in agreements.items()}
    return pa.table(
        {
            "layer": np.full(len(features), layer, np.int32),
            "feature": features[order].cpu().numpy().astype(np.int32),
            **{other: values.cpu().numpy() for other, values in columns.items()},
        }
    ).cast(OVERLAP)


def pre_activations(adapter: Any, features: Tensor, x_ND: Tensor) -> Tensor:
    """Return ``W_enc x + b_enc`` of the given features, in float32 or wider: ``[F, N]``."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    W_FD, b_F = adapter.W_enc[features].to(wide), adapter.b_enc[features].to(wide)
    parts = [x_ND] if x_ND.dtype == wide else x_ND.split(_WIDENED)
    return torch.cat([nn.functional.linear(x.to(wide), W_FD, b_F) for x in parts]).T


def strongest(z_FN: Tensor, n_F: Tensor) -> Tensor:
    """Return a mask of the ``n_F`` largest of each row, of equal values the first: ``[F, N]``.

    Args:
        z_FN: floating point.
        n_F: int64, 1 to N.
    """
    z_FN = z_FN.contiguous()
    cut = z_FN.topk(int(n_F.max()), dim=1).values.gather(1, (n_F - 1)[:, None])
    top, equal = z_FN > cut, z_FN == cut
    left_F1 = n_F[:, None] - top.sum(1, keepdim=True)
    return top | (equal & (equal.cumsum(1, dtype=torch.int32) <= left_F1))


def distribution(table: pa.Table) -> dict[str, list[float]]:
    """Return the share of features in 20 bins of agreement from 0 to 1, by ``target``, ``base``."""
    shares = {}
    for other in OTHERS:
        counts, _ = np.histogram(table[other].to_numpy(), bins=BINS, range=(0, 1))
        shares[other] = (counts / max(1, counts.sum())).tolist()
    return shares


def figure(table: pa.Table) -> Figure:
    """Return the figure of agreement with the target and with the base."""
    middles = [(i + 0.5) / BINS for i in range(BINS)]
    names = {"target": "reads the target", "base": "reads the base"}
    return Figure(
        "overlap",
        "Overlap with a feature's own top tokens",
        "share of the tokens that both sets hold",
        "share of features",
        [
            Series(names[other], other, middles, shares)
            for other, shares in distribution(table).items()
        ],
    )


def medians(table: pa.Table) -> dict[str, float]:
    """Return the features' median agreement with ``target`` and with ``base``, by name."""
    return {other: float(np.median(table[other].to_numpy())) for other in OTHERS}


def plot_of(store: Store) -> Path:
    """Return the path of the store's plot of agreement."""
    return store.path("overlap").with_suffix(".png")
