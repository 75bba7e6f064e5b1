"""Where units are active in whole texts, read off the model itself.

A store knows the places that it kept, not those that it did not: that a unit is silent in a stretch
of text, only the model can say.
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

#: By (layer, unit): int64 ``[n, 2]``, rows of (index of the text, position in it), in order.
Places = dict[tuple[int, int], np.ndarray]


class Activations(Protocol):
    """Whoever can say where units are active."""

    def places(
        self,
        kind: Kind,
        texts: Sequence[Sequence[int]],
        units: Mapping[int, Sequence[int]],
        *,
        progress: Callable[[int, int], None] | None = None,
        stop: Event | None = None,
    ) -> Places:
        """Every place in ``texts`` at which one of ``units`` (by layer) is active.

        Raises:
            UserError: it knows nothing of this kind.
        """


class ModelActivations:
    """Those of a pair's units, read as collecting reads them.

    Args:
        model: with transcoders; they are put in ``eval()`` for each call and restored.
        neurons_per_token: as the store was collected with; None where it has no neurons.
        batch_tokens: of a batch, padding included; a longer text is a batch of its own.
    """

    def __init__(
        self,
        model: ReplacementModel,
        *,
        neurons_per_token: int | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        if not model.n_features:
            raise UserError("what this run has trained has no features to judge")
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
        """See :class:`Activations`. What was found until ``stop`` is set is returned."""
        model, neurons = self._model, self._neurons(kind)
        found: dict[tuple[int, int], list[np.ndarray]] = {
            (layer, unit): [] for layer, some in units.items() for unit in some
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
                        row, at = np.divmod(tokens, width)
                        found[layer, unit].append(np.stack([np.asarray(indices)[row], at], 1))
                done += len(indices)
                if progress is not None:
                    progress(done, len(texts))
        finally:
            model.adapters.train(training)
        return {unit: _in_order(rows) for unit, rows in found.items()}

    def _neurons(self, kind: Kind) -> dict[Kind, list[Neurons]]:
        """How the kind's neurons are read; nothing for the adapter's features, which tell."""
        if kind == "adapter":
            return {}
        if self._k is None:
            raise UserError(f"{kind} neurons: expected how many of a token count as active")
        layers = range(self._model.n_layers)
        rows = [output_rows(self._model, kind, layer) for layer in layers]
        return {kind: [Neurons(of_layer.float().norm(dim=1), self._k) for of_layer in rows]}


def _by_unit(codes: SparseCodes, units: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Of each of some units, the tokens at which it is active."""
    tokens, features = codes.tokens.cpu().numpy(), codes.features.cpu().numpy()
    order = np.argsort(features, kind="stable")
    tokens, features = tokens[order], features[order]
    for unit in units:
        first, end = np.searchsorted(features, [unit, unit + 1])
        yield unit, tokens[first:end]


def _in_order(rows: Sequence[np.ndarray]) -> np.ndarray:
    places = np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.int64)
    return places[np.lexsort((places[:, 1], places[:, 0]))]
