"""The benchmarks' questions, put to every model that is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import (
    BenchmarkConfig,
    BenchmarkResult,
    run_benchmarks,
    tasks_of,
)
from fastadapt.evaluation.benchmarks.scores import MEAN, SAMPLED, Results
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import Students


def asked_of(
    students: Students, config: BenchmarkConfig, sampling: SamplingConfig
) -> BenchmarkConfig:
    """``config`` with the pair's own benchmarks where it names none, and how the pair is asked.

    Raises:
        UserError: the runs do not say how conversations were rendered, which a guess may not do.
    """
    if students.family is None:
        raise UserError(
            f"benchmarks: {students.runs[0]} does not say in which family's form conversations "
            "were rendered in its training; give the folder of a run that does first"
        )
    return replace(
        config,
        tasks=config.tasks or tasks_of(students.config.target),
        family=students.family,
        sampling=sampling,
    )


def ask(
    students: Students,
    config: BenchmarkConfig,
    folder: Path,
    tell: Callable[[str, int, int], None],
    stop: Event,
) -> Results:
    """Ask target, base, hybrid and every run, or read what they answered before.

    Args:
        students: the runs.
        config: of :func:`asked_of`; with ``few_shot`` base and hybrid are asked in other ways too.
        folder: of a folder per model and way.
        tell: called with (model and way, responses, responses wanted).
        stop: ends the call early; what is returned is not whole then.
    """
    results: dict[str, dict[str, dict[str, BenchmarkResult]]] = {}
    for model in ("target", *students.students):
        sha256 = students.fingerprint(model)
        with students.generating(model) as generates:
            for way, asked in ways_of_asking(model, config).items():
                found = run_benchmarks(
                    generates,
                    students.tokenizer,
                    asked,
                    folder / f"{model}-{way.replace(', ', '-')}-{asked.fingerprint(sha256)[:16]}",
                    source={"model": model, "sha256": sha256},
                    progress=partial(tell, f"{model}, {way}"),
                    stop=stop,
                )
                if stop.is_set():
                    return results
                results.setdefault(model, {})[way] = found
    return results


def ways_of_asking(model: str, config: BenchmarkConfig) -> dict[str, BenchmarkConfig]:
    """How a model is asked: sampled; base and hybrid also with examples, and greedily."""
    ways = {SAMPLED: replace(config, few_shot=0)}
    if config.few_shot and model in ("base", "hybrid"):
        # A model that goes on after its answer with a question of its own is not judged on that.
        drawn = replace(config.sampling, stop=(*config.sampling.stop, "\nProblem:"))
        greedy = replace(drawn, temperature=0.0)
        ways[f"{config.few_shot}-shot"] = replace(config, sampling=drawn)
        ways[f"{config.few_shot}-shot, greedy"] = replace(config, sampling=greedy)
    return ways


def counts_of(results: Results) -> dict[str, str]:
    """How much was asked, by benchmark, in words."""
    of_target = results["target"][SAMPLED]
    counts = {
        name: f"{result.n_questions} questions × {result.repetitions}"
        for name, result in of_target.items()
    }
    counts[MEAN] = f"{len(of_target)} benchmarks, each with the same weight"
    return counts
