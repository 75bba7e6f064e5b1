"""Accuracy and length of the answers of every hybrid to the questions of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig, BenchmarkResult, run_benchmarks
from fastadapt.evaluation.benchmarks.scores import SAMPLED, summarise_benchmarks
from fastadapt.evaluation.difference.parts import TwoModels, combinations
from fastadapt.evaluation.statistics import BootstrapConfig


def answer(
    models: TwoModels,
    config: BenchmarkConfig,
    folder: Path,
    fingerprint: str,
    statistics: BootstrapConfig,
    *,
    progress: Callable[[str, int, int], None],
    stop: Event,
) -> list[dict[str, Any]] | None:
    """Sample answers of every hybrid, and return the section ``generation`` of ``where.json``.

    Args:
        models: the two models.
        config: questions, family and sampling, with the names of the tasks.
        folder: stores one folder of responses per hybrid, which are reused.
        fingerprint: digest of the weights, dtype and settings of the models.
        statistics: settings of the intervals.
        progress: called with (hybrid, completed responses, total responses).
        stop: set it to stop early; finished responses are stored.

    Returns:
        One entry per benchmark (and ``mean``, if there are several) and hybrid: ``task``,
        ``from_base``, the intervals ``accuracy`` and ``length`` (tokens), and the share
        ``truncated``; None if stopped.

    Raises:
        UserError: lm-eval is not installed, or questions are missing or do not fit.
    """
    results: dict[str, dict[str, dict[str, BenchmarkResult]]] = {}
    hybrids = combinations(models.parts)
    for hybrid in hybrids:
        digest = config.fingerprint(f"{fingerprint} {hybrid.name}")
        with models.taking(hybrid.parts) as model:
            result = run_benchmarks(
                model,
                models.pair.tokenizer,
                config,
                folder / f"{hybrid.name}-{digest[:16]}",
                source={"model": hybrid.name, "sha256": digest},
                progress=partial(progress, hybrid.name),
                stop=stop,
            )
        if stop.is_set():
            return None
        results[hybrid.name] = {SAMPLED: result}
    summary = summarise_benchmarks(results, statistics, words=())
    return [
        {
            "task": task,
            "from_base": list(hybrid.parts),
            **{
                key: by_model[hybrid.name][SAMPLED][key]
                for key in ("accuracy", "length", "truncated")
            },
        }
        for task, by_model in summary.items()
        for hybrid in hybrids
    ]
