"""Training: from a configuration to a run directory with trained adapters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from threading import Event

import torch

from fastadapt.distributed.offload import group_of_one, offload
from fastadapt.distributed.ranks import ALONE, Ranks, joined
from fastadapt.distributed.sharding import shard
from fastadapt.errors import RunError, UserError
from fastadapt.models.pair import DTYPES, choose_device
from fastadapt.models.replacement import ModelPair, ReplacementModel
from fastadapt.models.self_check import check_traversal
from fastadapt.organism import resolve
from fastadapt.training import run_dir
from fastadapt.training.checkpoint import Checkpoint, PassedOver, load_latest
from fastadapt.training.config import TrainConfig
from fastadapt.training.logs.sinks import open_sinks
from fastadapt.training.loop import TrainingRun
from fastadapt.training.planning.devices import this_device
from fastadapt.training.planning.estimate import with_policy
from fastadapt.training.run_dir import Record, Sink
from fastadapt.training.signals import (
    lost_ranks_explained,
    out_of_memory_explained,
    stop_on_signals,
)
from fastadapt.training.step_data import StepData


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    sinks: Sequence[Sink] = (),
    stop: Event | None = None,
) -> Record:
    """Train adapters as configured, into the folder ``config.run.output``.

    Under torchrun every rank calls this function: the model is sharded
    (:mod:`fastadapt.distributed.sharding`) and each step's micro-batches are dealt to the ranks.
    The result is that of one process, up to the order of sums. Rank 0 alone writes.

    Args:
        config: configuration of the run.
        resume: continue from the newest checkpoint in the folder.
        overwrite: remove the run in the folder first.
        sinks: called with every record of ``metrics.jsonl`` as it is written (on rank 0).
        stop: set it on any rank to end after the current step. SIGTERM and the first SIGINT do the
            same when called in the main thread; a second SIGINT interrupts.

    Returns:
        The summary, with ``interrupted: False``. For a stopped run: ``interrupted: True``,
        ``signal``, ``step``, ``steps``, ``checkpoint``, ``output``; ``resume`` continues there.

    Raises:
        UserError: an invalid value, model, data set or folder.
        RunError: no space, no memory, too many consecutive batches that are not finite, or the
            loss of another rank.
    """
    started = time.monotonic()
    device = choose_device(config.pair.device)
    config.adapter.check_runs(device, DTYPES[config.pair.dtype])
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with (
        joined(device, config.run.rank_timeout) as ranks,
        group_of_one(device, ranks) if config.pair.offload else nullcontext(),
        stop_on_signals(stop) as (stopping, caught),
        _opened(config, ranks, resume=resume, overwrite=overwrite) as folder,
        open_sinks(config, folder) as more_sinks,
        lost_ranks_explained(config, ranks),
        out_of_memory_explained(config),
    ):
        _check_shares(config, ranks)
        checkpoint, passed = (
            ranks.on_main(lambda: _find_checkpoint(folder)) if resume else (None, [])
        )
        torch.manual_seed(config.run.seed)
        model, feed = load_model_and_data(config, ranks, device)
        _check_same_data(feed, ranks)
        check_traversal(model, feed.first_batch())
        run = TrainingRun(
            _with_policy(config, model, feed, ranks), folder, started, model, feed, ranks
        )
        if not resume:
            ranks.on_main(lambda: run_dir.start_afresh(folder, config))
        with closing(feed), run.begin(checkpoint, [*sinks, *more_sinks], resume=resume):
            run.record_start(checkpoint, passed, resume=resume)
            run.evaluate_if_due(stopping)
            while run.step < run.steps and not ranks.any(stopping.is_set()):
                run.advance()
                run.save_if_due()
                run.evaluate_if_due(stopping)
            return run.finish() if run.done else run.interrupted(caught)


@contextmanager
def _opened(config: TrainConfig, ranks: Ranks, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Open the run's folder, which rank 0 locks."""
    opening = run_dir.open_run(config, resume=resume, overwrite=overwrite)
    with ExitStack() as stack:
        yield ranks.on_main(lambda: stack.enter_context(opening))


def _check_shares(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse steps that the ranks cannot share evenly; the message suggests equal settings."""
    optimizer, n = config.optimizer, ranks.world
    if n > 1 and config.run.trains == "norms":
        raise UserError(
            "run.trains norms is for one process: the last norm lies outside the blocks that "
            "ranks shard"
        )
    if n > 1 and optimizer.low_memory:
        raise UserError(
            "optimizer.moments 8bit and optimizer.stochastic_rounding are for one process; several "
            "ranks shard masters and moments already"
        )
    if optimizer.accumulation % n == 0:
        return
    size = optimizer.batch_size * optimizer.accumulation
    same = (
        f"--optimizer.batch_size {size // n} --optimizer.accumulation {n} makes the same steps"
        if size % n == 0
        else f"a step has {size} sequences, which {n} ranks cannot share evenly"
    )
    raise UserError(
        f"optimizer.accumulation: a step's batches are dealt to {n} ranks, so expected a "
        f"multiple of {n}, got {optimizer.accumulation}; {same}"
    )


def _check_same_data(feed: StepData, ranks: Ranks) -> None:
    """Refuse ranks that read different data."""
    if ranks.world > 1 and feed.sha256 != ranks.on_main(lambda: feed.sha256):
        raise UserError(
            f"data.train or data.validation holds other tokens on rank {ranks.rank} than on rank "
            "0: give every machine the same files"
        )


def load_model_and_data(
    config: TrainConfig, ranks: Ranks = ALONE, device: torch.device | None = None
) -> tuple[ReplacementModel, StepData]:
    """Load the pair with new adapters, and the tokenized data.

    Args:
        config: configuration of the run.
        ranks: ranks that shard the model; rank 0 reads the weights.
        device: device of the run; needed with several ranks.
    """
    source = config.pair
    source = dataclasses.replace(source, target=resolve(source.target), base=resolve(source.base))

    def load(into: str | None) -> ReplacementModel:
        pair = ModelPair.load(source, into=None if into is None else torch.device(into))
        return ReplacementModel.create(pair, config.trained, seed=config.run.seed, runs_on=device)

    if ranks.world == 1:
        model = load("cpu" if source.offload else None)
        if source.offload:
            offload(model, device or choose_device(source.device))
        return model, _feed(config, model)
    assert device is not None

    # Rank 0 alone reads the weights; an error in them is raised on all ranks.
    loaded: list[ReplacementModel] = []
    ranks.on_main(lambda: loaded.append(load("cpu")))
    model = loaded[0] if loaded else load("meta")
    shard(model, ranks, device, masters=config.optimizer.masters)
    return model, _feed(config, model)


def _feed(config: TrainConfig, model: ReplacementModel) -> StepData:
    n_rows = model.model.get_input_embeddings().weight.shape[0]
    return StepData(config, model.pair.tokenizer, model.device, n_rows)


def _with_policy(
    config: TrainConfig, model: ReplacementModel, feed: StepData, ranks: Ranks
) -> TrainConfig:
    """Return ``config`` with the checkpointing policy that fits this machine's memory."""
    longest = max(feed.train.counts.longest, feed.held_out.counts.longest)
    device = this_device(model.device.type)
    return with_policy(config, model.model.config, longest, device, ranks.world)


def _find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[PassedOver]]:
    checkpoint, passed = load_latest(folder / run_dir.CHECKPOINTS)
    if checkpoint is None and passed:
        reasons = "; ".join(f"{each.path.name}: {each.reason}" for each in passed)
        raise RunError(
            f"no checkpoint in {folder / run_dir.CHECKPOINTS} is whole ({reasons}). "
            "Start again with --overwrite."
        )
    return checkpoint, passed
