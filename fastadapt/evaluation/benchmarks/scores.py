"""Computes benchmark scores with intervals from graded responses.

Intervals are over questions, each with all its repetitions. ``mean`` is the mean over benchmarks
with equal weights, as in the published mean accuracy.

n questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS
from fastadapt.evaluation.benchmarks.grading import hesitations as occurrences
from fastadapt.evaluation.benchmarks.runner import BenchmarkResult
from fastadapt.evaluation.seeds import difference_over_seeds, over_seeds
from fastadapt.evaluation.statistics import (
    BootstrapConfig,
    most_of_none,
    ratio,
    recovered,
)

#: Results by model, mode of prompting (``sampled``, ``4-shot``, ...) and task.
Results = Mapping[str, Mapping[str, Mapping[str, BenchmarkResult]]]
MEAN = "mean"
SAMPLED = "sampled"
_BOUNDS = {
    "accuracy": (0.0, 1.0),
    "length": (0.0, math.inf),
    "hesitations_per_1000": (0.0, math.inf),
}
#: End of the names of modes with examples at temperature 0.
GREEDY = "-shot, greedy"


class _Sums(NamedTuple):
    """Sums over the responses to each question, and the question's weight: float64 ``[n]`` each.

    ``stratum``, int64 ``[n]``, is the number of each question's benchmark.
    """

    correct: Tensor
    tokens: Tensor
    hesitations: Tensor
    responses: Tensor
    weight: Tensor
    stratum: Tensor


def summarise_benchmarks(
    results: Results,
    config: BootstrapConfig | None = None,
    *,
    words: Sequence[str] = HESITATION_WORDS,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Summarise accuracy, length and hesitation of every model on every benchmark.

    Args:
        results: results of models on the same questions. ``recovered`` needs ``target`` and
            ``hybrid``, ``recovered_from_base`` needs ``target`` and ``base``.
        config: settings of the intervals.
        words: words whose rates are given one by one.

    Returns:
        A dict by benchmark (and ``mean``, if there are several), model and mode, each with:

        - intervals ``accuracy``, ``length`` (tokens) and ``hesitations_per_1000`` (tokens);
        - ``by_word``: an interval per 1,000 tokens of each word of ``words``;
        - intervals ``recovered`` and ``recovered_from_base``: share of the target's gain in
          accuracy over the hybrid in mode ``sampled``, or over the base with examples at
          temperature 0 if it was asked so (arXiv 2602.20904, appendix D), else in mode ``sampled``;
          None if not defined;
        - shares ``truncated`` and ``degenerate``, and ``tokens_per_s``.

    Raises:
        UserError: models have different numbers of questions.
    """
    every = (by_task for modes in results.values() for by_task in modes.values())
    tasks = list(dict.fromkeys(task for by_task in every for task in by_task))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for task in [*tasks, *([MEAN] if len(tasks) > 1 else [])]:
        members = tasks if task == MEAN else [task]
        sums = {
            model: {mode: _joined([_sums(by[t]) for t in members]) for mode, by in modes.items()}
            for model, modes in results.items()
            if all(t in by for by in modes.values() for t in members)
        }
        _check_same(sums, task)
        ends = {m: sums.get(m, {}).get(SAMPLED) for m in ("base", "hybrid", "target")}
        if greedy := [mode for mode in sums.get("base", {}) if mode.endswith(GREEDY)]:
            ends["base"] = sums["base"][greedy[0]]
        summary[task] = {}
        for model, modes in sums.items():
            summary[task][model] = {}
            for mode, scores in modes.items():
                rows = [row for t in members for row in results[model][mode][t].rows]
                summary[task][model][mode] = {
                    **_intervals(scores, config),
                    "by_word": _by_word(
                        [results[model][mode][t] for t in members], scores, words, config
                    ),
                    "recovered": _recovered(scores, ends["hybrid"], ends["target"], config),
                    "recovered_from_base": _recovered(scores, ends["base"], ends["target"], config),
                    "truncated": sum(row.finish == "length" for row in rows) / len(rows),
                    "degenerate": sum(row.finish == "degenerate" for row in rows) / len(rows),
                    "tokens_per_s": _speed([results[model][mode][t] for t in members]),
                }
    return summary


def summarise_groups(
    results: Results, groups: Mapping[str, Sequence[str]], level: float
) -> dict[str, Any]:
    """Summarise groups of runs that differ by their seed only, over seeds and questions.

    Args:
        results: results of the runs, in mode ``sampled``.
        groups: names of the runs by name of the group.
        level: confidence level.

    Returns:
        A dict by benchmark (and ``mean``, if there are several), each with ``groups``: dicts with
        ``name``, ``runs``, ``accuracy``, ``length`` and ``hesitations_per_1000``; and
        ``differences`` of every two groups: ``above``, ``below`` and these measures.
    """
    tasks = list(next(iter(results.values()))[SAMPLED])
    summary = {}
    for task in [*tasks, *([MEAN] if len(tasks) > 1 else [])]:
        members = tasks if task == MEAN else [task]
        scores = {
            name: [_joined([_sums(results[run][SAMPLED][t]) for t in members]) for run in runs]
            for name, runs in groups.items()
        }
        terms = {name: _terms(each) for name, each in scores.items()}
        measured = [
            {
                "name": name,
                "runs": list(groups[name]),
                **{
                    key: over_seeds(
                        x, c, bounds=_BOUNDS[key], strata=scores[name][0].stratum, level=level
                    ).plain()
                    for key, (x, c) in measures.items()
                },
            }
            for name, measures in terms.items()
        ]
        for group, runs in zip(measured, scores.values(), strict=True):
            if not any(run.hesitations.any() for run in runs):
                most = [_most_hesitations(run, level) for run in runs]
                group["hesitations_per_1000"]["high"] = max(m or 0 for m in most)
        summary[task] = {
            "groups": measured,
            "differences": [
                {
                    "above": a,
                    "below": b,
                    **{
                        key: difference_over_seeds(
                            terms[a][key][0],
                            terms[b][key][0],
                            (terms[a][key][1], terms[b][key][1]),
                            strata=scores[a][0].stratum,
                            level=level,
                        ).plain()
                        for key in _BOUNDS
                    },
                }
                for a, b in combinations(groups, 2)
            ],
        }
    return summary


def _terms(runs: Sequence[_Sums]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return sums and counts ``[S, n]`` of each measure, with the weights of the benchmarks."""

    def stacked(values: Sequence[Tensor]) -> Tensor:
        scales = (run.weight / run.responses for run in runs)
        return torch.stack([v * scale for v, scale in zip(values, scales, strict=True)])

    responses, tokens = stacked([r.responses for r in runs]), stacked([r.tokens for r in runs])
    return {
        "accuracy": (stacked([r.correct for r in runs]), responses),
        "length": (tokens, responses),
        "hesitations_per_1000": (1000 * stacked([r.hesitations for r in runs]), tokens),
    }


def recovered_hesitation(
    model: Mapping[str, BenchmarkResult],
    floor: Mapping[str, BenchmarkResult],
    ceiling: Mapping[str, BenchmarkResult],
    config: BootstrapConfig | None = None,
) -> dict[str, Any]:
    """Return the share of a gain in hesitation per 1,000 tokens that a model recovers.

    A rate is a quotient of sums over questions. Each question stands for its linear contribution to
    the rate, so that a resample takes the same questions of all three
    (:func:`fastadapt.evaluation.statistics.recovered`).

    Args:
        model, floor, ceiling: results by task, on the same questions; all tasks weigh the same.
        config: settings of the interval.

    Returns:
        An interval; its values are None if the interval of the gain reaches 0.
    """

    def contributions(results: Mapping[str, BenchmarkResult]) -> Tensor:
        scores = _joined([_sums(result) for result in results.values()])
        scale = scores.weight / scores.responses
        x, c = 1000 * scores.hesitations * scale, scores.tokens * scale
        rate = x.sum() / c.sum()
        return rate + (x - rate * c) / c.mean()

    ends = contributions(floor), contributions(ceiling)
    strata = _joined([_sums(result) for result in model.values()]).stratum
    return recovered(contributions(model), *ends, config, strata=strata).plain()


def _sums(result: BenchmarkResult) -> _Sums:
    index = _index(result)
    n = len(index)
    sums = torch.zeros(4, n, dtype=torch.float64)
    for row in result.rows:
        values = (row.correct, row.length_tokens, row.hesitations, 1)
        sums[:, index[row.question]] += torch.tensor(values, dtype=torch.float64)
    correct, tokens, hesitations, responses = sums
    weight = torch.full((n,), 1 / n, dtype=torch.float64)
    return _Sums(correct, tokens, hesitations, responses, weight, torch.zeros(n, dtype=torch.int64))


def _joined(parts: Sequence[_Sums]) -> _Sums:
    parts = [part._replace(stratum=part.stratum + i) for i, part in enumerate(parts)]
    return _Sums(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _check_same(sums: Mapping[str, Mapping[str, _Sums]], task: str) -> None:
    counts = {len(scores.correct) for modes in sums.values() for scores in modes.values()}
    if len(counts) > 1:
        raise UserError(
            f"benchmark {task}: expected the same number of questions for all models, got "
            f"{sorted(counts)}; evaluate all models with the same --benchmarks.limit"
        )


def _intervals(scores: _Sums, config: BootstrapConfig | None) -> dict[str, Any]:
    scale = scores.weight / scores.responses

    def interval(sums: Tensor, counts: Tensor, largest: float = math.inf) -> Any:
        given = sums * scale, counts * scale
        bounds, strata = (0.0, largest), scores.stratum
        return ratio(*given, bounds=bounds, strata=strata, config=config).plain()

    hesitations = interval(1000 * scores.hesitations, scores.tokens)
    if not scores.hesitations.any():
        level = (config or BootstrapConfig()).level
        hesitations["high"] = _most_hesitations(scores, level) or hesitations["high"]
    return {
        "accuracy": interval(scores.correct, scores.responses, 1.0),
        "length": interval(scores.tokens, scores.responses),
        "hesitations_per_1000": hesitations,
    }


def _most_hesitations(scores: _Sums, level: float) -> float | None:
    """Return the upper bound of a rate per 1,000 tokens if no event occurred; None: no tokens."""
    scale = scores.weight / scores.responses
    # Tokens in units of the heaviest question's: an exposure that is not too large.
    tokens = (scores.tokens * scale).sum().item() / scale.max().item()
    return 1000 * most_of_none(tokens, level) if tokens else None


def _by_word(
    results: Sequence[BenchmarkResult],
    scores: _Sums,
    words: Sequence[str],
    config: BootstrapConfig | None,
) -> dict[str, Any]:
    """Return an interval of each word's rate per 1,000 tokens, all from the same resamples."""
    if not words:
        return {}
    scale = scores.weight / scores.responses
    counts = torch.cat([_words(result, words) for result in results], 1)
    given = 1000 * counts * scale, scores.tokens * scale
    bounds, strata = (0.0, math.inf), scores.stratum
    rates = ratio(*given, bounds=bounds, strata=strata, config=config).plain()
    most = _most_hesitations(scores, (config or BootstrapConfig()).level)
    for rate, occurred in zip(rates, counts.any(1), strict=True):
        if not occurred:
            rate["high"] = most or rate["high"]
    return dict(zip(words, rates, strict=True))


def _words(result: BenchmarkResult, words: Sequence[str]) -> Tensor:
    """Return each word's occurrences in the responses to each question, float64 ``[W, n]``."""
    index = _index(result)
    sums = torch.zeros(len(words), len(index), dtype=torch.float64)
    for row in result.rows:
        counts = [occurrences(row.text, (word,)) for word in words]
        sums[:, index[row.question]] += torch.tensor(counts, dtype=torch.float64)
    return sums


def _index(result: BenchmarkResult) -> dict[str, int]:
    return {question: i for i, question in enumerate(sorted({r.question for r in result.rows}))}


def _recovered(
    scores: _Sums, floor: _Sums | None, ceiling: _Sums | None, config: BootstrapConfig | None
) -> Any:
    """Return the share of the gain from floor to ceiling; None for the models floor and ceiling."""
    if floor is None or ceiling is None or scores is floor or scores is ceiling:
        return None
    a, b, c = (each.correct / each.responses * each.weight for each in (scores, floor, ceiling))
    return recovered(a, b, c, config, strata=scores.stratum).plain()


def _speed(results: Sequence[BenchmarkResult]) -> float | None:
    speeds = [result.speed for result in results if result.speed is not None]
    seconds = sum(speed.seconds for speed in speeds)
    return sum(speed.tokens for speed in speeds) / seconds if seconds else None
