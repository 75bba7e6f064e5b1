"""Entry point of training: a configuration in, a run directory with trained adapters out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fastadapt.adapter.files import adapter_digest, adapters_of
from fastadapt.data.mixtures import check_sources
from fastadapt.data.rendered import AUTO
from fastadapt.data.templates.auto_format import Choice, choose
from fastadapt.distributed.offload import group_of_one, offload
from fastadapt.distributed.ranks import ALONE, Ranks, joined
from fastadapt.distributed.sharding import shard
from fastadapt.errors import RunError, UserError
from fastadapt.models.pair import DTYPES, choose_device
from fastadapt.models.replacement import ModelPair, ReplacementModel
from fastadapt.models.self_check import check_packing, check_traversal
from fastadapt.models.sources.low_rank import share
from fastadapt.models.sources.pair_sources import Sources
from fastadapt.models.trained_files import initialise, read_initial
from fastadapt.organism import resolve
from fastadapt.training import run_dir
from fastadapt.training.checkpoint import Checkpoint, PassedOver, load_latest
from fastadapt.training.config import TrainConfig, check_dtype, load_config
from fastadapt.training.logs.sinks import open_sinks
from fastadapt.training.loop import TrainingRun
from fastadapt.training.planning.devices import this_device
from fastadapt.training.planning.estimate import with_policy
from fastadapt.training.planning.recompute import RecomputePlanner
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

    Under torchrun every rank calls this function. The model is sharded
    (:mod:`fastadapt.distributed.sharding`), and the ranks share each step's micro-batches. The
    result is that of one process, up to the order of sums. Only rank 0 writes files.

    Args:
        config: configuration of the run.
        resume: continue from the newest checkpoint in the folder.
        overwrite: remove the run in the folder first.
        sinks: called with every record of ``metrics.jsonl`` as it is written (on rank 0).
        stop: event that ends the run after the current step, set on any rank. In the main thread
            SIGTERM and the first SIGINT do the same; a second SIGINT interrupts.

    Returns:
        The summary, with ``interrupted: False``. For a stopped run: ``interrupted: True``,
        ``signal``, ``step``, ``steps``, ``checkpoint``, ``output``.

    Raises:
        UserError: an invalid value, model, data set or folder.
        RunError: no space, no memory, too many consecutive batches that are not finite, or the
            loss of another rank.
    """
    started = time.monotonic()
    check_dtype(config)
    sources = Sources.find(config.pair)
    sources.check_differ()
    config = dataclasses.replace(config, pair=sources.located()).located()
    device = choose_device(config.pair.device)
    config.adapter.check_runs(device, DTYPES[config.pair.dtype])
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with (
        joined(device, config.run.rank_timeout) as ranks,
        group_of_one(device, ranks) if config.pair.offload else nullcontext(),
        deterministic_algorithms() if config.run.deterministic else nullcontext(),
        stop_on_signals(stop) as (stopping, caught),
        _opened(config, ranks, resume=resume, overwrite=overwrite) as folder,
        open_sinks(config, folder) as more_sinks,
        lost_ranks_explained(config, ranks),
        out_of_memory_explained(config, ranks),
    ):
        check_shares(config, ranks)
        checkpoint, passed = (
            ranks.on_main(lambda: _find_checkpoint(folder)) if resume else (None, [])
        )
        config, reason = _with_family(config, folder, ranks, resume=resume)
        check_sources(config.data)  # before minutes of reading weights
        start = config.run.init_from if checkpoint is None else None
        origin = None if start is None else ranks.on_main(lambda: _origin(start, config))
        torch.manual_seed(config.run.seed)
        model, data = load_model_and_data(config, ranks, device, init_from=start)
        _check_same_data(data, ranks)
        check_traversal(model, data.first_batch())
        if config.data.pack is not None:
            check_packing(model, *data.packed_and_apart())
        resolved, planner = _with_policy(config, model, data, ranks)
        run = TrainingRun(resolved, folder, started, model, data, ranks, planner)
        if not resume:
            ranks.on_main(lambda: run_dir.start_afresh(folder, config))
        with closing(data), run.begin(checkpoint, [*sinks, *more_sinks], resume=resume):
            run.record_start(
                checkpoint, passed, resume=resume, no_template=reason, init_from=origin
            )
            run.evaluate_if_due(stopping)
            while run.step < run.steps and not ranks.any(stopping.is_set()):
                run.advance()
                run.save_if_due()
                run.evaluate_if_due(stopping)
            return run.finish() if run.done else run.interrupted(caught)


def _with_family(
    config: TrainConfig, folder: Path, ranks: Ranks, *, resume: bool
) -> tuple[TrainConfig, str | None]:
    """Return the configuration with the chat format for which ``data.family`` "auto" stands.

    A resumed run keeps its format, whatever the tokenizer's template is by now. Also return why
    the tokenizer's chat template is not that format.
    """
    if config.data.family != AUTO:
        return config, None

    def find() -> Choice:
        if resume:
            return Choice(load_config(folder / run_dir.CONFIG).data.family)
        sources = Sources.find(config.pair)
        sources.configs()  # a model that cannot be read is named before its tokenizer
        return choose(sources.tokenizer())

    family, reason = ranks.on_main(find)
    data = dataclasses.replace(config.data, family=family)
    return dataclasses.replace(config, data=data), reason


def _origin(start: str, config: TrainConfig) -> Record:
    """Check that the run can begin as the adapters of ``start``; return what its record says."""
    read_initial(start, config.adapter)
    return {"run": start, "adapter": adapter_digest(adapters_of(start))}


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let torch use deterministic algorithms only; an operation without one raises."""
    # Read by cuBLAS with its first product. https://docs.pytorch.org/docs/stable/notes/randomness.html
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    fills = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False  # costs time, and only finds faults
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fills


@contextmanager
def _opened(config: TrainConfig, ranks: Ranks, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Lock the run's folder on rank 0; yield the folder on all ranks."""
    opening = run_dir.open_run(config, resume=resume, overwrite=overwrite)
    with ExitStack() as stack:
        yield ranks.on_main(lambda: stack.enter_context(opening))


def check_shares(config: TrainConfig, ranks: Ranks) -> None:
    """Check that the ranks can share a step evenly; an error names settings with equal steps."""
    optimizer, n = config.optimizer, ranks.world
    if n > 1 and config.run.trains == "norms":
        raise UserError(
            "run.trains=norms needs a single process: the last norm lies outside the blocks that "
            "ranks shard. Start the run without torchrun"
        )
    if n > 1 and optimizer.low_memory:
        raise UserError(
            "optimizer.moments=8bit and optimizer.stochastic_rounding need a single process; omit "
            "them, since several ranks shard the master weights and moments already"
        )
    if optimizer.accumulation % n == 0:
        return
    size = optimizer.batch_size * optimizer.accumulation
    advice = (
        f"--optimizer.batch_size {size // n} --optimizer.accumulation {n} makes the same steps"
        if size % n == 0
        else f"a step has {size} sequences, which {n} ranks cannot share evenly"
    )
    raise UserError(
        f"optimizer.accumulation: {n} ranks share the batches of a step, so expected a "
        f"multiple of {n}, got {optimizer.accumulation}; {advice}"
    )


def _check_same_data(data: StepData, ranks: Ranks) -> None:
    """Check that all ranks read the same data."""
    if ranks.world > 1 and data.sha256 != ranks.on_main(lambda: data.sha256):
        raise UserError(
            f"data.train or data.validation holds other tokens on rank {ranks.rank} than on rank "
            "0: give every machine the same files"
        )


def load_model_and_data(
    config: TrainConfig,
    ranks: Ranks = ALONE,
    device: torch.device | None = None,
    init_from: str | None = None,
) -> tuple[ReplacementModel, StepData]:
    """Load the pair with new adapters, and the tokenized data.

    Args:
        config: configuration of the run.
        ranks: ranks that shard the model; rank 0 reads the weights.
        device: device of the run; needed with several ranks.
        init_from: run whose weights the adapters take; None: new ones. A resumed run has those of
            its checkpoint, and needs neither.
    """
    source = config.pair
    source = dataclasses.replace(source, target=resolve(source.target), base=resolve(source.base))

    def load(into: str | None, shared: Sequence[str] = ()) -> ReplacementModel:
        pair = ModelPair.load(source, into=None if into is None else torch.device(into))
        if pair.weights:  # they were read
            pair.check_mlps_differ()
        share(pair.target_mlps, pair.base_mlps, shared)
        model = ReplacementModel.create(pair, config.trained, seed=config.run.seed, runs_on=device)
        if init_from is not None and pair.weights:
            initialise(model, init_from, config.adapter)
        return model

    if ranks.world == 1:
        model = load("cpu" if source.offload else None)
        if source.offload:
            offload(model, device or choose_device(source.device))
        return model, _step_data(config, model, ranks)
    assert device is not None

    # Only rank 0 reads the weights. An error on rank 0 is raised on all ranks.
    loaded: list[ReplacementModel] = []
    ranks.on_main(lambda: loaded.append(load("cpu")))
    # Which weights agree bit for bit is known to rank 0 only.
    shared = ranks.on_main(lambda: loaded[0].pair.shared_mlps)
    model = loaded[0] if loaded else load("meta", shared)
    for name, digests in ranks.on_main(lambda: loaded[0].pair.fingerprints).items():
        setattr(model.pair, name, digests)
    shard(model, ranks, device, masters=config.optimizer.masters)
    return model, _step_data(config, model, ranks)


def _step_data(config: TrainConfig, model: ReplacementModel, ranks: Ranks) -> StepData:
    n_rows = model.model.get_input_embeddings().weight.shape[0]
    context = model.model.config.get_text_config().max_position_embeddings
    return StepData(config, model.pair.tokenizer, model.device, ranks, n_rows, context)


def _with_policy(
    config: TrainConfig, model: ReplacementModel, data: StepData, ranks: Ranks
) -> tuple[TrainConfig, RecomputePlanner | None]:
    """Resolve ``objective.checkpoint`` on all ranks, for the memory of rank 0's device."""
    device = ranks.on_main(lambda: this_device(model.device.type))
    return with_policy(config, model.model.config, data.largest_width, device, ranks.world)


def _find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[PassedOver]]:
    checkpoint, passed = load_latest(folder / run_dir.CHECKPOINTS)
    if checkpoint is None and passed:
        reasons = "; ".join(f"{each.path.name}: {each.reason}" for each in passed)
        raise RunError(
            f"no checkpoint in {folder / run_dir.CHECKPOINTS} is whole ({reasons}). "
            "Start again with --overwrite."
        )
    return checkpoint, passed
