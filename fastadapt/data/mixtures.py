"""Mix several sources in shares of tokens."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from fastadapt.data.batches import BatchPlan, permutation
from fastadapt.data.sequences import DataConfig, SequenceCounts, Sequences, load_sequences
from fastadapt.data.sources import MixedSource, read_contents
from fastadapt.organism import resolve


class Mixture(Sequences):
    """The sequences of several sources, one source after the other.

    Attributes:
        parts: the sequences of each source.
        weights: share of each source in the training tokens; they sum to 1.
    """

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.weights = tuple(weight / sum(weights) for weight in weights)
        each = [part.counts for part in parts]
        longest = max(counts.longest for counts in each)
        counts = SequenceCounts(*map(sum, zip(*each, strict=True)))._replace(longest=longest)
        starts = [0, *accumulate(part.counts.tokens for part in parts)]
        ends = array("q")
        for start, part in zip(starts, parts, strict=False):
            ends.extend(start + end for end in accumulate(part.lengths))
        super().__init__(
            ", ".join(part.source for part in parts),
            counts,
            torch.cat([part.tokens for part in parts]),
            ends,
            [spans for part in parts for spans in part.label_spans],
            array("q", (row for part in parts for row in part.rows)),
        )
        self._firsts = [0, *accumulate(map(len, parts))]

    def check_vocabulary(self, n_rows: int) -> None:
        """Check that the model has an embedding for every token; the message names the source."""
        for part in self.parts:
            part.check_vocabulary(n_rows)

    def part_of(self, index: int) -> int:
        """Return the number of the source of a sequence."""
        return bisect_right(self._firsts, index) - 1

    def tokens_of(self, indices: Sequence[int]) -> list[int]:
        """Return the number of tokens of each source among these sequences."""
        lengths, tokens = self.lengths, [0] * len(self.parts)
        for index in indices:
            tokens[self.part_of(index)] += lengths[index]
        return tokens


def check_sources(config: DataConfig) -> None:
    """Find the columns of every source, without reading a source as a whole.

    Raises:
        UserError: a source does not exist, or its columns are not recognised.
    """
    parts: tuple[MixedSource | None, ...] = (
        (None,) if isinstance(config.train, str) else config.train
    )
    for part in parts:
        name = str(config.train) if part is None else part.source
        read_contents(config.source(resolve(name), "train", part))
    read_contents(config.source(resolve(config.validation), "validation"))


def load_training(config: DataConfig, tokenizer: Any, max_positions: int | None) -> Sequences:
    """Read the training data of a configuration; see :func:`load_sequences`."""
    if isinstance(config.train, str):
        return load_sequences(
            resolve(config.train), tokenizer, config, split="train", max_positions=max_positions
        )
    parts = [
        load_sequences(
            resolve(part.source),
            tokenizer,
            config,
            split="train",
            max_positions=max_positions,
            part=part,
        )
        for part in config.train
    ]
    return Mixture(parts, [part.weight for part in config.train])


def load_held_out(config: DataConfig, tokenizer: Any, max_positions: int | None) -> Sequences:
    """Read the held-out data of a configuration; see :func:`load_sequences`."""
    return load_sequences(
        resolve(config.validation),
        tokenizer,
        config,
        split="validation",
        max_positions=max_positions,
    )


class MixturePlan:
    """Map a step to the samples of its batch: a pure function of the arguments and the step.

    The samples form one endless order. Each next sample comes from the source whose tokens so far
    are the smallest against its weight. After any number of steps the tokens of a source exceed
    its share of all tokens by less than its longest sequence, and fall short of it by at most this
    share of the longest sequences of all other sources together. A source is read in a permutation
    drawn from (seed, source, pass), whole passes one after the other.

    An epoch ends, after its last full batch, where a source has no further sequence for its share
    without a repetition. The next epoch goes on in the order.

    Args:
        lengths: tokens of each sample, by source.
        weights: weight of each source, above 0.
        batch_size: samples per batch, at least 1.
        seed: seed of the run.

    Example:
        >>> plan = MixturePlan([[10] * 4, [5] * 6], [1, 1], batch_size=3, seed=42)
        >>> plan.n_batches, [sorted(i >= 4 for i in plan[step]) for step in range(2)]
        (3, [[False, True, True], [False, True, True]])
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
    ) -> None:
        self._lengths, self._weights, self._seed = lengths, weights, seed
        self._firsts = [0, *accumulate(map(len, lengths))]
        self.batch_size = batch_size
        self._order = array("q")  # as far as requested
        self._taken = [0] * len(lengths)  # samples of each source
        self._tokens = [0] * len(lengths)
        self._passes: list[tuple[int, list[int]]] = [(-1, [])] * len(lengths)
        while self._taken[part := self._next_part()] < len(lengths[part]):
            self._take(part)
        self.n = len(self._order)

    @property
    def n_batches(self) -> int:
        """Batches per epoch."""
        return max(1, self.n // self.batch_size)

    def __getitem__(self, step: int) -> list[int]:
        """Return the sample indices of batch ``step``, counted from 0 over all epochs."""
        if step < 0:
            raise IndexError(f"step: expected 0 or more, got {step}")
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        while len(self._order) < end:
            self._take(self._next_part())
        return list(self._order[first:end])

    def _next_part(self) -> int:
        parts = range(len(self._weights))
        return min(parts, key=lambda part: self._tokens[part] / self._weights[part])

    def _take(self, part: int) -> None:
        """Add the next sample of a source to the order."""
        number, position = divmod(self._taken[part], len(self._lengths[part]))
        if self._passes[part][0] != number:
            order = permutation(len(self._lengths[part]), f"{self._seed}/{part}/{number}")
            self._passes[part] = number, order
        sample = self._passes[part][1][position]
        self._order.append(self._firsts[part] + sample)
        self._taken[part] += 1
        self._tokens[part] += self._lengths[part][sample]


def plan_batches(
    train: Sequences, batch_size: int, seed: int, bucket: int
) -> BatchPlan | MixturePlan:
    """Return the order of the batches of a run."""
    if isinstance(train, Mixture):
        lengths = [part.lengths for part in train.parts]
        return MixturePlan(lengths, train.weights, batch_size, seed)
    return BatchPlan(len(train), batch_size, seed, lengths=train.lengths, window=bucket)
