"""Places in held-out texts: cut texts whose last token a graph explains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.data.mixtures import load_held_out
from fastadapt.effects.run import LoadedRun
from fastadapt.errors import UserError
from fastadapt.graphs.targets import Difference, most_different


class Place(NamedTuple):
    """A text up to the position of the largest KL(target ‖ hybrid) where top tokens differ."""

    ids: Tensor
    difference: Difference


def texts(run: LoadedRun, seed: int) -> list[Tensor]:
    """Return the token ids of a run's held-out texts, shuffled.

    Raises:
        UserError: the run names no data.
    """
    if run.config is None:
        raise UserError("expected the folder of a trained run, with config.yaml")
    context = run.model.model.config.max_position_embeddings
    sequences = load_held_out(run.config.data, run.pair.tokenizer, context)
    ids = [torch.as_tensor(sequences[i].input_ids) for i in range(len(sequences))]
    random.Random(seed).shuffle(ids)
    return ids


def places(run: LoadedRun, n: int, seed: int) -> Iterator[Place]:
    """Yield a place in each of n texts; texts without one are left out."""
    for ids in texts(run, seed):
        if n == 0:
            return
        try:
            difference = most_different(run.model, ids)
        except UserError:  # both models predict the same tokens everywhere
            continue
        n -= 1
        yield Place(ids[: difference.position + 1], difference)
