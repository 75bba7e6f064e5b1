"""Time whole training steps of this library and the plain step, with random weights of real shapes.

A step consists of forward, backward, clipping and update; this library's step also includes the
report that the trainer reads before the update. Both steps are first compared
(:mod:`benchmarks.step_check`). A row is right if its reports have finite losses and gradients, and
no layer has more codes than planned. If the plain step does not fit in memory at a length, the next
shorter length is tried; lengths whose extrapolated memory is too large are skipped.

T tokens, d width, F features, L layers.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.case import Row
from benchmarks.naive_step import NaiveStep
from benchmarks.roofs import Roofs
from benchmarks.step_check import check
from benchmarks.step_models import L0, PAPER, SMALL, Sizes, make_adapters, make_pair
from benchmarks.step_plans import extrapolate, necessary_flops, planned_bytes
from benchmarks.timing import synchronize
from fastadapt.batch import Batch
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.code_capacity import overflow
from fastadapt.training.logs.metrics import DeadFeatures, StepGatherer, StepReport
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig
from fastadapt.training.planning.devices import this_device

__all__ = ["PAPER", "SMALL", "Sizes", "our_step", "rows", "verdict"]

STEPS = 3
PROBES = (750, 1500)  # tokens; activations, not the update, determine the peak at these lengths
RATE = 1e-5
OPTIMIZER = OptimizerConfig(masters=False)
Outcome = TypeVar("Outcome")  # a report, or a loss


def rows(
    sizes: Sizes, device: str, roofs: Roofs, usable_bytes: float | None = None
) -> Iterator[Row]:
    """Yield rows of the plain step up to the first length that fits, then of this library's step.

    This library's step is timed at that length and at ``sizes.lengths``. Steps planned above
    ``usable_bytes`` (None: the device's, as in the trainer) are skipped with a row that says so.
    """
    base: Row = {"op": "step", **check(device)}
    usable = this_device(device).usable_bytes if usable_bytes is None else usable_bytes
    plain = None
    for plain in _plain(sizes, device, roofs, base, usable):
        yield plain
    fitting = [plain["shape"]["T"]] if plain and "median_s" in plain else []
    model = ReplacementModel(make_pair(sizes, device), make_adapters(sizes, device))
    optimizer = AdapterOptimizer(dict(model.adapters.named_parameters()), OPTIMIZER)
    for T in dict.fromkeys([*fitting, *sizes.lengths]):
        for policy in POLICIES:
            row = _row(sizes, T, f"ours, {policy}", base)
            row["planned_bytes"] = planned_bytes(sizes, T, policy, device)
            if row["planned_bytes"] > usable:
                yield row | _skipped(row["planned_bytes"], usable)
                continue
            step = our_step(model, optimizer, sizes, T, policy, device)
            try:
                measured, reports = _timed(step, sizes, T, device, roofs)
                row |= measured | verdict(reports)
                row["right"] &= base["right"]
            except torch.OutOfMemoryError as error:
                row |= {"kind": "floor", "error": str(error).splitlines()[0]}
            except Exception as error:  # other policies are still timed
                row |= {"right": False, "error": f"{type(error).__name__}: {error}"}
            optimizer.discard()
            _empty(device)
            yield row


def _plain(
    sizes: Sizes, device: str, roofs: Roofs, base: Row, usable_bytes: float
) -> Iterator[Row]:
    """Yield rows of the lengths up to the first that fits; free all memory afterwards."""
    adapters = make_adapters(sizes, device)
    plain = NaiveStep(make_pair(sizes, device), list(adapters))
    del adapters
    parameters = {
        f"{i}.{name}": p
        for i, mlp in enumerate(plain.adapted)
        for name, p in mlp.named_parameters()
        if p.requires_grad
    }
    optimizer = AdapterOptimizer(parameters, OPTIMIZER)
    step = _plain_step(plain, optimizer, device)
    peaks: dict[int, int] = {}
    for T in sizes.shorter:
        row = _row(sizes, T, "plain", base) | {"kind": "reference"}
        try:
            if device == "cuda" and not peaks:
                peaks = {n: _peak_bytes(step, sizes, n) for n in PROBES}
            if peaks:
                row["planned_bytes"] = extrapolate(peaks, T)
            if row.get("planned_bytes", 0) > usable_bytes:
                yield row | _skipped(row["planned_bytes"], usable_bytes)
                continue
            measured, losses = _timed(step, sizes, T, device, roofs)
            row |= measured | {"losses": [float(loss) for loss in losses]}
            row["right"] = base["right"] and all(map(math.isfinite, row["losses"]))
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        optimizer.discard()
        _empty(device)
        yield row
        if "median_s" in row:
            break
    del plain, parameters, optimizer, step
    _empty(device)


def _peak_bytes(step: Callable[[Tensor, int], Tensor], sizes: Sizes, T: int) -> int:
    """Return the plain step's peak on a GPU, at the timed cutoff with the largest memory."""
    for _ in range(2):  # the first step creates the optimiser's moments
        torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(sizes.vocabulary, (1, T), device="cuda")
        step(ids, sizes.layers // (STEPS + 1) or 1)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _skipped(planned: float, usable: float) -> Row:
    return {"skipped": f"planned at {planned / 1e9:.0f} GB, above the {usable / 1e9:.0f} usable"}


def _plain_step(
    plain: NaiveStep, optimizer: AdapterOptimizer, device: str
) -> Callable[[Tensor, int], Tensor]:
    config = ObjectiveConfig(logits_dtype=_logits_dtype(device))

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
    config = ObjectiveConfig(checkpoint=policy, logits_dtype=_logits_dtype(device))
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


def _timed(
    step: Callable[[Tensor, int], Outcome], sizes: Sizes, T: int, device: str, roofs: Roofs
) -> tuple[Row, list[Outcome]]:
    """Time consecutive steps at cutoffs spread over the layers, including the host.

    ``median_s`` is the device's time between the ends of consecutive steps. ``wall_s`` is the time
    per step on the host. Only the steps themselves synchronise.
    """
    on_gpu = device == "cuda"
    ids = torch.randint(sizes.vocabulary, (1, T), device=device)
    cutoffs = tuple(max(1, sizes.layers * i // (STEPS + 1)) for i in range(1, STEPS + 1))
    step(ids, cutoffs[0])
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start, clocks, results = time.perf_counter(), [_clock(device)], []
    for cutoff in cutoffs:
        results.append(step(ids, cutoff))
        clocks.append(_clock(device))
    synchronize(device)
    wall = time.perf_counter() - start
    seconds = [_between(a, b) for a, b in itertools.pairwise(clocks)]
    median = statistics.median(seconds)
    necessary = necessary_flops(sizes, T, cutoffs)
    row = {
        "median_s": median,
        "spread_s": max(seconds) - min(seconds),
        "wall_s": wall / STEPS,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "tokens_per_s": T / median,
        "necessary_flops": necessary,
        "share_of_gemm_rate": necessary / median / roofs.gemm_flops_per_s,
        "hours_for_380M_tokens": 380e6 / (T / median) / 3600,
    }
    return row, results


def _logits_dtype(device: str) -> str | None:
    return None if device == "cpu" else "bfloat16"


def _clock(device: str) -> Any:
    """Return an event in the GPU's stream, or the host's time."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3


def _row(sizes: Sizes, T: int, implementation: str, base: Row) -> Row:
    shape = {"T": T, "d": sizes.d, "F": sizes.features, "L": sizes.layers}
    return {**base, "implementation": implementation, "kind": "ours", "shape": shape}


def _empty(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
