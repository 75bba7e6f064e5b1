"""Training run: its state, its step, its records and checkpoints.

A step is a pure function of weights, moments and step number, since the order of the data, the
cutoff and the learning rate follow from (seed, step). A killed and resumed run therefore writes the
same bits as an uninterrupted one, if the device repeats its results: a CPU with equal threads does,
a GPU with ``run.deterministic``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import cast

import torch

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.batch import Batch
from fastadapt.distributed.ranks import ALONE, Ranks
from fastadapt.distributed.sharding import whole_adapters
from fastadapt.errors import RunError
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import draw_cutoff, objective
from fastadapt.training import finalize, run_dir, state
from fastadapt.training.checkpoint import (
    Checkpoint,
    PassedOver,
    save_checkpoint,
    sweep,
)
from fastadapt.training.code_capacity import CapacityEstimator, overflow, takes_plans
from fastadapt.training.config import TrainConfig
from fastadapt.training.held_out import evaluate
from fastadapt.training.logs.metrics import (
    DeadFeatures,
    StepGatherer,
    StepReport,
    evaluation_record,
)
from fastadapt.training.optimizer import AdapterOptimizer, learning_rate
from fastadapt.training.planning.recompute import RecomputePlanner
from fastadapt.training.run_dir import MetricsLog, Record, Sink
from fastadapt.training.sparsity import SparsityWeight
from fastadapt.training.step_data import StepData

#: Steps over which the running threshold of batch_topk averages: this share of the run's steps, and
#: at most this number.
THRESHOLD_SHARE, THRESHOLD_STEPS = 0.02, 1000


def threshold_decay(steps: int) -> float:
    """Return the weight of the old threshold of batch_topk in each update of a run of ``steps``.

    The threshold must follow the weights until the learning rate has fallen, also in a short run.

    Example:
        >>> threshold_decay(600), threshold_decay(1_000_000)
        (0.9166666666666666, 0.999)
    """
    return 1 - 1 / min(max(THRESHOLD_SHARE * steps, 1), THRESHOLD_STEPS)


class TrainingRun:
    """A training run: models, data, optimizer, counters, log."""

    log: MetricsLog

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        started: float,
        model: ReplacementModel,
        feed: StepData,
        ranks: Ranks = ALONE,
        recompute: RecomputePlanner | None = None,
    ) -> None:
        #: Chooses what each layer saves; None: ``objective.checkpoint`` of ``config``.
        self.recompute = recompute
        self.config, self.folder, self.started = config, folder, started
        self.model, self.feed, self.ranks = model, feed, ranks
        self.steps = feed.steps
        self.threshold_decay = threshold_decay(feed.steps)
        self.model.adapters.train()
        named = dict(self.model.adapters.named_parameters())
        self.optimizer = AdapterOptimizer(named, config.optimizer, config.adapter.lowest_threshold)
        sparse, kernel = config.n_features > 0, config.adapter.implementation
        shape = (self.model.n_layers, self.model.n_features) if sparse else (0,)
        self.dead = DeadFeatures(shape, config.run.dead_window, self.model.device)
        self.planner = CapacityEstimator(sparse and takes_plans(kernel, self.model.device.type))
        self.sparsity = SparsityWeight(config.objective, config.optimizer, self.steps)
        self.step = 0
        self.tokens = 0
        self.bad_in_row = 0
        self.bad_total = 0
        self.wall_before = 0.0
        self._since_log = [0, 0.0]  # tokens, seconds
        self._evaluation: Record = {}
        self._saved: Path | None = None  # the checkpoint of this step

    # --- before and after the loop ----------------------------------------------------------------

    def begin(
        self,
        checkpoint: Checkpoint | None,
        sinks: Sequence[Sink],
        *,
        resume: bool,
    ) -> MetricsLog:
        """Restore the state of ``checkpoint``; return the open log, which the caller closes."""
        path = self.folder / run_dir.METRICS
        swept: list[Path] = []
        if resume:
            self.ranks.on_main(lambda: run_dir.sweep(self.folder))
            swept = self.ranks.on_main(lambda: sweep(self.folder / run_dir.CHECKPOINTS))
            if checkpoint is not None:
                state.restore(self, checkpoint)
                self._saved = checkpoint.path
            last = self.step if checkpoint else -1
            self.ranks.on_main(lambda: run_dir.drop_records_after(path, last))
        self.log = run_dir.open_log(path, sinks, self.ranks)
        self._swept = len(swept)
        return self.log

    def record_start(
        self,
        checkpoint: Checkpoint | None,
        passed: list[PassedOver],
        *,
        resume: bool,
        no_template: str | None = None,
        init_from: Record | None = None,
    ) -> None:
        """Write the first records of a run, or of its resumption from ``checkpoint``.

        Args:
            checkpoint: newest checkpoint of the run.
            passed: damaged checkpoints.
            resume: the run is resumed.
            no_template: why the tokenizer's chat template is not the chat format.
            init_from: ``run`` and ``adapter``, the digest, of the adapters that the run began as.
        """
        if not self.log.has("start", 0):
            facts = state.facts(self)
            if no_template is not None:
                facts |= {"family": self.config.data.family, "no_template": no_template}
            if init_from is not None:
                facts["init_from"] = init_from
            self.log.write("start", 0, **facts)
        if resume:
            self.log.write(
                "resume",
                self.step,
                steps=self.steps,
                checkpoint=self._relative(checkpoint.path) if checkpoint else None,
                passed_over=[{"path": self._relative(p.path), "reason": p.reason} for p in passed],
                unfinished_saves_removed=self._swept,
                threads=torch.get_num_threads(),
                ranks=self.ranks.world,
                wall_s=self.wall_s,
            )
            if checkpoint is not None and not self.log.has("checkpoint", self.step):
                self._record_checkpoint(checkpoint.path)

    def interrupted(self, signals: list[str]) -> Record:
        """Save a checkpoint and return the record of an interrupted run."""
        path = self._saved or self._save()
        return {
            "interrupted": True,
            "signal": signals[0] if signals else None,
            "step": self.step,
            "steps": self.steps,
            "checkpoint": str(path),
            "output": str(self.folder),
            "wall_s": self.wall_s,
        }

    def finish(self) -> Record:
        """Write the adapters, the summary and the report."""
        adapters = whole_adapters(self.model)
        counts = {
            "steps": self.steps,
            "tokens": self.tokens,
            "dead_per_layer": self.dead.per_layer().tolist(),
            "dead_window": self.config.run.dead_window,
            "bad_batches": self.bad_total,
            "wall_s": self.wall_s,
            **self._mixed(),
        }
        about = self.folder, self.config, self.model.pair
        return self.ranks.on_main(lambda: finalize.write(*about, adapters, counts))

    def _mixed(self) -> Record:
        """Return the tokens of each source of a mixture; nothing for a single source."""
        sources = self.feed.sources(self.steps)
        names = ("source", "weight", "trained", "share")
        mixed = [{name: source[name] for name in names} for source in sources[1:] and sources]
        return {"sources": mixed} if mixed else {}

    # --- one step ---------------------------------------------------------------------------------

    def advance(self) -> None:
        """Run one optimizer step: forward and backward of its micro-batches, then the update.

        If a layer has more codes than its buffers hold, the gradient is discarded and the step is
        repeated.
        """
        began = time.monotonic()
        micro_batches = self.feed.micro_batches(self.step)
        cutoff = draw_cutoff(
            self.model.n_layers, self.config.objective, self.config.run.seed, self.step
        )
        weight = self.sparsity.value(self.step)
        given = micro_batches, cutoff, weight
        gathered, norm, report = self._gradient(*given, self.planner.expected)
        if overflowed := overflow(report.calls):
            self.optimizer.discard()
            self.log.write("replan", self.step + 1, **overflowed, wall_s=self.wall_s)
            gathered, norm, report = self._gradient(*given, None)
        rate = learning_rate(self.step, self.steps, self.config.optimizer)
        self.step += 1
        self._saved = None
        if not report.finite:
            self._skip(report, micro_batches)
            return
        self.optimizer.step(rate, norm)
        self.planner.applied(report.calls)
        self.sparsity.applied(self.step - 1, report.l0_per_layer, gathered.tokens)
        if self.config.adapter.activation == "batch_topk":
            for adapter, value in zip(self.model.adapters, gathered.min_active(), strict=True):
                cast(TranscoderAdapter, adapter).update_threshold(value, self.threshold_decay)
        self.bad_in_row = 0
        self.tokens += gathered.tokens
        self._since_log[0] += gathered.tokens
        self._since_log[1] += time.monotonic() - began
        if self.step % self.config.run.log_every == 0 or self.step in (1, self.steps):
            self._record_step(report, rate, cutoff, weight)

    def _gradient(
        self,
        micro_batches: list[list[int]],
        cutoff: int,
        sparsity: float,
        expected: list[float] | None,
    ) -> tuple[StepGatherer, torch.Tensor, StepReport]:
        """Sum the gradient over micro-batches; return its metrics, its norm and the step's report.

        ``expected``: codes per token by layer, from which buffers are sized; None: unbounded.
        """
        gathered = StepGatherer(self.ranks)
        n_sequences = sum(map(len, micro_batches))
        shares = [(ids, n * len(ids) / n_sequences) for ids, n in self.ranks.shard(micro_batches)]
        # All batches first: a copy to the device waits for the device's queued work.
        batches = [self.feed.batch(self.feed.train, ids) for ids, _ in shares]
        policies = self._policies(micro_batches, cutoff, expected)
        for (_, weight), (batch, tokens), saved in zip(shares, batches, policies, strict=True):
            fixed = self.model, batch, cutoff, self.config.objective
            out = objective(*fixed, expected, policies=saved, sparsity=sparsity)
            (out.loss * weight).backward()
            gathered.add(out, weight, tokens)
        gathered.combine(len(micro_batches))
        norm = self.optimizer.gradient_norm()
        self.dead.update(gathered.fired(), gathered.tokens, gathered.valid(norm))
        return gathered, norm, gathered.report(norm, self.dead.per_layer())

    def _policies(
        self, micro_batches: list[list[int]], cutoff: int, expected: list[float] | None
    ) -> list[tuple[str, ...] | None]:
        """Return what each layer saves in each of this rank's micro-batches; None: as configured.

        Ranks gather each other's shards layer by layer, so all take the policies of the longest of
        the micro-batches that they run at the same time.
        """
        starts = range(0, len(micro_batches), self.ranks.world)
        if self.recompute is None:
            return [None] * len(starts)
        widths = self.feed.widths(micro_batches)
        together = [max(widths[i : i + self.ranks.world]) for i in starts]
        return [self.recompute.policies(width, cutoff, expected) for width in together]

    def _skip(self, report: StepReport, micro_batches: list[list[int]]) -> None:
        """Discard a gradient that is not finite and record the rows of its batches."""
        self.optimizer.discard()
        self.bad_in_row += 1
        self.bad_total += 1
        culprits = [micro_batches[i] for i in report.broken]
        reason = "loss" if culprits else "gradient"
        rows = self.feed.rows([i for ids in culprits or micro_batches for i in ids])
        self.log.write(
            "bad_batch",
            self.step,
            ids=rows,
            reason=f"{reason} is not finite",
            in_row=self.bad_in_row,
            wall_s=self.wall_s,
        )
        if self.bad_in_row >= self.config.run.max_bad_batches:
            raise RunError(
                f"step {self.step}: {self.bad_in_row} batches in a row gave a {reason} that is not "
                f"finite (run.max_bad_batches={self.config.run.max_bad_batches}); the last one "
                f"holds rows {rows} of {self.feed.train.source}. No update was made with them. "
                "Check these rows or lower optimizer.lr, and start again with --overwrite: a "
                "resumed run keeps its data and its rate. To go on without these rows, re-run with "
                "--resume and a larger --run.max_bad_batches."
            )

    # --- records, evaluations, checkpoints --------------------------------------------------------

    @property
    def wall_s(self) -> float:
        """Wall-clock seconds of this run, including those before a resume."""
        return self.wall_before + time.monotonic() - self.started

    def _record_step(self, report: StepReport, rate: float, cutoff: int, weight: float) -> None:
        tokens, seconds = self._since_log
        self._since_log = [0, 0.0]
        self.log.write(
            "train",
            self.step,
            **report.terms,
            l0_per_layer=report.l0_per_layer,
            dead_per_layer=report.dead_per_layer,
            lr=rate,
            grad_norm=report.grad_norm,
            cutoff=cutoff,
            **self.sparsity.record(weight),
            tokens=self.tokens,
            tokens_per_s=tokens / max(seconds, 1e-9),
            wall_s=self.wall_s,
        )

    @property
    def done(self) -> bool:
        """Whether all steps and the last evaluation are finished."""
        return self.step == self.steps and self.log.has("eval", self.steps)

    def evaluate_if_due(self, stopping: Event) -> None:
        """Evaluate before the first step, after the last, and every ``eval_every`` in between.

        A stopped evaluation leaves no record; resuming repeats it.
        """
        every = self.config.run.eval_every
        due = self.step in (0, self.steps) or (every and self.step % every == 0)
        if not due or self.log.has("eval", self.step):
            return
        chunk = self.config.objective.kl_chunk_tokens
        try:
            batches = self._held_out_batches(stopping)
            values = evaluate(self.model, batches, chunk_tokens=chunk, ranks=self.ranks)
        except _StoppedError:
            return
        self.log.write(
            "eval",
            self.step,
            **evaluation_record(values),
            **self.sparsity.record(self.sparsity.value(self.step)),
            tokens=self.tokens,
            wall_s=self.wall_s,
        )

    def _held_out_batches(self, stopping: Event) -> Iterator[Batch]:
        for batch in self.feed.held_out_batches():
            if self.ranks.any(stopping.is_set()):
                raise _StoppedError
            yield batch

    def save_if_due(self) -> None:
        """Save every ``checkpoint_every`` steps and after the last."""
        if self.step % self.config.run.checkpoint_every == 0 or self.step == self.steps:
            self._save()

    def _save(self) -> Path:
        self.log.sync()
        tensors, scalars = state.capture(self)
        path = save_checkpoint(
            self.folder / run_dir.CHECKPOINTS,
            self.step,
            tensors,
            scalars,
            keep=self.config.run.keep_checkpoints,
            ranks=self.ranks,
        )
        self._saved = path
        self._record_checkpoint(path)
        return path

    def _record_checkpoint(self, path: Path) -> None:
        self.log.write("checkpoint", self.step, path=self._relative(path), wall_s=self.wall_s)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


class _StoppedError(Exception):
    """Raised inside an evaluation when the run is asked to stop."""
