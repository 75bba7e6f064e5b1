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
from torch import Tensor, nn

from fastadapt.adapter import TranscoderAdapter
from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.evaluation.texts import Text, batch_of, batches_of
from fastadapt.features.schema import Kind
from fastadapt.models import Mode, ReplacementModel

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
    """Those of a pair's units, read where collecting reads them.

    Features of the adapter and neurons of the base's MLPs run in the replacement model, neurons of
    the target's in the target. A neuron is active on a token where its activation (what the MLP's
    output matrix multiplies), times the norm of its column there, is positive and among the token's
    ``neurons_per_token`` largest.

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
        if kind != "adapter" and self._k is None:
            raise UserError(f"{kind} neurons: expected how many of a token count as active")
        found: dict[tuple[int, int], list[np.ndarray]] = {
            (layer, unit): [] for layer, some in units.items() for unit in some
        }
        whole = [Text(str(i), list(ids), 0) for i, ids in enumerate(texts)]
        training = self._model.adapters.training
        self._model.adapters.eval()
        done = 0
        try:
            for indices in batches_of(whole, self._batch_tokens):
                if stop is not None and stop.is_set():
                    break
                batch = batch_of(whole, indices).to(self._model.device)
                for layer, active in self._walk(kind, batch, units):
                    of_unit, row, at = active.nonzero().cpu().numpy().T
                    places = np.stack([np.asarray(indices)[row], at], 1)
                    ends = np.searchsorted(of_unit, np.arange(1, len(units[layer])))
                    for unit, some in zip(units[layer], np.split(places, ends), strict=True):
                        found[layer, unit].append(some)
                done += len(indices)
                if progress is not None:
                    progress(done, len(texts))
        finally:
            self._model.adapters.train(training)
        return {unit: _in_order(rows) for unit, rows in found.items()}

    def _walk(
        self, kind: Kind, batch: Batch, units: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Of each layer asked for, bool ``[units, B, T]``; false at padding."""
        model = self._model
        real, attention = batch.real, batch.attention_mask
        padding = None if attention is None else ~real
        mode: Mode = "target" if kind == "target" else "replacement"
        inputs = model.block_inputs(batch.input_ids, attention)
        hidden = inputs.hidden
        for layer in range(max(units) + 1):
            arguments = inputs.arguments[layer]
            seen: list[Tensor] = []
            read = self._read(kind, layer)
            hook = read.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
            try:
                hidden, _ = model.block(layer, hidden, arguments, mode, padding=padding)
            finally:
                hook.remove()
            model.leave(layer)
            if layer in units:
                wanted = torch.tensor(list(units[layer]), device=model.device)
                active = self._active(read, seen[0])[..., wanted]
                yield layer, active.movedim(-1, 0) & real

    def _read(self, kind: Kind, layer: int) -> nn.Module:
        """The module whose input tells the activations."""
        if kind == "adapter":
            return self._model.adapters[layer]
        mlp = getattr(self._model.mlps[layer], kind)
        down = getattr(mlp, "down_proj", None)
        if not isinstance(down, nn.Linear):
            raise UserError(f"neurons of {type(mlp).__name__} cannot be read: it has no down_proj")
        return down

    def _active(self, read: nn.Module, x: Tensor) -> Tensor:
        """Bool ``[B, T, F]``."""
        if isinstance(read, TranscoderAdapter):
            return read.encode(x) > 0
        assert isinstance(read, nn.Linear)
        weighed = x.float() * read.weight.float().norm(dim=0)
        strongest = weighed.topk(min(self._k or 0, weighed.shape[-1]), dim=-1)
        active = torch.zeros_like(weighed, dtype=torch.bool)
        return active.scatter(-1, strongest.indices, strongest.values > 0)


def _in_order(rows: Sequence[np.ndarray]) -> np.ndarray:
    places = np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.int64)
    return places[np.lexsort((places[:, 1], places[:, 0]))]
