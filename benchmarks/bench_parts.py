"""Every row of parts.py under pytest-benchmark: ``pytest benchmarks/bench_parts.py``

Small shapes on a CPU, the paper's on a GPU. A row first asserts outputs and gradients against the
float64 oracle on its own inputs; a peer that is not within their budget is labelled, not failed.
On a GPU the figures are those of CUDA events, in each row's extra_info; pytest-benchmark's own
column holds a few calls with the host's share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.case import Case, Row, Step, describe, shares
from benchmarks.parts import PARTS, scale
from benchmarks.roofs import Roofs, measure_roofs
from benchmarks.timing import measure, measure_graph, peak_bytes, synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = scale(DEVICE)
torch._dynamo.config.recompile_limit = 64  # one compilation per shape, of many


def _rows() -> Iterator[Any]:
    for part, entry in PARTS.items():
        for case in entry.cases(SCALE):
            for name in case.steps:
                words = [
                    part,
                    case.op,
                    *(f"{key}{value}" for key, value in case.shape.items()),
                    name,
                ]
                yield pytest.param(part, case, name, id="-".join(words).replace(" ", "_"))


@functools.cache
def _roofs() -> Roofs:
    return measure_roofs(DEVICE, SCALE.dtype)


_held: list[Case] = []  # the one whose inputs are in memory
_medians: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize(("part", "case", "name"), list(_rows()))
@pytest.mark.filterwarnings("ignore")  # of compilers and peers
def test_row(benchmark: Any, part: str, case: Case, name: str) -> None:
    if _held and _held[-1] is not case:
        _held.pop().release()
    if not _held:
        _held.append(case)
    step = case.steps[name]
    benchmark.group = f"{part} {case.op} {case.label} {str(case.dtype)[6:]}"
    row = describe(case, name)
    try:
        if step.kind != "floor":
            _check(case, name, row)
        row |= _time(benchmark, case, step)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    before = _medians.setdefault(benchmark.group, {})
    row["times_as_fast_as"] = {other: s / row["median_s"] for other, s in before.items()}
    before[name] = row["median_s"]
    benchmark.extra_info |= row


def _check(case: Case, name: str, row: Row) -> None:
    try:
        case.check(name)
        row["right"] = True
    except AssertionError as error:
        if case.steps[name].kind == "ours":
            raise
        row |= {"right": False, "wrong": str(error)}


def _time(benchmark: Any, case: Case, step: Step) -> Row:
    row: Row = {}
    if DEVICE == "cuda":
        row |= measure(step.run, case.sets, DEVICE)._asdict()
        if step.graph:
            row["graph_s"] = measure_graph(step.run, case.sets)

        def run() -> None:
            step.run(case.sets[0])
            synchronize(DEVICE)

        benchmark.pedantic(run, rounds=3)
    else:
        calls = iter(range(10**9))
        setup = lambda: ((case.sets[next(calls) % len(case.sets)],), {})  # noqa: E731
        benchmark.pedantic(step.run, setup=setup, rounds=5, warmup_rounds=1)
        stats = benchmark.stats.stats
        row |= {"median_s": stats.median, "spread_s": stats.iqr, "wall_s": stats.median}
        row["peak_bytes"], row["result_bytes"] = peak_bytes(lambda: step.run(case.sets[0]), DEVICE)
    return row | shares(step.cost or case.cost, row.get("graph_s", row["median_s"]), _roofs())
