"""Benchmarks' numbers with intervals, from judged responses.

Every interval is over questions, each with all its repetitions. ``mean`` is of all benchmarks, each
with the same weight, as the published mean accuracy.

M models, n questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import BenchmarkResult
from fastadapt.evaluation.statistics import (
    BootstrapConfig,
    Intervals,
    most_of_none,
    ratio,
    recovered,
)

#: By model, by way of asking (``sampled``, ``few-shot``, ...), by task.
Results = Mapping[str, Mapping[str, Mapping[str, BenchmarkResult]]]
MEAN = "mean"
SAMPLED = "sampled"


class _Sums(NamedTuple):
    """Per question: sums over its responses, and the weight of the question: ``[n]`` each."""

    correct: Tensor
    tokens: Tensor
    hesitations: Tensor
    responses: Tensor
    weight: Tensor


def summarise_benchmarks(
    results: Results, config: BootstrapConfig | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy, length and hesitation of every model on every benchmark.

    Args:
        results: of models on the same questions, ``target`` and ``hybrid`` among them where
            ``recovered`` is wanted.

    Returns:
        By benchmark (and ``mean``, of several), model and way of asking: intervals ``accuracy``,
        ``length`` (tokens), ``hesitations_per_1000`` (tokens), ``recovered`` and
        ``recovered_from_base`` (share of the target's gain in accuracy over the hybrid, and over
        the base, all sampled; None where there is none), the shares ``truncated`` and
        ``degenerate``, and ``tokens_per_s``.

    Raises:
        UserError: a model was asked other questions than another.
    """
    tasks = list(dict.fromkeys(t for ways in results.values() for by in ways.values() for t in by))
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for task in [*tasks, *([MEAN] if len(tasks) > 1 else [])]:
        of_task = tasks if task == MEAN else [task]
        sums = {
            model: {way: _joined([_sums(by[t]) for t in of_task]) for way, by in ways.items()}
            for model, ways in results.items()
            if all(t in by for by in ways.values() for t in of_task)
        }
        _check_same(sums, task)
        ends = {m: sums.get(m, {}).get(SAMPLED) for m in ("base", "hybrid", "target")}
        told[task] = {}
        for model, ways in sums.items():
            told[task][model] = {}
            for way, found in ways.items():
                rows = [row for t in of_task for row in results[model][way][t].rows]
                told[task][model][way] = {
                    **_intervals(found, config),
                    "recovered": _recovered(found, ends["hybrid"], ends["target"], config),
                    "recovered_from_base": _recovered(found, ends["base"], ends["target"], config),
                    "truncated": sum(row.finish == "length" for row in rows) / len(rows),
                    "degenerate": sum(row.finish == "degenerate" for row in rows) / len(rows),
                    "tokens_per_s": _speed([results[model][way][t] for t in of_task]),
                }
    return told


def _sums(result: BenchmarkResult) -> _Sums:
    questions = list(dict.fromkeys(row.question for row in result.rows))
    place = {question: i for i, question in enumerate(sorted(questions))}
    sums = torch.zeros(4, len(place), dtype=torch.float64)
    for row in result.rows:
        values = (row.correct, row.length_tokens, row.hesitations, 1)
        sums[:, place[row.question]] += torch.tensor(values, dtype=torch.float64)
    weight = torch.full((len(place),), 1 / len(place), dtype=torch.float64)
    return _Sums(sums[0], sums[1], sums[2], sums[3], weight)


def _joined(parts: Sequence[_Sums]) -> _Sums:
    return _Sums(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _check_same(sums: Mapping[str, Mapping[str, _Sums]], task: str) -> None:
    counts = {len(found.correct) for ways in sums.values() for found in ways.values()}
    if len(counts) > 1:
        raise UserError(
            f"benchmark {task}: models were asked different numbers of questions {sorted(counts)}"
        )


def _intervals(found: _Sums, config: BootstrapConfig | None) -> dict[str, Any]:
    scale = found.weight / found.responses

    def of(sums: Tensor, counts: Tensor, bounds: tuple[float, float]) -> Any:
        return ratio(sums * scale, counts * scale, bounds=bounds, config=config).plain()

    infinite = float("inf")
    hesitations = of(1000 * found.hesitations, found.tokens, (0.0, infinite))
    tokens = (found.tokens * scale).sum().item() / scale.max().item()  # as the heaviest ones weigh
    if tokens and not found.hesitations.any():
        level = (config or BootstrapConfig()).level
        hesitations["high"] = 1000 * most_of_none(tokens, level)
    return {
        "accuracy": of(found.correct, found.responses, (0.0, 1.0)),
        "length": of(found.tokens, found.responses, (0.0, infinite)),
        "hesitations_per_1000": hesitations,
    }


def _recovered(
    found: _Sums, floor: _Sums | None, ceiling: _Sums | None, config: BootstrapConfig | None
) -> Any:
    """None of the two ends themselves, and where one of them is not there."""
    if floor is None or ceiling is None or found is floor or found is ceiling:
        return None
    a, b, c = (each.correct / each.responses * each.weight for each in (found, floor, ceiling))
    interval: Intervals = recovered(a, b, c, config)
    return interval.plain()


def _speed(results: Sequence[BenchmarkResult]) -> float | None:
    speeds = [result.speed for result in results if result.speed is not None]
    seconds = sum(speed.seconds for speed in speeds)
    return sum(speed.tokens for speed in speeds) / seconds if seconds else None
