"""A whole training step, ours and the plain one, on one device with random weights of true shapes.

Forward, backward, clipping, update; ours with the report that the trainer reads before the update.
Both are first shown to be the same step (:mod:`benchmarks.step_check`). Afterwards the report says
whether a row was right: losses and gradients are numbers, and no layer had more codes than planned.
Where the plain step does not fit in memory at a length, the next shorter one is tried.

T tokens, d width, F features, L layers.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.case import Row
from benchmarks.naive_step import NaiveStep
from benchmarks.roofs import Roofs
from benchmarks.step_check import check
from benchmarks.step_models import (
    L0,
    PAPER,
    SMALL,
    Sizes,
    make_adapters,
    make_pair,
    model_config,
    pair_config,
)
from benchmarks.timing import synchronize
from fastadapt.adapter import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.models import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.recompute import POLICIES
from fastadapt.training import memory
from fastadapt.training.config import from_dict
from fastadapt.training.metrics import DeadFeatures, StepGatherer, StepReport
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig
from fastadapt.training.planner import overflow
from fastadapt.training.shapes import Shapes
from fastadapt.training.work import Setup, count

__all__ = ["PAPER", "SMALL", "Sizes", "rows", "told"]

STEPS = 3
RATE = 1e-5
Told = TypeVar("Told")  # a report, or a loss


def rows(sizes: Sizes, device: str, roofs: Roofs) -> Iterator[Row]:
    """The plain step at the longest length that fits, then ours there and at its own lengths."""
    base: Row = {"op": "step", **check(device)}
    plain = next(_plain(sizes, device, roofs, base), None)
    if plain is not None:
        yield plain
    lengths = dict.fromkeys([*([plain["shape"]["T"]] if plain else []), *sizes.lengths])
    model = ReplacementModel(make_pair(sizes, device), make_adapters(sizes, device))
    optimizer = AdapterOptimizer(dict(model.adapters.named_parameters()), _optimizer())
    for T in lengths:
        for policy in POLICIES:
            row = _row(sizes, T, f"ours, {policy}", base)
            row["planned_bytes"] = planned_bytes(sizes, T, policy, device)
            step = _our_step(model, optimizer, sizes, T, policy, device)
            try:
                measured, reports = _timed(step, sizes, T, device, roofs)
                row |= measured | told(reports)
                yield row | {"right": base["right"] and row["right"]}
            except torch.OutOfMemoryError as error:
                yield row | {"kind": "floor", "error": str(error).splitlines()[0]}
            _empty(device)


def _plain(sizes: Sizes, device: str, roofs: Roofs, base: Row) -> Iterator[Row]:
    """Its row at the first of the lengths that fits; everything of it is gone afterwards."""
    for T in sizes.shorter:
        adapters = make_adapters(sizes, device)
        plain = NaiveStep(make_pair(sizes, device), list(adapters))
        del adapters
        parameters = {
            f"{i}.{name}": p
            for i, mlp in enumerate(plain.adapted)
            for name, p in mlp.named_parameters()
            if p.requires_grad
        }
        optimizer = AdapterOptimizer(parameters, _optimizer())
        step = _plain_step(plain, optimizer, device)
        row = _row(sizes, T, "plain", base) | {"kind": "reference"}
        try:
            measured, losses = _timed(step, sizes, T, device, roofs)
            measured["losses"] = [float(loss) for loss in losses]
            measured["right"] = base["right"] and all(map(math.isfinite, measured["losses"]))
        except torch.OutOfMemoryError:
            measured = None
        del plain, parameters, optimizer, step
        _empty(device)
        if measured is not None:
            yield row | measured
            return


def _plain_step(
    plain: NaiveStep, optimizer: AdapterOptimizer, device: str
) -> Callable[[Tensor, int], Tensor]:
    config = ObjectiveConfig(logits_dtype=None if device == "cpu" else "bfloat16")

    def step(ids: Tensor, cutoff: int) -> Tensor:
        loss = plain(ids, cutoff, config)["loss"]
        loss.backward()
        _update(optimizer)
        return loss.detach()

    return step


def _our_step(
    model: ReplacementModel,
    optimizer: AdapterOptimizer,
    sizes: Sizes,
    T: int,
    policy: str,
    device: str,
) -> Callable[[Tensor, int], StepReport]:
    """What a run's ``advance`` does: the report is read before the update that depends on it."""
    logits = None if device == "cpu" else "bfloat16"
    config = ObjectiveConfig(checkpoint=policy, logits_dtype=logits)
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


def told(reports: Sequence[StepReport]) -> Row:
    """What the steps' reports say: losses, L0, and whether the steps were right."""
    l0s = [l0 for report in reports for l0 in report.l0_per_layer]
    wrong = ["a loss or gradient is not finite" for report in reports if not report.finite]
    wrong += [f"more codes than planned: {f}" for r in reports if (f := overflow(r.calls))]
    found: Row = {
        "right": not wrong,
        "losses": [loss for report in reports for loss in report.losses],
        "measured_L0": sum(l0s) / len(l0s),
    }
    return found | ({"wrong": "; ".join(dict.fromkeys(wrong))} if wrong else {})


def _timed(
    step: Callable[[Tensor, int], Told], sizes: Sizes, T: int, device: str, roofs: Roofs
) -> tuple[Row, list[Told]]:
    """Steps one after the other at cutoffs over the range, the host's share included."""
    on_gpu = device == "cuda"
    ids = torch.randint(sizes.vocabulary, (1, T), device=device)
    cutoffs = [max(1, sizes.layers * i // (STEPS + 1)) for i in range(1, STEPS + 1)]
    step(ids, cutoffs[0])
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, results = [], []
    for cutoff in cutoffs:
        began = time.perf_counter()
        results.append(step(ids, cutoff))
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[len(seconds) // 2]
    kept, adapter = ObjectiveConfig(checkpoint="none"), AdapterConfig(sizes.features)
    setup = Setup(model_config(sizes), pair_config(sizes), adapter, kept, 1, T)
    necessary = sum(count(setup, sizes.layers, k, L0) for k in cutoffs) / len(cutoffs)
    row = {
        "median_s": median,
        "spread_s": max(seconds) - min(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "tokens_per_s": T / median,
        "necessary_flops": necessary,
        "share_of_gemm_rate": necessary / median / roofs.gemm_flops_per_s,
        "hours_for_380M_tokens": 380e6 / (T / median) / 3600,
    }
    return row, results


def planned_bytes(sizes: Sizes, T: int, policy: str, device: str) -> int:
    """What the memory plan says of our step."""
    config = from_dict(
        {
            "pair": asdict(pair_config(sizes)),
            "adapter": {"n_features": sizes.features},
            "objective": {
                "checkpoint": policy,
                "logits_dtype": None if device == "cpu" else "bfloat16",
            },
            "data": {"train": "none.jsonl", "validation": "none.jsonl"},
            "optimizer": {"masters": False},
            "run": {"output": "none"},
        }
    )
    return max(memory.phases(Shapes.of(config, model_config(sizes), T, device)).values())


def _row(sizes: Sizes, T: int, implementation: str, base: Row) -> Row:
    shape = {"T": T, "d": sizes.d, "F": sizes.features, "L": sizes.layers}
    return {**base, "implementation": implementation, "kind": "ours", "shape": shape}


def _optimizer() -> OptimizerConfig:
    return OptimizerConfig(masters=False)


def _update(optimizer: AdapterOptimizer) -> None:
    optimizer.step(RATE, optimizer.gradient_norm())


def _empty(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
