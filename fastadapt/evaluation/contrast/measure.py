"""Measure models at positions of texts: log-odds of sets of tokens, entropy, or any quantity.

Every model is a transformers model, called through its own forward. The states at the positions
alone go through the head. S sites, K sets of tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.batch import Batch
from fastadapt.evaluation.contrast.places import Site
from fastadapt.evaluation.faithfulness.outputs import check_finite
from fastadapt.evaluation.faithfulness.partial_results import PartialResults, iter_missing
from fastadapt.evaluation.faithfulness.texts import Text, batch_of, batches_of, digest_of

_SCHEMA = 1  # version of the arrays; files of other versions are not read
_CHUNK = 256  # places whose logits are in memory at a time


@dataclass(frozen=True)
class Reader:
    """A model whose predictions are measured.

    Attributes:
        name: unique among the readers, and a valid file name.
        fingerprint: digest of everything that the model's outputs depend on.
        opened: returns a context that yields the transformers model.
    """

    name: str
    fingerprint: str
    opened: Callable[[], AbstractContextManager[Any]]


class Quantity(NamedTuple):
    """A quantity of a model's prediction at one position, such as its entropy.

    Attributes:
        key: name and arguments, which select the stored file.
        width: number of values per position.
        compute: given the model, a batch on its device and the positions in each text, returns the
            values ``[n, width]`` in the order of the positions.
    """

    key: tuple[object, ...]
    width: int
    compute: Callable[[Any, Batch, Sequence[Sequence[int]]], Tensor]


def log_odds_of(sets: Sequence[Sequence[int]], decoder: str) -> Quantity:
    """Return the log-odds ``log P(set) - log P(not in set)`` of sets of token ids.

    ``decoder`` is the name of the model's decoder, see
    :class:`fastadapt.models.pretrained.Paths`.
    """

    def compute(logits: Tensor) -> Tensor:
        columns = []
        for ids in sets:
            index = torch.tensor([i for i in ids if i < logits.shape[1]], device=logits.device)
            others = logits.index_fill(1, index, -math.inf)
            columns.append(logits[:, index].logsumexp(1) - others.logsumexp(1))
        return torch.stack(columns, 1)

    key = ("log-odds", tuple(map(tuple, sets)))
    return Quantity(key, len(sets), partial(_predict, decoder, compute))


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).nansum(1, keepdim=True)


def entropy_of(decoder: str) -> Quantity:
    """Return the entropy of the next-token distribution, in nats; see :func:`log_odds_of`."""
    return Quantity(("entropy",), 1, partial(_predict, decoder, _entropy))


def read(
    reader: Reader,
    texts: Sequence[Text],
    sites: Sequence[Site],
    quantity: Quantity,
    folder: Path,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> Tensor | None:
    """Measure a quantity of a model at positions of texts, or read the stored values.

    Args:
        reader: the model.
        texts: the texts. The model does not read those without a position.
        sites: distinct positions, sorted.
        quantity: what is measured.
        folder: stores one file, and until all is read one file per batch.
        batch_tokens: tokens of a batch, padding included.
        progress: called with (completed batches, total batches).
        stop: set it to stop after the current batch.

    Returns:
        float64 ``[S, width]`` on the CPU, in the order of ``sites``; None if stopped.

    Raises:
        UserError: a text cannot be read, or the stored file is damaged.
        RunError: a prediction is not finite, or the folder cannot be written.
    """
    rows: dict[int, list[int]] = {}
    for row, (t, _) in enumerate(sites):
        rows.setdefault(t, []).append(row)
    used = [texts[t] for t in rows]
    by_text = list(rows.values())
    positions = [[sites[row][1] for row in each] for each in by_text]
    batches = batches_of(used, batch_tokens)
    facts = ("contrast", _SCHEMA, digest_of(used), positions, batch_tokens, quantity.key)
    digest = hashlib.sha256(repr((facts, reader.fingerprint)).encode()).hexdigest()
    arrays = {"values": (torch.float64, (len(sites), quantity.width))}
    store = PartialResults(folder, reader.name, digest, len(batches), arrays)
    if store.missing():
        with reader.opened() as model:
            for i, _ in iter_missing({reader.name: store}, 1, progress, stop):
                batch = batch_of(used, batches[i]).to(model.device)
                values = quantity.compute(model, batch, [positions[j] for j in batches[i]])
                check_finite(reader.name, values, [used[j].id for j in batches[i]])
                store.add(i, {"values": values.cpu()})
    if store.missing():
        return None
    order = torch.tensor([row for batch in batches for j in batch for row in by_text[j]])
    return store.read()["values"][order.argsort()]


@torch.no_grad()
def _predict(
    decoder: str,
    compute: Callable[[Tensor], Tensor],
    model: Any,
    batch: Batch,
    positions: Sequence[Sequence[int]],
) -> Tensor:
    """Return ``compute(logits)`` of the float64 logits ``[n, V]`` at positions of a batch."""
    states = getattr(model, decoder)(
        input_ids=batch.input_ids, attention_mask=batch.model_mask, use_cache=False
    ).last_hidden_state
    sites = [(row, p) for row, each in enumerate(positions) for p in each]
    row, position = torch.tensor(sites, device=states.device).unbind(1)
    head = model.get_output_embeddings().weight
    wide = torch.promote_types(head.dtype, torch.float32)
    head, cap = head.to(wide), getattr(model.config, "final_logit_softcapping", None)
    values = []
    for chunk in states[row, position].to(wide).split(_CHUNK):
        logits = (chunk @ head.T).double()
        values.append(compute(logits if cap is None else cap * torch.tanh(logits / cap)))
    return torch.cat(values)
