"""Time whole training steps of this library and the plain step, with random weights of real shapes.

A step consists of forward, backward, clipping and update; this library's step also includes the
report that the trainer reads before the update. Both steps are first compared
(:mod:`benchmarks.step_check`). A row is right if its reports have finite losses and gradients, and
no layer has more codes than planned. The plain step recomputes its blocks (gradient checkpointing),
since without that it fits on no GPU at the paper's length.

T tokens, d width, F features, L layers.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.case import Row
from benchmarks.every_kernel import kernels
from benchmarks.naive_step import NaiveStep
from benchmarks.profiling import by_category, kernel_times
from benchmarks.roofs import Roofs
from benchmarks.step_check import check
from benchmarks.step_models import L0, PAPER, SMALL, Sizes, make_adapters, make_pair
from benchmarks.step_plans import necessary_flops, planned_bytes
from benchmarks.timing import synchronize
from fastadapt.batch import Batch
from fastadapt.kernels.device import runs_triton
from fastadapt.models.recompute import ATTENTION_OPS, POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.code_capacity import overflow
from fastadapt.training.logs.metrics import DeadFeatures, StepGatherer, StepReport
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig
from fastadapt.training.planning.devices import this_device
from fastadapt.training.trainer import deterministic_algorithms

__all__ = ["PAPER", "SMALL", "Sizes", "StepBench", "our_step", "rows", "verdict"]

STEPS = 3
N_LENGTHS = 20
TOP = 40  # kernels of a step to record
RATE = 1e-5
OPTIMIZER = OptimizerConfig(masters=False)
Outcome = TypeVar("Outcome")  # a report, or a loss


def rows(
    sizes: Sizes, device: str, roofs: Roofs, usable_bytes: float | None = None
) -> Iterator[Row]:
    """Yield the rows of the comparison, of the plain step and of this library's steps."""
    bench = StepBench(sizes, device, roofs, usable_bytes)
    yield from itertools.chain(bench.agreement(), bench.plain(), bench.ours())


class StepBench:
    """The parts of the benchmark; those of this library's step share one model.

    Args:
        sizes: shapes of the pair, and lengths.
        device: "cuda" or "cpu".
        roofs: peak rates to compare with.
        usable_bytes: steps planned above are skipped with a row that says so; None: the device's,
            as in the trainer.
    """

    def __init__(
        self, sizes: Sizes, device: str, roofs: Roofs, usable_bytes: float | None = None
    ) -> None:
        self.sizes, self.device, self.roofs = sizes, device, roofs
        self.usable = this_device(device).usable_bytes if usable_bytes is None else usable_bytes

    @cached_property
    def model(self) -> ReplacementModel:
        """This library's model."""
        sizes, device = self.sizes, self.device
        return ReplacementModel(make_pair(sizes, device), make_adapters(sizes, device))

    @cached_property
    def optimizer(self) -> AdapterOptimizer:
        """The optimizer of the model's adapters."""
        return AdapterOptimizer(dict(self.model.adapters.named_parameters()), OPTIMIZER)

    def agreement(self) -> Iterator[Row]:
        """Compare both steps at small shapes."""
        yield from check(self.device)

    def plain(self) -> Iterator[Row]:
        """Yield the row of the plain step; free its memory afterwards."""
        sizes, device = self.sizes, self.device
        row = _row(sizes, sizes.lengths[0], "plain, checkpointed") | {"kind": "reference"}
        plain = NaiveStep(
            make_pair(sizes, device), list(make_adapters(sizes, device)), checkpoint=True
        )
        parameters = {
            f"{i}.{name}": p
            for i, mlp in enumerate(plain.adapted)
            for name, p in mlp.named_parameters()
            if p.requires_grad
        }
        optimizer = AdapterOptimizer(parameters, OPTIMIZER)
        step = _plain_step(plain, optimizer, device)
        try:
            measured, losses = self._timed(step, sizes.lengths[0])
            row |= measured | {"losses": [float(loss) for loss in losses]}
            row["right"] = all(map(math.isfinite, row["losses"]))
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        del plain, parameters, optimizer, step
        _empty(device)
        yield row

    def ours(self) -> Iterator[Row]:
        """Yield rows of this library's step at each length with each policy."""
        for T, policy in itertools.product(self.sizes.lengths, POLICIES):
            row = _row(self.sizes, T, f"ours, {policy}")
            row["planned_bytes"] = planned = planned_bytes(self.sizes, T, policy, self.device)
            if planned > self.usable:
                usable = f"the {self.usable / 1e9:.0f} usable"
                yield row | {"skipped": f"planned at {planned / 1e9:.0f} GB, above {usable}"}
                continue
            try:
                measured, reports = self._timed(self._step(T, policy), T)
                row |= measured | verdict(reports)
            except torch.OutOfMemoryError as error:
                row |= {"kind": "floor", "error": str(error).splitlines()[0]}
            except torch.AcceleratorError:
                raise  # the device no longer works
            except Exception as error:  # other policies are still timed
                row |= {"right": False, "error": f"{type(error).__name__}: {error}"}
            self._clear()
            yield row

    def random_lengths(self) -> Iterator[Row]:
        """Yield rows of steps of random lengths, twice each, with and without cuDNN's attention.

        cuDNN plans its attention anew for every length. ``first_s`` and ``again_s`` are the seconds
        on the host of each step's first and second run.
        """
        T = self.sizes.lengths[0]
        lengths = random.Random(0).sample(range(T // 8, T), N_LENGTHS if T > 1000 else 3)
        policy = self._policy(T)
        self._step(T, policy)(self._ids(T), 1)  # compiles kernels
        before = torch.backends.cuda.cudnn_sdp_enabled()
        for cudnn in (True, False):
            name = f"cuDNN attention {'on' if cudnn else 'off'}, {policy}"
            row = _row(self.sizes, T, name) | {"op": "steps of random lengths", "lengths": lengths}
            reports: list[StepReport] = []
            passes: list[list[float]] = [[], []]
            self._clear()
            try:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
                for seconds, n in itertools.product(passes, lengths):
                    start = time.perf_counter()
                    reports.append(self._step(n, policy)(self._ids(n), self.sizes.layers // 2))
                    synchronize(self.device)
                    seconds.append(time.perf_counter() - start)
                row["attention"] = self._attention_ops(policy)
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
            finally:
                torch.backends.cuda.enable_cudnn_sdp(before)
            row |= {"first_s": passes[0], "again_s": passes[1]} | self._memory()
            yield row | (verdict(reports) if reports else {})

    def repeated(self) -> Iterator[Row]:
        """Yield whether two runs of a step give the same bits, with deterministic algorithms too.

        Without them, torch may choose an attention whose gradients vary; the row is no check.
        """
        T = self.sizes.lengths[0]
        policy = self._policy(T)
        for deterministic in (False, True):
            with deterministic_algorithms() if deterministic else nullcontext():
                first, second = (self._bits(T, policy) for _ in range(2))
            different = [name for name in first if not torch.equal(first[name], second[name])]
            del first, second
            self._clear()
            name = f"ours, {policy}{', run.deterministic' if deterministic else ''}"
            yield _row(self.sizes, T, name) | {
                "op": "repeated step",
                "kind": "ours" if deterministic else "floor",
                "claim": "loss and gradients have the same bits",
                "right": not different,
                "wrong": f"{len(different)} tensors differ" if different else "",
                "differing": different,
            }

    def _bits(self, T: int, policy: str) -> dict[str, Tensor]:
        """Return the loss and the gradients of the adapters as integers."""
        torch.manual_seed(0)
        ids, expected = self._ids(T), [2 * L0] * self.sizes.layers
        parameters = dict(self.model.adapters.named_parameters())
        config = _objective(policy, self.device)
        out = objective(self.model, Batch(ids, None, ids), self.sizes.layers // 2, config, expected)
        gradients = torch.autograd.grad(out.loss, list(parameters.values()))
        values = dict(zip(parameters, gradients, strict=True)) | {"loss": out.loss.detach()}
        integers = {2: torch.int16, 4: torch.int32}
        return {n: v.reshape(-1).view(integers[v.itemsize]) for n, v in values.items()}

    def _step(self, T: int, policy: str) -> Callable[[Tensor, int], StepReport]:
        return our_step(self.model, self.optimizer, self.sizes, T, policy, self.device)

    def _policy(self, T: int) -> str:
        """Return the policy with the least work whose memory suffices."""
        planned = (p for p in POLICIES if self._plan(T, p) <= self.usable)
        return next(planned, POLICIES[-1])

    def _plan(self, T: int, policy: str) -> int:
        return planned_bytes(self.sizes, T, policy, self.device)

    def _ids(self, T: int) -> Tensor:
        return torch.randint(self.sizes.vocabulary, (1, T), device=self.device)

    def _clear(self) -> None:
        self.optimizer.discard()
        _empty(self.device)

    def _memory(self) -> Row:
        """Return the peaks of allocated memory, and of memory that the allocator reserved."""
        if self.device != "cuda":
            return {"peak_bytes": 0, "reserved_bytes": 0}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_bytes": allocated, "reserved_bytes": reserved}

    def _attention_ops(self, policy: str) -> list[str]:
        """Return the names of torch's attention ops of a short step."""
        T, activity = min(128, self.sizes.lengths[0]), torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], acc_events=True) as recorded:
            self._step(T, policy)(self._ids(T), 1)
        return sorted({event.key for event in recorded.key_averages()} & ATTENTION_OPS)

    def _timed(self, step: Callable[[Tensor, int], Outcome], T: int) -> tuple[Row, list[Outcome]]:
        """Time consecutive steps at cutoffs spread over the layers, then profile one step.

        ``median_s`` is the device's time between the ends of consecutive steps, ``wall_s`` the time
        per step on the host, and ``device_s`` the sum of the kernels' times of the profiled step.
        Only the steps themselves synchronise.
        """
        device, layers = self.device, self.sizes.layers
        ids = self._ids(T)
        cutoffs = tuple(max(1, layers * i // (STEPS + 1)) for i in range(1, STEPS + 1))
        step(ids, cutoffs[0])
        synchronize(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start, clocks, results = time.perf_counter(), [_clock(device)], []
        for cutoff in cutoffs:
            results.append(step(ids, cutoff))
            clocks.append(_clock(device))
        synchronize(device)
        wall = time.perf_counter() - start
        seconds = [_between(a, b) for a, b in itertools.pairwise(clocks)]
        median = statistics.median(seconds)
        necessary = necessary_flops(self.sizes, T, cutoffs)
        memory = self._memory()
        profiled = kernel_times(partial(step, ids, layers // 2), device, None)
        row = {
            "median_s": median,
            "spread_s": max(seconds) - min(seconds),
            "wall_s": wall / STEPS,
            **memory,
            "tokens_per_s": T / median,
            "necessary_flops": necessary,
            "share_of_gemm_rate": necessary / median / self.roofs.gemm_flops_per_s,
            "hours_for_380M_tokens": 380e6 / (T / median) / 3600,
            "device_s": sum(kernel["us"] for kernel in profiled) / 1e6,
            "categories": by_category(profiled, kernels() if runs_triton(device) else ()),
            "kernels": profiled[:TOP],
        }
        return row, results


def verdict(reports: Sequence[StepReport]) -> Row:
    """Return losses, L0 and whether the steps were right, from their reports."""
    l0s = [l0 for report in reports for l0 in report.l0_per_layer]
    wrong = ["a loss or gradient is not finite" for report in reports if not report.finite]
    wrong += [f"more codes than planned: {f}" for r in reports if (f := overflow(r.calls))]
    row: Row = {
        "right": not wrong,
        "losses": [loss for report in reports for loss in report.losses],
        "measured_L0": sum(l0s) / len(l0s),
    }
    return row | ({"wrong": "; ".join(dict.fromkeys(wrong))} if wrong else {})


def _plain_step(
    plain: NaiveStep, optimizer: AdapterOptimizer, device: str
) -> Callable[[Tensor, int], Tensor]:
    config = _objective("none", device)

    def step(ids: Tensor, cutoff: int) -> Tensor:
        loss = plain(ids, cutoff, config)["loss"]
        loss.backward()
        optimizer.step(RATE, optimizer.gradient_norm())
        return loss.detach()

    return step


def our_step(
    model: ReplacementModel,
    optimizer: AdapterOptimizer,
    sizes: Sizes,
    T: int,
    policy: str,
    device: str,
) -> Callable[[Tensor, int], StepReport]:
    """Return a training step; it reads the report before the update, as the trainer does."""
    config = _objective(policy, device)
    expected = [2 * L0] * sizes.layers
    dead = DeadFeatures((sizes.layers, sizes.features), 10**6, torch.device(device))

    def step(ids: Tensor, cutoff: int) -> StepReport:
        gathered = StepGatherer()
        out = objective(model, Batch(ids, None, ids), cutoff, config, expected)
        out.loss.backward()
        gathered.add(out, 1.0, T)
        gathered.combine(1)
        norm = optimizer.gradient_norm()
        dead.update(gathered.fired(), gathered.tokens, gathered.valid(norm))
        report = gathered.report(norm, dead.per_layer())
        optimizer.step(RATE, norm)
        return report

    return step


def _objective(policy: str, device: str) -> ObjectiveConfig:
    dtype = None if device == "cpu" else "bfloat16"
    return ObjectiveConfig(checkpoint=policy, logits_dtype=dtype)


def _clock(device: str) -> Any:
    """Return an event in the GPU's stream, or the host's time."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3


def _row(sizes: Sizes, T: int, implementation: str) -> Row:
    shape = {"T": T, "d": sizes.d, "F": sizes.features, "L": sizes.layers}
    return {"op": "step", "implementation": implementation, "kind": "ours", "shape": shape}


def _empty(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
