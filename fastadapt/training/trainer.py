"""From a configuration to a run directory with trained adapters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from threading import Event

import torch

from fastadapt.errors import RunError
from fastadapt.models import ModelPair, ReplacementModel
from fastadapt.organism import resolve
from fastadapt.pair import DTYPES, choose_device
from fastadapt.training import rundir
from fastadapt.training.checkpoint import Checkpoint, PassedOver, load_latest
from fastadapt.training.config import TrainConfig
from fastadapt.training.feed import Feed
from fastadapt.training.gpus import this_device
from fastadapt.training.interrupt import out_of_memory_explained, stop_on_signals
from fastadapt.training.loop import Run
from fastadapt.training.plan import with_policy
from fastadapt.training.rundir import Record, Sink
from fastadapt.training.sinks import open_sinks


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    sinks: Sequence[Sink] = (),
    stop: Event | None = None,
) -> Record:
    """Train adapters as configured, into the folder ``config.run.output``.

    Args:
        config: everything the run depends on.
        resume: go on from the newest checkpoint of the run in that folder.
        overwrite: remove the run in that folder first.
        sinks: called with every record of ``metrics.jsonl``, as it is written.
        stop: set it to end after the step in progress. SIGTERM and the first SIGINT do the same
            where this is called in the main thread; a second SIGINT interrupts.

    Returns:
        The summary, with ``interrupted: False``. If the run was told to stop: ``interrupted:
        True``, ``signal``, ``step``, ``steps``, ``checkpoint``, ``output``; resume goes on there.

    Raises:
        UserError: a value, a model, a data set or the folder is not as it must be.
        RunError: no space, no memory, or too many batches in a row that are not finite.
    """
    started = time.monotonic()
    config.adapter.check_runs(choose_device(config.pair.device), DTYPES[config.pair.dtype])
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with (
        stop_on_signals(stop) as (stopping, caught),
        rundir.open_run(config, resume=resume, overwrite=overwrite) as folder,
        open_sinks(config, folder) as more_sinks,
        out_of_memory_explained(config),
    ):
        checkpoint, passed = _find_checkpoint(folder) if resume else (None, [])
        torch.manual_seed(config.run.seed)
        model, feed = _load(config)
        run = Run(_with_policy(config, model, feed), folder, started, model, feed)
        if not resume:
            rundir.start_afresh(folder, config)
        run.begin(checkpoint, passed, [*sinks, *more_sinks], resume=resume)
        with closing(feed), run.log:
            run.evaluate_if_due(stopping)
            while run.step < run.steps and not stopping.is_set():
                run.advance()
                run.save_if_due()
                run.evaluate_if_due(stopping)
            return run.finish() if run.done else run.interrupted(caught)


def _load(config: TrainConfig) -> tuple[ReplacementModel, Feed]:
    """Models with fresh adapters, and the data in the pair's tokens."""
    source = config.pair
    pair = ModelPair.load(
        dataclasses.replace(source, target=resolve(source.target), base=resolve(source.base))
    )
    feed = Feed(config, pair.tokenizer, next(pair.base_mlps.parameters()).device)
    return ReplacementModel.create(pair, config.adapter, seed=config.run.seed), feed


def _with_policy(config: TrainConfig, model: ReplacementModel, feed: Feed) -> TrainConfig:
    """``config`` with the checkpointing policy that fits this machine; every policy, same bits."""
    longest = max(feed.train.counts.longest, feed.held_out.counts.longest)
    return with_policy(config, model.model.config, longest, this_device(model.device.type))


def _find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[PassedOver]]:
    checkpoint, passed = load_latest(folder / rundir.CHECKPOINTS)
    if checkpoint is None and passed:
        told = "; ".join(f"{each.path.name}: {each.reason}" for each in passed)
        raise RunError(
            f"no checkpoint in {folder / rundir.CHECKPOINTS} is whole ({told}). "
            "Start again with --overwrite."
        )
    return checkpoint, passed
