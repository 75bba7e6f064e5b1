"""Batch of token sequences, and the weights of its tokens. B sequences, T tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Packing(NamedTuple):
    """Rows that hold several texts, one after the other.

    Attributes:
        lengths: number of tokens of each text, by row.
        texts: int64 ``[B, T]``, number of each token's text in the order of ``lengths``; the number
            of texts at padding.
        positions: int64 ``[B, T]``, position of each token in its text.
    """

    lengths: tuple[tuple[int, ...], ...]
    texts: Tensor
    positions: Tensor

    @property
    def n_texts(self) -> int:
        """Number of texts in all rows."""
        return sum(map(len, self.lengths))


class Batch(NamedTuple):
    """Right-padded token sequences, one a row unless ``packing`` says otherwise.

    Attributes:
        input_ids: int64 ``[B, T]``.
        attention_mask: bool ``[B, T]``, false at padding. None if the batch has no padding, so that
            the host knows this without reading from the device.
        labels: int64 ``[B, T]``, the token itself if its prediction counts, else -100.
        passes_mask: whether models get ``attention_mask``. Causal attention gives the same hidden
            states at real tokens without it, since padding comes last. On a GPU transformers waits
            for the device when it reads a mask, and the mask excludes flash attention.
        packing: the texts of each row, if rows hold several. Models then get the positions in place
            of a mask; from positions that begin anew, transformers derives a mask within texts.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    passes_mask: bool = True
    packing: Packing | None = None

    @property
    def real(self) -> Tensor:
        """Bool ``[B, T]``, true at tokens that are not padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.attention_mask.bool()

    @property
    def model_mask(self) -> Tensor | None:
        """The attention mask that models get, bool ``[B, T]`` or None."""
        return self.attention_mask if self.passes_mask and self.packing is None else None

    @property
    def positions(self) -> Tensor | None:
        """Position ids that models get, int64 ``[B, T]``; None: each row counts from 0."""
        return None if self.packing is None else self.packing.positions

    def pinned(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies asynchronously."""
        return self._on(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return self._on(lambda tensor: tensor.to(device, non_blocking=True))

    def _on(self, move: Callable[[Tensor], Tensor]) -> Batch:
        packing = self.packing
        if packing is not None:
            texts, positions = move(packing.texts), move(packing.positions)
            packing = Packing(packing.lengths, texts, positions)
        mask = None if self.attention_mask is None else move(self.attention_mask)
        return self._replace(
            input_ids=move(self.input_ids),
            attention_mask=mask,
            labels=move(self.labels),
            packing=packing,
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

    The texts of a packed row are sequences of their own. Sequences without a counted token are left
    out. ``predictions`` covers the positions 0..T-2 whose next token has a valid label.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> real = torch.tensor([[True, True, True], [True, True, False]])
        >>> token_weights(Batch(ids, real, ids)).predictions
        tensor([[0.2500, 0.2500, 0.0000],
                [0.5000, 0.0000, 0.0000]])
    """

    def per_sequence(counted: Tensor) -> Tensor:
        totals = _counts(batch, counted)
        n = totals[:, None] if batch.packing is None else totals[batch.packing.texts]
        n_sequences = (totals > 0).sum()
        return counted.to(dtype) / (n.clamp(min=1) * n_sequences.clamp(min=1))

    return TokenWeights(per_sequence(batch.real), per_sequence(_predicts(batch)))


def mean_share(batch: Batch, hits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the share of a sequence's predictions that are hits, averaged over the sequences.

    The average is that of :attr:`TokenWeights.predictions`. It is computed from counts, so that it
    is exactly 0 without a hit, and exactly 1 if all predictions are hits.

    Args:
        batch: the batch.
        hits: bool ``[B, T]``. Positions that predict no token do not count.
        dtype: floating dtype of the result.

    Returns:
        0-d; 0 if the batch predicts no token.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> real = torch.tensor([[True, True, True], [True, True, False]])
        >>> hits = torch.tensor([[True, False, True], [False, False, True]])
        >>> mean_share(Batch(ids, real, ids), hits)
        tensor(0.2500)
    """
    predicts = _predicts(batch)
    n, n_hits = _counts(batch, predicts), _counts(batch, predicts & hits)
    return (n_hits.to(dtype) / n.clamp(min=1)).sum() / (n > 0).sum().clamp(min=1)


def _predicts(batch: Batch) -> Tensor:
    """Return bool ``[B, T]``, true at positions whose next token is predicted."""
    real, packing = batch.real, batch.packing
    valid = torch.zeros_like(real)
    valid[:, :-1] = (batch.labels[:, 1:] != IGNORE) & real[:, 1:] & real[:, :-1]
    if packing is not None:  # the last token of a text does not predict the first of the next one
        valid[:, :-1] &= packing.texts[:, 1:] == packing.texts[:, :-1]
    return valid


def _counts(batch: Batch, counted: Tensor) -> Tensor:
    """Return the number of counted tokens of each sequence, int64 ``[B]``.

    With packing: of each text, and as last entry of the padding.
    """
    packing = batch.packing
    if packing is None:
        return counted.sum(1)
    totals = torch.zeros(packing.n_texts + 1, dtype=torch.int64, device=counted.device)
    return totals.scatter_add_(0, packing.texts.flatten(), counted.flatten().long())
