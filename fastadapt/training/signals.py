"""What cuts a run short: signals, and memory that does not suffice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from fastadapt.distributed.ranks import Ranks, is_lost, lost_reason
from fastadapt.errors import RunError, UserError
from fastadapt.training.checkpoint import list_checkpoints
from fastadapt.training.config import TrainConfig
from fastadapt.training.run_dir import CHECKPOINTS

#: How torch's allocator for the CPU, which has no exception of its own, says that it got nothing.
_CPU_REFUSED = ("not enough memory", "can't allocate memory", "Cannot allocate memory")


@contextmanager
def stop_on_signals(stop: threading.Event | None) -> Iterator[tuple[threading.Event, list[str]]]:
    """Turn SIGTERM and the first SIGINT into an event; a second SIGINT interrupts as usual.

    Yields:
        The event (``stop``, if given) and a list to which names of caught signals are added. In
        another thread than the main one, which alone may catch signals, only the event.
    """
    event, caught = stop or threading.Event(), list[str]()
    if threading.current_thread() is not threading.main_thread():
        yield event, caught
        return

    def note(number: int, _: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        event.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event, caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def lost_ranks_explained(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Turn the failure to reach another rank into a :class:`RunError` that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or isinstance(error, RunError) or not is_lost(error):
            raise
        saved = list_checkpoints(Path(config.run.output).expanduser() / CHECKPOINTS)
        kept = f"The checkpoint of step {saved[-1][0]} is kept" if saved else "There is none yet"
        raise RunError(
            f"rank {ranks.rank} of {ranks.world} lost another one: a process of the run has ended, "
            f"or was out of reach for run.rank_timeout={config.run.rank_timeout} s "
            f"({lost_reason(error)}). torchrun's report says which ended, and how. "
            f"{kept}; the same command with --resume goes on from there, on any number of ranks."
        ) from error


@contextmanager
def out_of_memory_explained(config: TrainConfig) -> Iterator[None]:
    """Turn an allocation that failed into a :class:`RunError` with the plan and a way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, RunError) or not (known or _is_refusal(error)):
            raise
        raise RunError(_told(config, str(error))) from error


def _is_refusal(error: Exception) -> bool:
    return any(phrase in str(error) for phrase in _CPU_REFUSED)


def _told(config: TrainConfig, reason: str) -> str:
    from fastadapt.training.planning.estimate import gb, plan

    try:
        planned = plan(config)
        need = f"The plan is {gb(planned.peak_bytes)} at the peak: {planned.largest(4)}."
    except UserError as error:
        need = f"No plan could be made: {error}."
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    return (
        f"out of memory ({first}). {need} {free_memory()}. Lower data.max_tokens "
        f"({config.data.max_tokens}), optimizer.batch_size ({config.optimizer.batch_size}, with "
        "optimizer.accumulation in its stead) or objective.kl_chunk_tokens "
        f"({config.objective.kl_chunk_tokens})"
        + (f", or adapter.n_features ({config.n_features})" if config.n_features else "")
        + ("" if config.objective.checkpoint == "full" else ", set objective.checkpoint to full")
        + ("" if config.pair.dtype != "float32" else ", or set pair.dtype to bfloat16")
        + ". --resume goes on from the last checkpoint."
    )


def free_memory() -> str:
    """Say how much memory is free, of the GPU where there is one and of the host."""
    from fastadapt.training.planning.estimate import gb

    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    said = f"{gb(host)} of host memory are free"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{gb(free)} of {gb(total)} GPU memory and {said}"
    return said
