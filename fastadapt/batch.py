"""A batch of token sequences, and how much each of its tokens counts. B sequences, T tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Batch(NamedTuple):
    """Right-padded token sequences.

    ``input_ids`` int64 ``[B, T]``; ``attention_mask`` bool ``[B, T]``, false at padding, or None
    where there is none (known on the host, so that no step has to ask the device); ``labels`` int64
    ``[B, T]``: the token itself where predicting it counts, -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor

    @property
    def real(self) -> Tensor:
        """Bool ``[B, T]``: the tokens that are not padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies without holding up the host."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.pin_memory(),
            None if mask is None else mask.pin_memory(),
            self.labels.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
        )


class TokenWeights(NamedTuple):
    """How much each token counts, summing to 1 over the batch; ``[B, T]``, floating."""

    tokens: Tensor
    predictions: Tensor


def token_weights(batch: Batch, dtype: torch.dtype = torch.float32) -> TokenWeights:
    """Weights that average per sequence, then over the sequences that have something to count.

    ``predictions`` is over the next-token positions 0..T-2 whose label is valid.
    """
    real = batch.real
    valid = torch.zeros_like(real)
    valid[:, :-1] = (batch.labels[:, 1:] != IGNORE) & real[:, 1:] & real[:, :-1]

    def per_sequence(counted: Tensor) -> Tensor:
        n = counted.sum(1, keepdim=True)
        rows = (n > 0).sum().clamp(min=1)
        return counted.to(dtype) / (n.clamp(min=1) * rows)

    return TokenWeights(per_sequence(real), per_sequence(valid))
