"""Batches made before they are asked for, by worker processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from fastadapt.batch import Batch
from fastadapt.data.batches import collate
from fastadapt.data.sequences import Sequences
from fastadapt.errors import RunError

_LOST = "DataLoader worker (pid"  # in torch's message; that of an exception in a worker has none
_EACH = 4  # batches that each worker is ahead

Made = tuple[Batch, int]
"""A batch on the host, and its tokens that are not padding."""


def make_batch(data: Sequences, indices: Sequence[int], pad: int) -> Made:
    """The batch of these sequences."""
    samples = [data[i] for i in indices]
    return collate(samples, pad), sum(sample.input_ids.numel() for sample in samples)


class _Batches:
    """What workers are given: ``data[[3, 1]]`` is the batch of sequences 3 and 1."""

    def __init__(self, data: Sequences, pad: int) -> None:
        self._data, self._pad = data, pad

    def __getitem__(self, indices: list[int]) -> Made:
        return make_batch(self._data, indices, self._pad)


class _Entry(NamedTuple):
    step: int
    indices: list[int]


class Ahead:
    """The batches of the steps to come.

    What is asked for decides what is given: where it is not what was made ahead (a step made a
    second time, another step), ``take`` returns None and the caller makes it himself. A worker that
    was killed is a ``RunError`` of ``take``.

    Args:
        data: the sequences.
        pad: token id at padding.
        micro_batches: indices of each micro-batch of a step.
        steps: of the run.
        workers: processes, at least 1.
        pin: whether batches are copied to pinned memory, from which a GPU reads by itself.
    """

    def __init__(
        self,
        data: Sequences,
        pad: int,
        micro_batches: Callable[[int], list[list[int]]],
        steps: int,
        *,
        workers: int,
        pin: bool,
    ) -> None:
        self._batches = _Batches(data, pad)
        self._micro_batches, self._steps = micro_batches, steps
        self._workers, self._pin = workers, pin
        self._loader: Iterator[Made] | None = None
        self._plan: Iterator[_Entry] = iter(())
        self._next: _Entry | None = None

    def take(self, step: int, indices: list[int]) -> Made | None:
        """The batch of these sequences, if it was made ahead for this step."""
        if self._loader is None or (self._next is not None and self._next.step < step - 1):
            self._start(step)
        while self._next is not None and self._next.step < step:
            self._give()
        return self._give() if self._next == (step, indices) else None

    def close(self) -> None:
        """End the workers."""
        shut_down = getattr(self._loader, "_shutdown_workers", None)
        self._loader, self._next = None, None
        if shut_down is not None:
            shut_down()

    def _start(self, step: int) -> None:
        self.close()
        self._plan = self._entries(step)
        self._next = next(self._plan, None)
        loader: DataLoader[Any] = DataLoader(
            self._batches,  # type: ignore[arg-type]  # not a Dataset: indexed by lists of indices
            batch_size=None,
            sampler=(entry.indices for entry in self._entries(step)),
            num_workers=self._workers,
            collate_fn=_unchanged,
            pin_memory=self._pin,
            prefetch_factor=_EACH,
            # A fork shares the sequences without a copy, and without room in /dev/shm, of which
            # containers have little. Workers touch neither the GPU nor a tokenizer.
            multiprocessing_context="fork",
        )
        with _without_signals(), _without_child_handler():
            self._loader = iter(loader)

    def _entries(self, step: int) -> Iterator[_Entry]:
        for n in range(step, self._steps):
            for indices in self._micro_batches(n):
                yield _Entry(n, indices)

    def _give(self) -> Made:
        assert self._loader is not None
        try:
            made = next(self._loader)
        except RuntimeError as error:
            if _LOST not in str(error):
                raise
            self.close()
            raise RunError(
                "a process that makes batches (data.workers) was killed, by the system perhaps, "
                "which is short of memory. Checkpoints are intact: go on with --resume; "
                "--data.workers 0 does without such processes, and gives the same bits."
            ) from error
        self._next = next(self._plan, None)
        return made


def _unchanged(made: Any) -> Any:
    return made


@contextmanager
def _without_child_handler() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD out: it raises wherever a step is, also in a backward pass.

    That a worker was killed is seen all the same, at the place where its batch is waited for.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


@contextmanager
def _without_signals() -> Iterator[None]:
    """What is started here never sees SIGINT and SIGTERM; this process sees them afterwards.

    A terminal or a scheduler sends them to every process of a run, and they mean: finish the step
    and save, for which the workers are needed. They end with the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
