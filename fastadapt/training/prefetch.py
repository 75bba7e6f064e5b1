"""Prefetching of batches by worker processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from fastadapt.batch import Batch
from fastadapt.data.batches import collate, pack_rows
from fastadapt.data.sequences import Sequences
from fastadapt.errors import RunError

_LOST = "DataLoader worker (pid"  # in torch's message for a killed worker only
_EACH = 4  # batches that each worker prefetches

#: A batch on the host, and the number of its tokens that are not padding.
CountedBatch = tuple[Batch, int]


class Collation(NamedTuple):
    """Settings with which sequences are collated into the batches of a run.

    Attributes:
        pad: token id at padding.
        multiple: number of tokens of which the width of a batch is a multiple.
        passes_mask: whether models get the attention mask (:class:`fastadapt.batch.Batch`).
        pack: largest width of rows with several texts, as ``data.pack``; None: a text a row.
    """

    pad: int
    multiple: int = 1
    passes_mask: bool = True
    pack: int | None = None


def make_batch(data: Sequences, indices: Sequence[int], how: Collation) -> CountedBatch:
    """Collate the sequences of the given indices into a batch on the host."""
    samples = [data[i] for i in indices]
    lengths = [sample.input_ids.numel() for sample in samples]
    rows = None if how.pack is None else pack_rows(lengths, how.pack, how.multiple)
    batch = collate(samples, how.pad, how.multiple, rows)._replace(passes_mask=how.passes_mask)
    return batch, sum(lengths)


class _Batches:
    """Data set of the workers: ``data[[3, 1]]`` is the batch of sequences 3 and 1."""

    def __init__(self, data: Sequences, how: Collation) -> None:
        self._data, self._how = data, how

    def __getitem__(self, indices: list[int]) -> CountedBatch:
        return make_batch(self._data, indices, self._how)


class _Entry(NamedTuple):
    step: int
    indices: list[int]


class BatchPrefetcher:
    """Prefetch the batches of the next steps.

    If a request is not for the next prefetched batch (a repeated or skipped step), :meth:`get`
    returns None and the caller collates the batch.

    Args:
        data: the sequences.
        how: how sequences are collated.
        micro_batches: returns the indices of each micro-batch of a step.
        steps: number of steps of the run.
        workers: number of processes, at least 1.
        pin: copy batches to pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self,
        data: Sequences,
        how: Collation,
        micro_batches: Callable[[int], list[list[int]]],
        steps: int,
        *,
        workers: int,
        pin: bool,
    ) -> None:
        self._batches = _Batches(data, how)
        self._micro_batches, self._steps = micro_batches, steps
        self._workers, self._pin = workers, pin
        self._loader: Iterator[CountedBatch] | None = None
        self._plan: Iterator[_Entry] = iter(())
        self._next: _Entry | None = None

    def get(self, step: int, indices: list[int]) -> CountedBatch | None:
        """Return the batch of these sequences if it was prefetched for this step, else None.

        Raises:
            RunError: a worker was killed.
        """
        if self._loader is None or (self._next is not None and self._next.step < step - 1):
            self._start(step)
        while self._next is not None and self._next.step < step:
            self._pop()
        return self._pop() if self._next == (step, indices) else None

    def close(self) -> None:
        """Stop the workers."""
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
            # A fork shares the sequences without a copy and without /dev/shm, which is small in
            # containers. Workers use neither the GPU nor a tokenizer.
            multiprocessing_context="fork",
        )
        with _without_signals(), _without_child_handler():
            self._loader = iter(loader)

    def _entries(self, step: int) -> Iterator[_Entry]:
        for n in range(step, self._steps):
            for indices in self._micro_batches(n):
                yield _Entry(n, indices)

    def _pop(self) -> CountedBatch:
        assert self._loader is not None
        try:
            batch = next(self._loader)
        except RuntimeError as error:
            if _LOST not in str(error):
                raise
            self.close()
            raise RunError(
                "a worker process of data.workers was killed, probably because memory ran out. "
                "Checkpoints are intact. Re-run the same command with --resume, if memory is short "
                "with --data.workers 0, which gives the same bits."
            ) from error
        self._next = next(self._plan, None)
        return batch


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _without_child_handler() -> Iterator[None]:
    """Restore the handler of SIGCHLD that torch replaces.

    Torch's handler raises at any point of a step, also in a backward pass. Without the handler, a
    killed worker is detected when its batch is requested.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


@contextmanager
def _without_signals() -> Iterator[None]:
    """Block SIGINT and SIGTERM in processes started inside the context.

    A terminal or a scheduler sends these signals to every process of a run. They request that the
    step is finished and saved, which needs the workers. The workers end with the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
