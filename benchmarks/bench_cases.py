"""Every case of parts.py under pytest-benchmark: ``pytest benchmarks/bench_cases.py``

Shapes are small on a CPU and the paper's on a GPU. A row first compares outputs and gradients with
the float64 oracle on the row's inputs. A peer outside the error budget is labelled, but does not
fail. On a GPU, times come from CUDA events and are in each row's extra_info; pytest-benchmark's own
column times a few calls including the host.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bounds import limit
from benchmarks.case import Case, Row, Step, describe, overwritten, shares
from benchmarks.parts import CPU_PARTS, PARTS, scale
from benchmarks.roofs import Roofs, measure_roofs
from benchmarks.timing import measure, measure_graph, peak_bytes, synchronize
from benchmarks.whole_step import PAPER, SMALL, rows
from fastadapt.kernels.linear_kl import linear_kl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = scale(DEVICE)
PAIRS = 9  # fixed: repeating a failed measurement would select a result
torch._dynamo.config.recompile_limit = 64  # one compilation per shape


def _rows() -> Iterator[Any]:
    for part, cases in (PARTS | (CPU_PARTS if DEVICE == "cpu" else {})).items():
        for case in cases(SCALE):
            words = [part, case.op, *(f"{key}{value}" for key, value in case.shape.items())]
            if case.dtype != SCALE.dtype:
                words.append(str(case.dtype)[6:])
            for name in case.steps:
                label = "-".join([*words, name]).replace(" ", "_")
                yield pytest.param(part, case, name, id=label)


@functools.cache
def _roofs(dtype: torch.dtype) -> Roofs:
    return measure_roofs(DEVICE, dtype)


_loaded: list[Case] = []  # at most one case, whose inputs are in memory
_medians: dict[str, dict[str, float]] = {}


@pytest.mark.parametrize(("part", "case", "name"), list(_rows()))
@pytest.mark.filterwarnings("ignore")  # compilers and peers warn
def test_row(benchmark: Any, part: str, case: Case, name: str) -> None:
    if _loaded and _loaded[-1] is not case:
        _loaded.pop().release()
    if not _loaded:
        _loaded.append(case)
    step = case.steps[name]
    benchmark.group = f"{part} {case.op} {case.label} {str(case.dtype)[6:]}"
    row = describe(case, name)
    try:
        if step.kind != "floor":
            _check(case, name, row)
        row |= _time(benchmark, case, step)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    finally:
        changed = overwritten(case, name)
    assert not changed or step.kind == "peer", changed["wrong"]
    row |= changed
    before = _medians.setdefault(benchmark.group, {})
    row["times_as_fast_as"] = {other: s / row["median_s"] for other, s in before.items()}
    before[name] = row["median_s"]
    benchmark.extra_info |= row
    if step.beside is not None:
        L0 = case.shape["L0"]
        bound = limit({1: "sparse at L0 1", 10: "sparse at L0 10"}.get(L0, "sparse at any L0"))
        ratio = row["ratio"]
        assert ratio >= bound, f"expected {bound} times the reference's speed, got {ratio:.2f}"


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
        seconds: dict[str, list[float]] = {"reference": [], "step": []}

        def timed(key: str, run: Any, inputs: Any) -> None:
            start = time.perf_counter()
            run(inputs)
            seconds[key].append(time.perf_counter() - start)

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            inputs = case.sets[len(seconds["step"]) % len(case.sets)]
            if step.beside is not None:
                timed("reference", step.beside, inputs)
            return (inputs,), {}

        rounds = 5 if step.beside is None else PAIRS
        timed_step = functools.partial(timed, "step", step.run)
        benchmark.pedantic(timed_step, setup=setup, rounds=rounds, warmup_rounds=1)
        if step.beside is not None:
            pairs = list(zip(seconds["reference"], seconds["step"], strict=True))[-PAIRS:]
            row |= {"ratio": statistics.median(r / s for r, s in pairs), "pairs": len(pairs)}
        stats = benchmark.stats.stats
        row |= {"median_s": stats.median, "spread_s": stats.iqr, "wall_s": stats.median}
        row["peak_bytes"], row["result_bytes"] = peak_bytes(lambda: step.run(case.sets[0]), DEVICE)
    counted = row["graph_s" if "graph_s" in row else "median_s"]
    return row | shares(step.cost or case.cost, counted, _roofs(case.dtype))


# Distance of the student's hidden states from the teacher's: median KL 0.07, 7e-3 and 8e-4.
@pytest.mark.parametrize("distance", [0.1, 0.03, 0.01])
def test_rounding_of_logits(benchmark: Any, distance: float) -> None:
    """Measure the gradient's relative error by the logits' dtype, for bfloat16 inputs."""
    T, D, V = 32, 128, 152_064
    generator = torch.Generator().manual_seed(0)
    teacher, change = (torch.randn(T, D, generator=generator) for _ in range(2))
    head = torch.randn(V, D, generator=generator) * 4 / D**0.5
    streams = [t.bfloat16() for t in (teacher, teacher + distance * change, head)]

    def gradient(*streams: Tensor, logits_dtype: torch.dtype | None = None) -> Tensor:
        student = streams[1][None].requires_grad_()
        options: dict[str, Any] = {"logits_dtype": logits_dtype, "chunk_tokens": 16}
        kl = linear_kl(streams[0], student, streams[2], **options).kl
        return torch.autograd.grad(kl.sum(), student)[0][0].double()

    exact = gradient(*(t.double() for t in streams))

    def error_of(result: Tensor) -> float:
        return float(((result - exact).norm(dim=-1) / exact.norm(dim=-1)).median())

    errors = {
        str(dtype)[6:]: error_of(gradient(*streams, logits_dtype=dtype))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    least = error_of(exact.bfloat16().double())  # the rounding of any bfloat16 result
    bound = limit("gradient error with float32 logits") * least
    assert errors["float32"] <= bound < errors["float16"] < errors["bfloat16"]
    benchmark.group = "linear_kl, gradient error by logits_dtype"
    benchmark.extra_info |= {
        "op": "linear_kl",
        "shape": f"T={T} D={D} V={V} bfloat16, students {distance} away",
        "relative_gradient_error": errors,
        "rounding_of_the_result_alone": least,
    }
    benchmark.pedantic(gradient, streams, rounds=1)


def test_step(benchmark: Any) -> None:
    """Time a whole training step and the plain step: the 7B pair on a GPU, a small one on a CPU."""
    sizes = PAPER if DEVICE == "cuda" else SMALL
    roofs = _roofs(sizes.dtype)
    results: list[Row] = []
    benchmark.pedantic(lambda: results.extend(rows(sizes, DEVICE, roofs)), rounds=1)
    benchmark.group = "whole step"
    benchmark.extra_info["rows"] = results
    assert results
    assert all(row.get("right") is not False for row in results)
    timed = [row for row in results if row["shape"]["T"] == sizes.lengths[0] and "median_s" in row]
    plain = next((row for row in timed if row["kind"] == "reference"), None)
    if plain is None:
        pytest.skip("the plain step does not fit in memory")
    ours = max(row["tokens_per_s"] for row in timed if row["kind"] == "ours")
    benchmark.extra_info["times_as_fast_as_plain"] = ours / plain["tokens_per_s"]
    if DEVICE == "cuda":
        assert ours >= limit("step over the plain step") * plain["tokens_per_s"]
