"""`fastadapt contrast`: P(word) at labelled positions, for every model and intervention."""

from __future__ import annotations

from typing import Annotated

from fastadapt.cli.console import print_table
from fastadapt.cli.parser import Typed
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.effects.contrast import ContrastConfig
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.io.names import typed_path


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
    """Compare the probability of words at labelled positions of texts with that at matched
    positions, for base, hybrid, adapter, target and interventions on sets of features. Nothing is
    sampled. The same command, without --overwrite, resumes an unfinished measurement.

    Args:
        run: a run; with --features, one with collected features
        responses: a file of the target's responses, such as one in texts of an evaluation; by
            default the held-out data of the run
        output: folder to write; by default contrast in the run
        overwrite: remove the contents of --output first, once the settings are checked
    """
    from fastadapt.effects.contrast import CONTENTS, RESULT
    from fastadapt.effects.contrast import contrast as measure_contrast
    from fastadapt.effects.run import load
    from fastadapt.evaluation.contrast.report import contrast_tables
    from fastadapt.evaluation.folder import opened

    folder = typed_path(output, "--output") if output else typed_path(run, "run") / "contrast"
    loaded = load(run, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _ = loaded.model  # an error in the models must not change the folder
    with (
        opened(folder, contents=CONTENTS) as out,
        stoppable() as (stop, progress),
    ):
        result = measure_contrast(
            loaded,
            out,
            config,
            statistics,
            responses=responses,
            overwrite=overwrite,
            progress=progress,
            stop=stop,
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
