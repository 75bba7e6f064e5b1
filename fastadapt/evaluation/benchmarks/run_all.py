"""Runs the benchmarks for every compared model."""

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
    check_prompts,
    default_tasks,
    prompt_ids,
    run_benchmarks,
)
from fastadapt.evaluation.benchmarks.scores import GREEDY, MEAN, SAMPLED, Results
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet


def complete_config(
    models: ModelSet, config: BenchmarkConfig, sampling: SamplingConfig
) -> BenchmarkConfig:
    """Complete ``config``: set ``sampling``, the runs' chat format and, if it has none, tasks.

    Raises:
        UserError: the first run records no chat format.
    """
    if models.family is None:
        raise UserError(
            f"benchmarks: no chat format recorded in {models.runs[0]}; give, as the first run, one "
            "whose config.yaml records data.family"
        )
    return replace(
        config,
        tasks=config.tasks or default_tasks(models.config.target),
        family=models.family,
        sampling=sampling,
    )


def run_models(
    models: ModelSet,
    config: BenchmarkConfig,
    folder: Path,
    progress: Callable[[str, int, int], None],
    stop: Event,
) -> Results:
    """Run the benchmarks for the target, the base, the hybrid and every run.

    Stored responses are reused. A base that cannot read the prompts is left out, with a note.

    Args:
        models: the runs.
        config: settings, from :func:`complete_config`. With ``few_shot``, the base and the hybrid
            are run in further modes, see :func:`prompt_modes`.
        folder: stores one folder per model and mode.
        progress: called with (model and mode, completed responses, total responses).
        stop: set it to stop early; the results are incomplete then.

    Raises:
        UserError: see :func:`checked_modes`; raised before anything is sampled.
    """
    results: dict[str, dict[str, dict[str, BenchmarkResult]]] = {}
    for model, modes in checked_modes(models, config).items():
        sha256 = models.fingerprint(model)
        with models.generating(model) as generates:
            for mode, settings in modes.items():
                digest = settings.fingerprint(sha256)[:16]
                result = run_benchmarks(
                    generates,
                    models.tokenizer,
                    settings,
                    folder / f"{model}-{mode.replace(', ', '-')}-{digest}",
                    source={"model": model, "sha256": sha256},
                    progress=partial(progress, f"{model}, {mode}"),
                    stop=stop,
                )
                if stop.is_set():
                    return results
                results.setdefault(model, {})[mode] = result
    return results


def checked_modes(
    models: ModelSet, config: BenchmarkConfig
) -> dict[str, dict[str, BenchmarkConfig]]:
    """Return the prompt modes of each model, and check their prompts; read no weights.

    A base that cannot read the prompts is left out, with a note.

    Raises:
        UserError: lm-eval is not installed, a benchmark's data is missing, or a prompt is longer
            than a model's context.
    """
    bos = models.base_bos if config.few_shot else ""
    checked: dict[str, dict[str, BenchmarkConfig]] = {}
    for model in ("target", *models.compared):
        modes = prompt_modes(model, config, bos)
        if model == "base":
            modes = _readable(models, modes)
        # The prompts of a run are the target's.
        for mode, settings in modes.items() if model not in models.runs else ():
            check_prompts(models.tokenizer, settings, models.sizes(model), f"{model}, {mode}")
        if modes:
            checked[model] = modes
    return checked


def prompt_modes(
    model: str, config: BenchmarkConfig, base_bos: str = ""
) -> dict[str, BenchmarkConfig]:
    """Return the benchmark settings of each prompt mode of a model (with examples or without).

    Every model has the mode ``sampled``. With ``few_shot``, the base and the hybrid also have two
    modes with examples, sampled and greedy. The base was not trained on the target's chat format,
    so no prompt opens its reasoning, and its examples are plain text after ``base_bos``.
    """
    if model == "base":
        config = replace(config, prefill="none")
    modes = {SAMPLED: replace(config, few_shot=0, examples=None)}
    if config.few_shot and model in ("base", "hybrid"):
        # Few-shot prompts make models continue with another question after their answer.
        if model == "base":
            plain = {"user": ["", ""], "assistant": ["", ""], "bos": base_bos}
            config = replace(config, family=plain)
        sampled = replace(config.sampling, stop=(*config.sampling.stop, "\nProblem:"))
        greedy = replace(sampled, temperature=0.0)
        modes[f"{config.few_shot}-shot"] = replace(config, sampling=sampled)
        modes[f"{config.few_shot}{GREEDY}"] = replace(config, sampling=greedy)
    return modes


def _readable(models: ModelSet, modes: dict[str, BenchmarkConfig]) -> dict[str, BenchmarkConfig]:
    """Return the modes whose prompts the base can read; note why it cannot read the others."""
    readable = {}
    for mode, config in modes.items():
        reason = models.base_obstacle(prompt_ids(models.tokenizer, config))
        if reason is None:
            readable[mode] = config
        else:
            models.notes[f"base, {mode}"] = f"The base has no benchmarks ({mode}): {reason}."
    return readable


def count_texts(results: Results) -> dict[str, str]:
    """Describe the numbers of questions and repetitions of each benchmark, by its name."""
    by_task = results["target"][SAMPLED]
    counts = {
        name: f"{result.n_questions} questions × {result.repetitions}"
        for name, result in by_task.items()
    }
    counts[MEAN] = f"{len(by_task)} benchmarks, each with the same weight"
    return counts
