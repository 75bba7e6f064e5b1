"""The training and held-out data of a run, by step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from fastadapt.batch import Batch
from fastadapt.data.batches import collate, cut, padded_width, padding_id
from fastadapt.data.mixtures import Mixture, load_held_out, load_training, plan_batches
from fastadapt.data.sequences import Sample, Sequences
from fastadapt.distributed.ranks import Ranks
from fastadapt.training.config import TrainConfig
from fastadapt.training.planning.estimate import count_steps
from fastadapt.training.prefetch import BatchPrefetcher, Collation, make_batch

#: Texts, and tokens of each, that are compared in and out of a packed row before the first step.
_CHECKED, _BEGINNING = 4, 256


class StepData:
    """Training and held-out batches of a run; a step's batches depend on its number only.

    Args:
        config: data, batch size, accumulation, epochs, seed.
        tokenizer: the pair's tokenizer.
        device: device of the batches.
        ranks: ranks of the run; this one prefetches its share of a step.
        n_rows: rows of the model's embedding.
        max_positions: tokens that the model can read; None: any number.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,
        device: torch.device,
        ranks: Ranks,
        n_rows: int,
        max_positions: int | None = None,
    ) -> None:
        data, self._config, self._device = config.data, config, device
        self.train = load_training(data, tokenizer, max_positions)
        self.held_out = load_held_out(data, tokenizer, max_positions)
        for data_of_split in (self.train, self.held_out):
            data_of_split.check_vocabulary(n_rows)
        self._how = Collation(
            padding_id(tokenizer, n_rows),
            data.multiple(device.type),
            # On a CPU transformers sums in another order without a mask.
            passes_mask=device.type != "cuda",
            pack=data.pack,
        )
        self._order = plan_batches(
            self.train, config.optimizer.batch_size, config.run.seed, data.bucket
        )
        self.steps = count_steps(self._order.n_batches, config)
        self._step = 0  # the last requested step
        self.prefetcher: BatchPrefetcher | None = None
        if data.workers:
            self.prefetcher = BatchPrefetcher(
                self.train,
                self._how,
                lambda step: [ids for ids, _ in ranks.shard(self._indices(step))],
                self.steps,
                workers=data.workers,
                pin=device.type == "cuda",
            )

    def close(self) -> None:
        """Stop the workers."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tokens and labels of both sets, which a resumed run must reproduce."""
        digest = hashlib.sha256()
        for data in (self.train, self.held_out):
            for i in range(len(data)):
                sample = data[i]
                digest.update(len(sample.input_ids).to_bytes(8, "little"))
                digest.update(sample.input_ids.numpy().tobytes())
                digest.update(sample.labels.numpy().tobytes())
        return digest.hexdigest()

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the indices into ``train`` of each micro-batch of a 0-based optimizer step."""
        self._step = step
        return self._indices(step)

    def _indices(self, step: int) -> list[list[int]]:
        optimizer = self._config.optimizer
        first = step * optimizer.accumulation
        last = min(first + optimizer.accumulation, self._order.n_batches * optimizer.epochs)
        return [self._order[i] for i in range(first, last)]

    def widths(self, micro_batches: list[list[int]]) -> list[int]:
        """Return the number of tokens per sequence of each micro-batch, with padding."""
        lengths = self.train.lengths
        return [self._width(max(lengths[i] for i in indices)) for indices in micro_batches]

    @property
    def largest_width(self) -> int:
        """Largest number of tokens per sequence of any batch, with padding."""
        return self._width(max(self.train.counts.longest, self.held_out.counts.longest))

    def _width(self, longest: int) -> int:
        return padded_width(longest, self._how.multiple)

    def batch(self, data: Sequences, indices: Sequence[int]) -> tuple[Batch, int]:
        """Return the batch of these sequences on the device, and its number of tokens."""
        prefetched = None
        if self.prefetcher is not None and data is self.train:
            prefetched = self.prefetcher.get(self._step, list(indices))
        how = self._how if data is self.train else self._how._replace(pack=None)
        batch, n_tokens = prefetched or make_batch(data, indices, how)
        if self._device.type == "cuda":
            batch = batch.pinned()
        return batch.to(self._device), n_tokens

    def first_batch(self) -> Batch:
        """Return the first training batch on the device, unpacked; the same on every rank."""
        how = self._how._replace(pack=None)
        return make_batch(self.train, self._order[0], how)[0].to(self._device)

    def packed_and_apart(self) -> tuple[Batch, Batch]:
        """Return the first texts' beginnings as two batches: two to a row, and one to a row."""
        samples = [
            Sample(index, ids[:_BEGINNING], labels[:_BEGINNING])
            for index, ids, labels in map(self.train.__getitem__, self._order[0][:_CHECKED])
        ]
        rows = cut(range(len(samples)), 2)
        packed, apart = (
            collate(samples, self._how.pad, rows=each)._replace(passes_mask=self._how.passes_mask)
            for each in (rows, None)
        )
        return packed.to(self._device), apart.to(self._device)

    def held_out_batches(self) -> Iterator[Batch]:
        """Yield batches of all held-out sequences in order."""
        size = self._config.optimizer.batch_size
        for first in range(0, len(self.held_out), size):
            indices = range(first, min(first + size, len(self.held_out)))
            yield self.batch(self.held_out, indices)[0]

    @property
    def held_out_source(self) -> dict[str, Any]:
        """Counts of the held-out data, as :meth:`sources` returns them for the training data."""
        return _counts_of(self.held_out)

    def rows(self, indices: Sequence[int]) -> list[int] | list[str]:
        """Return the 0-based rows of training sequences in their source, named for a mixture."""
        rows, train = [self.train.rows[i] for i in indices], self.train
        if not isinstance(train, Mixture):
            return rows
        sources = [train.parts[train.part_of(i)].source for i in indices]
        return [f"{source}: {row}" for source, row in zip(sources, rows, strict=True)]

    def sources(self, steps: int) -> list[dict[str, Any]]:
        """Return the counts of each training source, and its tokens in the first ``steps`` steps.

        ``weight`` is the share that the source was given, ``share`` the share that it had.
        """
        train = self.train
        parts = train.parts if isinstance(train, Mixture) else (train,)
        weights = train.weights if isinstance(train, Mixture) else (1.0,)
        trained = [0] * len(parts)
        if isinstance(train, Mixture):
            taken = [i for step in range(steps) for ids in self._indices(step) for i in ids]
            trained = train.tokens_of(taken)
        return [
            {
                **_counts_of(part),
                "weight": weight,
                **({"trained": n, "share": n / max(sum(trained), 1)} if len(parts) > 1 else {}),
            }
            for part, weight, n in zip(parts, weights, trained, strict=True)
        ]


def _counts_of(data: Sequences) -> dict[str, Any]:
    """Return the counts of a source's rows, with those that are left out or not read."""
    return {
        "source": data.source,
        **data.counts._asdict(),
        "bad_rows": dict(data.bad.counts),
        "examples": data.bad.examples,
        **({"unread": data.unread} if data.unread else {}),
    }
