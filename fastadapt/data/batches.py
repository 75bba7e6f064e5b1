"""Samples into batches, and the order in which a run sees them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastadapt.batch import Batch
from fastadapt.data.sequences import Sample

IGNORED = -100


def padding_id(tokenizer: Any, n_rows: int) -> int:
    """Return the token to pad with: the tokenizer's, where the embedding of ``n_rows`` has its row.

    A tokenizer that was given a padding token often comes with an embedding that was not resized.
    Padding is masked everywhere, so that any row does.
    """
    token = tokenizer.pad_token_id
    return int(token) if token is not None and 0 <= token < n_rows else 0


def collate(samples: Sequence[Sample], pad_token_id: int) -> Batch:
    """Stacks samples, padded on the right to the longest.

    Args:
        samples: at least one, each of at least two tokens.
        pad_token_id: fills ``input_ids`` at padding; any id of the vocabulary will do, since
            padding is masked everywhere.

    Returns:
        ``Batch``: input_ids int64 [B, T]; attention_mask bool [B, T], False at padding, or None
        where all samples have the same length; labels int64 [B, T], -100 at padding and wherever
        the sample has it. As in transformers, label ``t`` speaks of token ``t``, hence of the
        prediction made at ``t - 1``.

    Raises:
        ValueError: no samples, or one without a next-token position.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for sample in samples:
        if sample.input_ids.numel() < 2:
            raise ValueError(
                f"samples: sample {sample.index} has {sample.input_ids.numel()} token(s); "
                "at least 2 are needed, since the last one predicts nothing"
            )
    lengths = [sample.input_ids.numel() for sample in samples]
    length = max(lengths)
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (sample, n) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[row, :n] = sample.input_ids
        labels[row, :n] = sample.labels
        attention_mask[row, :n] = True
    padded = min(lengths) < length
    return Batch(input_ids, attention_mask if padded else None, labels)


def collate_whole(rows: Iterable[Any]) -> Batch:
    """Stack token ids into a batch, padded with 0, whose labels are all tokens.

    Args:
        rows: lists, arrays or tensors of at least two ids each.
    """
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    return collate([Sample(i, row, row) for i, row in enumerate(tensors)], 0)


def batch_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of each batch: similar lengths together, the longest first.

    A batch has at most ``max_tokens`` tokens, padding included, or one sequence. A batch that does
    not fit in memory therefore fails at once.

    Example:
        >>> batch_by_length([2, 5, 3, 5], max_tokens=10)
        [[1, 3], [2, 0]]
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class BatchPlan:
    """Which samples make up batch ``step``: a pure function of the arguments and ``step``.

    Each epoch is a permutation of its own, drawn from (seed, epoch), cut into ``n_batches``
    batches of which the last may be smaller; every sample is seen once per epoch. Since nothing is
    kept between calls that changes the answer, the cursor of a resumed run is its step.

    With ``window`` above 1, samples of like length share a batch, so that less is padding: every
    ``window`` batches of the permutation are sorted by length before they are cut, and all full
    batches of the epoch are shuffled. A sample is as likely in each batch as without it, whatever
    its length: full batches come in a uniform order, and what fills the smaller last batch is taken
    off the permutation before anything is sorted. Who shares a batch with whom does change.

    Args:
        n: number of samples, at least 1.
        batch_size: samples per batch, at least 1.
        seed: of the run.
        lengths: of the samples, in tokens; asked for where ``window`` is above 1.
        window: batches whose samples are sorted together, at least 1.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        *,
        lengths: Sequence[int] | None = None,
        window: int = 1,
    ) -> None:
        for name, value in (("n", n), ("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if window > 1 and (lengths is None or len(lengths) != n):
            got = "none" if lengths is None else len(lengths)
            raise ValueError(f"lengths: expected {n}, one per sample, got {got}")
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._lengths = lengths
        self._window = window
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def n_batches(self) -> int:
        """Batches per epoch."""
        return -(-self.n // self.batch_size)

    def __getitem__(self, step: int) -> list[int]:
        """Indices of batch ``step``, counted from 0 over all epochs."""
        if step < 0:
            raise IndexError(f"step: expected 0 or more, got {step}")
        epoch, batch = divmod(step, self.n_batches)
        if epoch != self._epoch:
            self._batches = self._cut(epoch)
            self._epoch = epoch
        return self._batches[batch]

    def _cut(self, epoch: int) -> list[list[int]]:
        order = permutation(self.n, f"{self.seed}/{epoch}")
        if self._window == 1 or self._lengths is None:
            return cut(order, self.batch_size)
        whole = self.n - self.n % self.batch_size
        batches = bucket(order[:whole], self._lengths, self.batch_size, self._window)
        shuffled = permutation(len(batches), f"{self.seed}/{epoch}/batches")
        return [batches[i] for i in shuffled] + cut(order[whole:], self.batch_size)


def permutation(n: int, seed: str) -> list[int]:
    """``0..n-1`` in a random order, the same in every version of Python."""
    # Sorting by random() keys, not shuffle(): random() is the stream that Python promises to
    # keep from version to version, so a run can be resumed after an upgrade.
    stream = random.Random(seed)
    keys = [stream.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def bucket(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, window: int
) -> list[list[int]]:
    """Batches of samples of like length, from a permutation whose length they divide.

    Every ``window * batch_size`` samples of ``order`` are sorted by length, equal lengths staying
    in their order, and cut.
    """
    return [
        batch
        for some in cut(order, window * batch_size)
        for batch in cut(sorted(some, key=lengths.__getitem__), batch_size)
    ]


def cut(items: Sequence[int], size: int) -> list[list[int]]:
    """Runs of ``size`` items, of which the last may be smaller."""
    return [list(items[first : first + size]) for first in range(0, len(items), size)]
