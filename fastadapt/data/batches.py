"""Collate samples into batches, and plan the order of the batches of a run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastadapt.batch import Batch, Packing
from fastadapt.data.sequences import Sample

IGNORED = -100


def padding_id(tokenizer: Any, n_rows: int) -> int:
    """Return the id of the padding token, or 0 if the embedding has no row for this id.

    Adding a padding token to a tokenizer does not resize the model's embedding. Padding is masked
    everywhere, so any id of the embedding's ``n_rows`` rows may fill it.

    Example:
        >>> from types import SimpleNamespace
        >>> padding_id(SimpleNamespace(pad_token_id=3), 10)
        3
        >>> padding_id(SimpleNamespace(pad_token_id=10), 10)
        0
    """
    token = tokenizer.pad_token_id
    return int(token) if token is not None and 0 <= token < n_rows else 0


def padded_width(longest: int, multiple: int) -> int:
    """Return the smallest multiple that holds ``longest`` tokens.

    Example:
        >>> padded_width(128, 128), padded_width(129, 128), padded_width(129, 1)
        (128, 256, 129)
    """
    return -(-longest // multiple) * multiple


def pack_rows(lengths: Sequence[int], limit: int, multiple: int = 1) -> list[list[int]]:
    """Distribute the texts of a batch over rows, so that the batch has the fewest tokens.

    Of every number of rows whose width is within the limit, the number with the smallest product of
    rows and width is taken, and of equal ones the largest. Texts go from the longest to the
    shortest into the row with the fewest tokens. A text in each row is one of the choices, so that
    packing never makes a batch larger.

    Args:
        lengths: tokens of each text.
        limit: largest width of the rows, unless a text is longer.
        multiple: the width of the rows is a multiple of this number of tokens.

    Returns:
        The indices of the texts of each row.

    Example:
        >>> pack_rows([9, 3, 2, 3], limit=4)  # a row may be as long as the longest text
        [[0], [1, 3, 2]]
        >>> pack_rows([9, 8, 7], limit=10)
        [[0], [1], [2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    longest = padded_width(max(lengths), multiple)
    chosen, fewest = [[i] for i in order], len(order) * longest
    for n_rows in range(len(lengths) - 1, 0, -1):
        rows: list[list[int]] = [[] for _ in range(n_rows)]
        filled = [0] * n_rows
        for i in order:
            row = min(range(n_rows), key=filled.__getitem__)
            rows[row].append(i)
            filled[row] += lengths[i]
        width = padded_width(max(filled), multiple)
        if width <= max(limit, longest) and n_rows * width < fewest:
            chosen, fewest = rows, n_rows * width
    return chosen


def collate(
    samples: Sequence[Sample],
    pad_token_id: int,
    multiple: int = 1,
    rows: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Stack samples, padded on the right to the length of the longest row.

    Args:
        samples: at least one sample. Each sample has at least two tokens.
        pad_token_id: fills ``input_ids`` at padding. No loss and no statistic counts padding, so
            any id of the vocabulary may be used.
        multiple: T is padded further, to a multiple of this number of tokens.
        rows: the samples of each row, which hold them one after the other (:func:`pack_rows`);
            None: a sample a row.

    Returns:
        ``Batch``: input_ids int64 [B, T]; attention_mask bool [B, T], False at padding, or None
        if nothing is padded; labels int64 [B, T], -100 at padding and where the
        sample's label is -100. As in transformers, label ``t`` is the target of the prediction
        made at ``t - 1``.

    Raises:
        ValueError: there are no samples, or a sample has fewer than two tokens.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for sample in samples:
        if sample.input_ids.numel() < 2:
            raise ValueError(
                f"samples: sample {sample.index} has {sample.input_ids.numel()} token(s); "
                "at least 2 are needed, since the last token predicts nothing"
            )
    placed = [[sample] for sample in samples]
    if rows is not None:
        placed = [[samples[i] for i in row] for row in rows]
    lengths = [[sample.input_ids.numel() for sample in row] for row in placed]
    filled = list(map(sum, lengths))
    length = padded_width(max(filled), multiple)
    shape = (len(placed), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (of_row, n) in enumerate(zip(placed, filled, strict=True)):
        input_ids[row, :n] = torch.cat([sample.input_ids for sample in of_row])
        labels[row, :n] = torch.cat([sample.labels for sample in of_row])
        attention_mask[row, :n] = True
    mask = attention_mask if min(filled) < length else None
    packing = None if max(map(len, lengths)) == 1 else _packing(lengths, length)
    return Batch(input_ids, mask, labels, packing=packing)


def _packing(lengths: Sequence[Sequence[int]], width: int) -> Packing:
    texts = torch.full((len(lengths), width), sum(map(len, lengths)), dtype=torch.int64)
    positions = torch.empty_like(texts)
    number = 0
    for row, of_row in enumerate(lengths):
        end = 0
        for n in of_row:
            texts[row, end : end + n] = number
            positions[row, end : end + n] = torch.arange(n)
            number, end = number + 1, end + n
        positions[row, end:] = torch.arange(width - end)  # padding is like one more text
    return Packing(tuple(map(tuple, lengths)), texts, positions)


def collate_whole(rows: Iterable[Any]) -> Batch:
    """Stack token ids into a batch, padded with 0. Every real token is a label.

    Args:
        rows: lists, arrays or tensors of at least two ids each.

    Example:
        >>> collate_whole([[5, 6], [7, 8, 9]]).labels.tolist()
        [[5, 6, -100], [7, 8, 9]]
    """
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    return collate([Sample(i, row, row) for i, row in enumerate(tensors)], 0)


def batch_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the indices of each batch, with sequences sorted from the longest to the shortest.

    A batch holds at most ``max_tokens`` tokens, padding included. A longer sequence gets a batch
    with no other sequence. The longest sequences come first, so a lack of memory shows early.

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
    """Map a step to the samples of its batch: a pure function of the arguments and the step.

    Each epoch is a permutation drawn from (seed, epoch) and cut into ``n_batches`` batches. The
    last batch of an epoch may be smaller. Every sample occurs once per epoch. The plan has no state
    that changes a result, so a resumed run needs only its step as a cursor.

    ``window`` above 1 reduces padding: the samples of every ``window`` consecutive batches are
    sorted by length before they are cut, and the full batches of the epoch are then shuffled. The
    probability that a sample is in the i-th batch does not depend on its length: full batches come
    in a uniform order, and the samples of a smaller last batch are removed from the permutation
    before sorting. Which samples share a batch does depend on their lengths.

    Args:
        n: number of samples, at least 1.
        batch_size: samples per batch, at least 1.
        seed: seed of the run.
        lengths: tokens of each sample; required if ``window`` is above 1.
        window: number of batches whose samples are sorted together, at least 1.

    Raises:
        ValueError: an argument is below 1, or ``lengths`` does not have ``n`` entries.

    Example:
        >>> plan = BatchPlan(8, 3, seed=42)
        >>> [plan[step] for step in range(plan.n_batches)]
        [[7, 2, 5], [0, 6, 3], [4, 1]]
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
        """Return the sample indices of batch ``step``, counted from 0 over all epochs."""
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
    """Return ``0..n-1`` in a random order, the same in every version of Python."""
    # Python guarantees the stream of random() across versions, but not that of shuffle(): a run
    # must resume with the same order after an upgrade.
    stream = random.Random(seed)
    keys = [stream.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def bucket(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, window: int
) -> list[list[int]]:
    """Return batches of samples of similar length.

    Every ``window * batch_size`` consecutive samples are sorted by length (a stable sort), then cut
    into batches.

    Args:
        order: permutation of samples; ``batch_size`` divides its length.
        lengths: tokens of each sample.
        batch_size: samples per batch.
        window: number of batches whose samples are sorted together.

    Example:
        >>> bucket([0, 1, 2, 3], [9, 1, 8, 2], 2, 2)
        [[1, 3], [2, 0]]
    """
    return [
        batch
        for group in cut(order, window * batch_size)
        for batch in cut(sorted(group, key=lengths.__getitem__), batch_size)
    ]


def cut(items: Sequence[int], size: int) -> list[list[int]]:
    """Split items into consecutive lists of ``size`` items. The last list may be shorter."""
    return [list(items[first : first + size]) for first in range(0, len(items), size)]
