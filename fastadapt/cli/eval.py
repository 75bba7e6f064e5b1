"""Measure runs: `fastadapt eval`, their faithfulness; `contrast`, P(word) at labelled places."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from fastadapt.cli.console import print_table
from fastadapt.cli.parser import Typed
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.effects.contrast import ContrastConfig
from fastadapt.evaluation.comparison import Comparison, EvalConfig
from fastadapt.evaluation.folder import PARTS, Part, opened
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.io.names import typed_path

#: Settings of a component that the evaluation sets itself.
SKIPPED = {"benchmarks": {"sampling", "family"}}


def evaluate(
    runs: list[str],
    *,
    output: str | None = None,
    names: list[str] | None = None,
    parts: list[Literal[PARTS]] | None = None,  # type: ignore[valid-type]
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    config: Annotated[EvalConfig, Typed(skip=SKIPPED)],
) -> int:
    """Measure how faithful trained runs of one pair are to its target, compared with the base and
    the hybrid, and write tables, plots and a report. The same command resumes an unfinished
    evaluation.

    Args:
        runs: folders of runs
        output: folder to write; by default eval in the run, or beside the runs if there are several
        names: names of the runs, as [a, b]; by default those of their folders
        parts: parts to measure: any of outputs, partial, speed, benchmarks; by default the first
            three, which need no network, and benchmarks if one of their settings is typed; parts
            measured before with the same runs and settings stay in eval.json
        overwrite: remove the contents of --output first
    """
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.reporting.tables import tables

    folder = typed_path(output, "--output") if output else default_output(runs)
    students = ModelSet.open(
        runs, names, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    chosen = default_parts(config) if parts is None else parts
    with opened(folder, overwrite=overwrite) as out, stoppable() as (stop, progress):
        result = Comparison(students, out, config, progress, stop).run(chosen)
    if result is None:
        print(f"Stopped; finished measurements are saved in {folder}.")
        print(resume_hint(overwrite=overwrite))
        return 0
    for table in tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    for note in result.get("notes", {}).values():
        print(f"{note}\n")
    for name in ("eval.json", "tables.md", "tables.tex", "plots", "report.html"):
        print(f"{name}: {(folder / name).resolve()}")
    return 0


def default_parts(config: EvalConfig) -> list[Part]:
    """Return the parts that need no network, and benchmarks if a setting of them is changed."""
    requested = config.benchmarks != EvalConfig().benchmarks
    return [part for part in PARTS if part != "benchmarks" or requested]


def default_output(runs: Sequence[str]) -> Path:
    """Return the default output: ``eval`` in the only run, or in the folder that holds all runs."""
    folders = [Path(os.path.realpath(typed_path(run, "run"))) for run in runs]
    if len(folders) == 1:
        return folders[0] / "eval"
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "eval"


def contrast(
    run: str,
    *,
    responses: str | None = None,
    output: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    config: Annotated[ContrastConfig, Typed(flags=True)],
    statistics: BootstrapConfig,
) -> int:
    """Compare the probability of words at labelled places of texts with that at matched places, for
    base, hybrid, adapter, target and interventions on sets of features. Nothing is sampled. The
    same command resumes an unfinished measurement.

    Args:
        run: a run; with --features, one with collected features
        responses: a file of the target's responses, such as one in texts of an evaluation; by
            default the held-out data of the run
        output: folder to write; by default contrast in the run
        overwrite: remove the contents of --output first
    """
    from fastadapt.effects.contrast import CONTENTS, RESULT
    from fastadapt.effects.contrast import contrast as measure_contrast
    from fastadapt.evaluation.contrast.report import contrast_tables
    from fastadapt.features.loading import load_run

    folder = typed_path(output, "--output") if output else typed_path(run, "run") / "contrast"
    loaded = load_run(run, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with (
        opened(folder, overwrite=overwrite, contents=CONTENTS) as out,
        stoppable() as (stop, progress),
    ):
        result = measure_contrast(
            loaded, out, config, statistics, responses=responses, progress=progress, stop=stop
        )
    if result is None:
        print(f"Stopped; finished measurements are saved in {folder}.")
        print(resume_hint(overwrite=overwrite))
        return 0
    for table in contrast_tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print(f"{table.note}\n" if table.note else "")
    for name in (RESULT, "tables.md", "tables.tex", "plots", "report.html"):
        print(f"{name}: {(folder / name).resolve()}")
    return 0
