"""`fastadapt eval` and `fastadapt study`: measure runs, and what their features do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from fastadapt.cli.console import print_table, say
from fastadapt.cli.parser import Typed
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.errors import UserError
from fastadapt.evaluation.comparison import Comparison, EvalConfig
from fastadapt.evaluation.folder import PARTS, Part, clear, opened, tables_of
from fastadapt.io.names import has_file, typed_path
from fastadapt.study.conditions import PAPER, RUN, ArmsConfig, StudyConfig

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
    the hybrid, and write tables, plots and a report. The same command, without --overwrite,
    resumes an unfinished evaluation.

    Args:
        runs: folders of runs
        output: folder to write; by default eval in the run, or beside the runs if there are several
        names: names of the runs, as [a, b]; by default those of their folders
        parts: parts to measure: any of outputs, partial, speed, benchmarks; by default the first
            three, which need no network, and benchmarks if one of their settings is typed; parts
            measured before with the same runs and settings stay in eval.json
        overwrite: remove the contents of --output first, once the settings are checked
    """
    from fastadapt.evaluation.models_under_test import ModelSet

    folder = typed_path(output, "--output") if output else default_output(runs)
    students = ModelSet.open(
        runs, names, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    chosen = default_parts(config) if parts is None else parts
    with opened(folder) as out, stoppable() as (stop, progress):
        comparison = Comparison(students, out, config, progress, stop)
        result = comparison.run(chosen, overwrite=overwrite)
    if result is None:
        print(f"Stopped; finished measurements are saved in {folder}.")
        print(resume_hint(overwrite=overwrite))
        return 0
    for table in tables_of(result):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    for note in result.get("notes", {}).values():
        print(f"{note}\n")
    for name in ("eval.json", "tables.md", "tables.tex", "plots", "report.html"):
        print(f"{name}: {(folder / name).resolve()}")
    return 0


def default_parts(config: EvalConfig) -> list[Part]:
    """Return all parts of an evaluation, ``benchmarks`` only if one of its settings is changed."""
    requested = config.benchmarks != EvalConfig().benchmarks
    return [part for part in PARTS if part != "benchmarks" or requested]


def default_output(runs: Sequence[str]) -> Path:
    """Return the default output: ``eval`` in the only run, or in the folder that holds all runs."""
    folders = [Path(os.path.realpath(typed_path(run, "run"))) for run in runs]
    if len(folders) == 1:
        return folders[0] / "eval"
    return Path(os.path.commonpath([folder.parent for folder in folders])) / "eval"


def study(
    run: str,
    *,
    output: str | None = None,
    paper: bool = False,
    dry_run: Annotated[bool, Typed("--dry-run")] = False,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    config: Annotated[StudyConfig, Typed(skip=SKIPPED)],
) -> int:
    """Remove, add and transfer a run's features of hesitation and of the template, beside random
    sets and the adapter's bias alone, and measure what they do on benchmarks: tables, plots and a
    page. Features are collected if the run has none; those that it has are used, whatever the
    settings of their collection. The same command, without --overwrite,
    resumes an unfinished study.

    Args:
        run: folder of a finished run
        output: folder to write; by default study in the run
        paper: compare what arXiv 2602.20904 compares, in place of the settings --study.*
        dry_run: print the number of arms and responses, and end
        overwrite: remove the contents of --output first, once the settings are checked
    """
    from fastadapt.adapter.files import adapter_digest, adapters_of
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.features.collect import collect
    from fastadapt.features.store.schema import MANIFEST
    from fastadapt.features.store.store import Store
    from fastadapt.study.report import tables
    from fastadapt.study.running import CONTENTS, Study

    if paper and config.study != ArmsConfig():
        raise UserError("--paper sets all settings --study.*; leave out one or the other")
    config = replace(config, study=PAPER) if paper else config
    folder = typed_path(output, "--output") if output else typed_path(run, "run") / "study"
    result, is_overwritten = None, False
    with stoppable() as (stop, progress):
        if not has_file(typed_path(run, "run") / "features" / MANIFEST):
            collect(
                run,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=partial(progress, "texts collected"),
                stop=stop,
            )
        if not stop.is_set():
            store = Store.open(run, adapter=adapter_digest(adapters_of(run)))
            store.shape("adapter")  # an error if only neurons were collected
            students = ModelSet.open(
                [run], [RUN], dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
            prepared = Study(students, store, folder, config, progress, stop)
            if dry_run:
                print(prepared.cost().words)
                return 0
            is_overwritten = overwrite
            with opened(folder, contents=CONTENTS):
                if overwrite:
                    prepared.check()
                    clear(folder)
                say(prepared.cost().words)
                result = prepared.run()
    if result is None:
        print(f"Stopped; finished responses are saved in {folder}.")
        print(resume_hint(overwrite=is_overwritten))
        return 0
    for table in tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print(f"{table.note}\n")
    for name in ("study.json", "tables.md", "tables.tex", "plots", "report.html"):
        print(f"{name}: {(folder / name).resolve()}")
    return 0
