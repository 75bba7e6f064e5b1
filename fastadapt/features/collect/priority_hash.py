"""Seeded priorities: the uniform draw of a unit's activations is the top by them.

A priority is a hash of what it belongs to and nothing else, so it is the same in whatever order,
batch or shard an activation is met: each activation has the same chance, and a merge of top-k's is
the top-k of all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.features.store.schema import KINDS, Kind

_STEP = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as a signed number
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)
_POSITIVE = 2**63 - 1


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser of int64s, taken as 64 bits (Steele et al., OOPSLA 2014)."""
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        x = x ^ ((x >> shift) & (2 ** (64 - shift) - 1))
        if factor != 1:
            x = x * factor
    return x


def tokens_hash(text: Tensor, position: Tensor) -> Tensor:
    """int64, of the places of tokens: texts by their number in the source, positions in them."""
    return mix(mix(text + _STEP) + position)


def units_hash(seed: int, kind: Kind, layer: int, n_features: int, device: torch.device) -> Tensor:
    """int64 ``[F]``, of the units of a layer."""
    base = torch.tensor(seed, dtype=torch.int64, device=device)
    for part in (KINDS.index(kind), layer):
        base = mix(base + _STEP) + part
    return mix(mix(base + _STEP) + torch.arange(n_features, device=device))


def priority(of_unit: Tensor, of_token: Tensor) -> Tensor:
    """int64, 0 to 2**63 - 1, of activations, from the hashes of their unit and token."""
    return mix(of_unit ^ of_token) & _POSITIVE
