"""Early ends of a run: signals, unreachable ranks, and insufficient memory."""

from __future__ import annotations

import dataclasses
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

#: Messages of torch's CPU allocator, which raises a plain RuntimeError.
_CPU_REFUSED = ("not enough memory", "can't allocate memory", "Cannot allocate memory")


@contextmanager
def stop_on_signals(stop: threading.Event | None) -> Iterator[tuple[threading.Event, list[str]]]:
    """Turn SIGTERM and the first SIGINT into an event; a second SIGINT interrupts as usual.

    Yields:
        The event (``stop``, if given) and a list to which names of caught signals are added. Only
        the main thread can catch signals; in another thread the list stays empty.
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
    """Turn the failure to reach another rank into a :class:`RunError` that says how to resume."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or isinstance(error, RunError) or not is_lost(error):
            raise
        saved = list_checkpoints(Path(config.run.output).expanduser() / CHECKPOINTS)
        newest = f"step {saved[-1][0]}" if saved else "the start, since no checkpoint was saved"
        raise RunError(
            f"rank {ranks.rank} of {ranks.world} lost another rank: a process of the run has "
            f"ended, or was unreachable for run.rank_timeout={config.run.rank_timeout} s "
            f"({lost_reason(error)}). torchrun's report names the process and its exit code. "
            f"Re-run the same command with --resume to continue from {newest}, on any number of "
            "ranks."
        ) from error


@contextmanager
def out_of_memory_explained(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """Turn a failed allocation into a :class:`RunError` with the memory plan and remedies."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, RunError) or not (known or _is_refusal(error)):
            raise
        raise RunError(_memory_message(config, str(error), ranks)) from error


def _is_refusal(error: Exception) -> bool:
    return any(phrase in str(error) for phrase in _CPU_REFUSED)


def _memory_message(config: TrainConfig, reason: str, ranks: Ranks) -> str:
    from fastadapt.training.planning.estimate import gb, plan

    # A resumed run no longer needs the run that it began as.
    alone = dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=None))
    try:
        planned = plan(alone, gpus=ranks.world, timed=False)  # no memory is left to time products
        each = f" of each of {ranks.world} devices" if ranks.world > 1 else ""
        need = f"The planned peak{each} is {gb(planned.peak_bytes)}: {planned.largest(4)}."
    except UserError as error:
        need = f"The memory could not be planned: {error}."
    first = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
    free = [] if config.objective.checkpoint == "full" else ["--objective.checkpoint full"]
    if torch.cuda.is_available() and ranks.world == 1 and not config.pair.offload:
        free.append("--pair.offload true")
    resumed = (
        f"To go on from the last checkpoint, re-run with --resume and {' or '.join(free)}. "
        if free
        else ""
    )
    free_features = config.n_features and config.run.init_from is None
    return (
        f"out of memory ({first}). {need} {free_memory()}. {resumed}To need less from the first "
        "step, start again with --overwrite and lower data.max_tokens "
        f"({config.data.max_tokens}), optimizer.batch_size ({config.optimizer.batch_size}; raise "
        "optimizer.accumulation to keep the steps) or objective.kl_chunk_tokens "
        f"({config.objective.kl_chunk_tokens})"
        + (f", or adapter.n_features ({config.n_features})" if free_features else "")
        + ("" if config.pair.dtype != "float32" else ", or set pair.dtype to bfloat16")
        + "."
    )


def free_memory() -> str:
    """Return a sentence on the free memory of the host and, if present, of the GPU."""
    from fastadapt.training.planning.estimate import gb

    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{gb(host)} of host memory are free"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{gb(free)} of {gb(total)} GPU memory and {text}"
    return text
