"""Batch of token sequences, and the weights of its tokens. B sequences, T tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Batch(NamedTuple):
    """Right-padded token sequences.

    Attributes:
        input_ids: int64 ``[B, T]``.
        attention_mask: bool ``[B, T]``, false at padding. None if the batch has no padding, so that
            the host knows this without reading from the device.
        labels: int64 ``[B, T]``, the token itself if its prediction counts, else -100.
        passes_mask: whether models get ``attention_mask``. Causal attention gives the same hidden
            states at real tokens without it, since padding comes last. On a GPU transformers waits
            for the device when it reads a mask, and the mask excludes flash attention.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    passes_mask: bool = True

    @property
    def real(self) -> Tensor:
        """Bool ``[B, T]``, true at tokens that are not padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    @property
    def model_mask(self) -> Tensor | None:
        """The attention mask that models get, bool ``[B, T]`` or None."""
        return self.attention_mask if self.passes_mask else None

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.pin_memory(),
            None if mask is None else mask.pin_memory(),
            self.labels.pin_memory(),
            self.passes_mask,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.passes_mask,
        )


class TokenWeights(NamedTuple):
    """Weights that sum to 1 over the batch; floating ``[B, T]``.

    Attributes:
        tokens: weight of every token; 0 at padding.
        predictions: weight of every position; 0 where the next token is not predicted.
    """

    tokens: Tensor
    predictions: Tensor


def token_weights(batch: Batch, dtype: torch.dtype = torch.float32) -> TokenWeights:
    """Return weights that average over each sequence, then over the sequences.

    Sequences without a counted token are left out. ``predictions`` covers the positions 0..T-2
    whose next token has a valid label.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> real = torch.tensor([[True, True, True], [True, True, False]])
        >>> token_weights(Batch(ids, real, ids)).predictions
        tensor([[0.2500, 0.2500, 0.0000],
                [0.5000, 0.0000, 0.0000]])
    """
    real = batch.real
    valid = torch.zeros_like(real)
    valid[:, :-1] = (batch.labels[:, 1:] != IGNORE) & real[:, 1:] & real[:, :-1]

    def per_sequence(counted: Tensor) -> Tensor:
        n = counted.sum(1, keepdim=True)
        rows = (n > 0).sum().clamp(min=1)
        return counted.to(dtype) / (n.clamp(min=1) * rows)

    return TokenWeights(per_sequence(real), per_sequence(valid))
