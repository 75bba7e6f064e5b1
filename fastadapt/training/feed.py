"""Which sequences a step sees, and the batches made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from fastadapt.batch import Batch
from fastadapt.data.batches import BatchPlan, collate
from fastadapt.data.sequences import Sequences, load_sequences
from fastadapt.organism import resolve
from fastadapt.training.config import TrainConfig
from fastadapt.training.plan import count_steps


class Feed:
    """Training and held-out data of a run. It has no state: a step's data follow from its number.

    Args:
        config: data, batch size, accumulation, epochs, seed.
        tokenizer: the pair's.
        device: where batches go.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, device: torch.device) -> None:
        data, self._config, self._device = config.data, config, device
        self.train = load_sequences(resolve(data.train), tokenizer, data, split="train")
        self.held_out = load_sequences(
            resolve(data.validation), tokenizer, data, split="validation"
        )
        self._pad = tokenizer.pad_token_id or 0
        self._order = BatchPlan(len(self.train), config.optimizer.batch_size, config.run.seed)
        self.steps = count_steps(self._order.n_batches, config)

    @cached_property
    def sha256(self) -> str:
        """Of the tokens and labels of both sets: what a resumed run must find again."""
        digest = hashlib.sha256()
        for data in (self.train, self.held_out):
            for i in range(len(data)):
                sample = data[i]
                digest.update(len(sample.input_ids).to_bytes(8, "little"))
                digest.update(sample.input_ids.numpy().tobytes())
                digest.update(sample.labels.numpy().tobytes())
        return digest.hexdigest()

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices into ``train`` of each micro-batch of a 0-based optimiser step."""
        optimizer = self._config.optimizer
        first = step * optimizer.accumulation
        last = min(first + optimizer.accumulation, self._order.n_batches * optimizer.epochs)
        return [self._order[i] for i in range(first, last)]

    def batch(self, data: Sequences, indices: Sequence[int]) -> tuple[Batch, int]:
        """The batch of these sequences on the device, and its tokens, counted on the host."""
        samples = [data[i] for i in indices]
        batch = collate(samples, self._pad)
        n_tokens = sum(sample.input_ids.numel() for sample in samples)
        if n_tokens == batch.input_ids.numel():
            batch = batch._replace(attention_mask=None)
        return batch.to(self._device), n_tokens

    def held_out_batches(self) -> Iterator[Batch]:
        """All held-out sequences in their order."""
        size = self._config.optimizer.batch_size
        for first in range(0, len(self.held_out), size):
            indices = range(first, min(first + size, len(self.held_out)))
            yield self.batch(self.held_out, indices)[0]

    def rows(self, indices: Sequence[int]) -> list[int]:
        """Places of training sequences in their source, counted from 0."""
        return [self.train.rows[i] for i in indices]
