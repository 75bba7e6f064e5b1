"""Seeded priorities: a unit's k activations of highest priority are a uniform draw.

A priority is a hash of seed, unit and token alone, so order, batch and shard do not change it.
Each activation has the same chance, and merging the top-k of parts gives the top-k of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.evaluation.splitmix import STEP, mix
from fastadapt.features.store.schema import KINDS, Kind


def tokens_hash(text: Tensor, position: Tensor) -> Tensor:
    """Return the hash of each token: int64, from its text's number in the source and position."""
    return mix(mix(text + STEP) + position)


def units_hash(seed: int, kind: Kind, layer: int, n_features: int, device: torch.device) -> Tensor:
    """Return the hash of each unit of a layer: int64 ``[F]``."""
    base = torch.tensor(seed, dtype=torch.int64, device=device)
    for part in (KINDS.index(kind), layer):
        base = mix(base + STEP) + part
    return mix(mix(base + STEP) + torch.arange(n_features, device=device))


def priority(unit_hash: Tensor, token_hash: Tensor) -> Tensor:
    """Return the priority of each activation, int64 from 0 to 2**63 - 1."""
    return mix(unit_hash ^ token_hash) & (2**63 - 1)
