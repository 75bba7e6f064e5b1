"""Activations of units (features or neurons) in whole texts, computed by the model.

A store holds some of the active positions of a unit only; whether the unit is silent in a window
needs the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import Protocol

import numpy as np
import torch

from fastadapt.errors import UserError
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of
from fastadapt.features.collect.layer_codes import walk
from fastadapt.features.store.schema import Kind
from fastadapt.features.store.units import Neurons, output_rows
from fastadapt.kernels.transcoder import SparseCodes
from fastadapt.models.replacement import ReplacementModel

#: By (layer, unit): int64 ``[n, 2]``, sorted rows of (index of the text, position in it).
Places = dict[tuple[int, int], np.ndarray]


class Activations(Protocol):
    """Interface that returns the positions of texts at which features or neurons are active."""

    def places(
        self,
        kind: Kind,
        texts: Sequence[Sequence[int]],
        units: Mapping[int, Sequence[int]],
        *,
        progress: Callable[[int, int], None] | None = None,
        stop: Event | None = None,
    ) -> Places:
        """Return the positions in ``texts`` at which each unit of ``units`` (by layer) is active.

        Raises:
            UserError: activations of this kind of unit are not available.
        """


class ModelActivations:
    """Activations of a pair's features and neurons, computed as when features are collected.

    Args:
        model: model with transcoders; each call sets them to ``eval()`` and restores their mode.
        neurons_per_token: setting of the store; None if the store has no neurons.
        batch_tokens: maximum number of tokens of a batch, with padding; a longer text is a batch.

    Raises:
        UserError: the model has no features.
    """

    def __init__(
        self,
        model: ReplacementModel,
        *,
        neurons_per_token: int | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        if not model.n_features:
            raise UserError("expected a run that trained transcoders, got one that has no features")
        self._model, self._k, self._batch_tokens = model, neurons_per_token, batch_tokens

    @torch.no_grad()
    def places(
        self,
        kind: Kind,
        texts: Sequence[Sequence[int]],
        units: Mapping[int, Sequence[int]],
        *,
        progress: Callable[[int, int], None] | None = None,
        stop: Event | None = None,
    ) -> Places:
        """See :class:`Activations`. Return the positions computed before ``stop`` is set."""
        model, neurons = self._model, self._neurons(kind)
        parts: dict[tuple[int, int], list[np.ndarray]] = {
            (layer, unit): [] for layer, in_layer in units.items() for unit in in_layer
        }
        whole = [Text(str(i), list(ids), 0) for i, ids in enumerate(texts)]
        training = model.adapters.training
        model.adapters.eval()
        done = 0
        try:
            for indices in batches_of(whole, self._batch_tokens):
                if stop is not None and stop.is_set():
                    break
                batch = batch_of(whole, indices).to(model.device)
                width = batch.input_ids.shape[1]
                for layer, codes in walk(model, batch, neurons):
                    for unit, tokens in _by_unit(codes[kind], units.get(layer, ())):
                        row, position = np.divmod(tokens, width)
                        parts[layer, unit].append(np.stack([np.asarray(indices)[row], position], 1))
                done += len(indices)
                if progress is not None:
                    progress(done, len(texts))
        finally:
            model.adapters.train(training)
        return {unit: _sorted(rows) for unit, rows in parts.items()}

    def _neurons(self, kind: Kind) -> dict[Kind, list[Neurons]]:
        """Return the neurons to read, by kind; empty for the adapter's features."""
        if kind == "adapter":
            return {}
        if self._k is None:
            raise UserError(
                f"{kind} neurons: neurons_per_token is None; pass the value that the store's "
                "features were collected with"
            )
        layers = range(self._model.n_layers)
        rows = [output_rows(self._model, kind, layer) for layer in layers]
        return {kind: [Neurons(row.float().norm(dim=1), self._k) for row in rows]}


def _by_unit(codes: SparseCodes, units: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each of ``units`` with the indices of the tokens at which it is active."""
    tokens, features = codes.tokens.cpu().numpy(), codes.features.cpu().numpy()
    order = np.argsort(features, kind="stable")
    tokens, features = tokens[order], features[order]
    for unit in units:
        first, end = np.searchsorted(features, [unit, unit + 1])
        yield unit, tokens[first:end]


def _sorted(rows: Sequence[np.ndarray]) -> np.ndarray:
    places = np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.int64)
    return places[np.lexsort((places[:, 1], places[:, 0]))]
