"""Claims the folder of an evaluation, and writes and reads its results.

::

    texts/             responses of the target to held-out prompts
    outputs/           KL and top-1 agreement of every model, per position of the texts
    partial/           KL and top-1 errors with part of the layers replaced, summed per text
    speed.json         speed of generation of each model
    benchmarks/        responses of every model to questions, with their grades
    eval.json          all results, with intervals
    tables.md, tables.tex, plots/*.png, report.html
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.result_schema import (
    BenchmarksPart,
    OutputsPart,
    PartialPart,
    SpeedPart,
    check_sections,
)
from fastadapt.io.atomic import disk_errors, remove, replacing, sweep_tree
from fastadapt.io.documents import DocumentError, read_json, same
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace
from fastadapt.reporting.figures import Figure, figures
from fastadapt.reporting.page import write_page
from fastadapt.reporting.rendering import write_png
from fastadapt.reporting.seed_tables import seed_tables
from fastadapt.reporting.tables import Table, as_latex, as_markdown, tables

LOCK = ".lock"
#: Advice of errors of the disk.
RESUME_ADVICE = (
    "Finished measurements are intact. Run the same command again, without --overwrite, to resume."
)
#: All entries that the folder may have.
CONTENTS = (
    LOCK,
    "texts",
    "outputs",
    "partial",
    "speed.json",
    "benchmarks",
    "eval.json",
    "tables.md",
    "tables.tex",
    "plots",
    "report.html",
)

Part = Literal["outputs", "partial", "speed", "benchmarks"]
PARTS: tuple[Part, ...] = ("outputs", "partial", "speed", "benchmarks")
#: Sections of each part in ``eval.json``.
_SECTIONS: Mapping[Part, Any] = {
    "outputs": OutputsPart,
    "partial": PartialPart,
    "speed": SpeedPart,
    "benchmarks": BenchmarksPart,
}
#: Sections that several parts have.
_SHARED = {"texts", "notes"}


def read_part(folder: Path, part: Part, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a part in ``eval.json`` that ``result`` lacks.

    Returns an empty dict if the file has other models, runs or settings than ``result``.

    Args:
        folder: folder of the evaluation.
        part: a part that was not measured this time.
        result: the new contents of the file.

    Raises:
        UserError: the file or a section of the part is damaged.
    """
    path = folder / "eval.json"
    if not has_file(path):
        return {}
    try:
        old = read_json(path, dict[str, Any])
        for about in ("schema_version", "pair", "fingerprints", "settings"):
            if not same(old.get(about), json.loads(json.dumps(result[about]))):
                return {}
        schema = _SECTIONS[part]
        sections = {name: old[name] for name in schema.__annotations__ if name in old}
        if not sections.keys() - _SHARED:
            return {}
        check_sections(sections, schema, str(path))
    except DocumentError as error:
        raise UserError(
            f"{error}. Remove {path} and run the command again with all --parts: measurements in "
            "other files are reused."
        ) from error
    return {name: section for name, section in sections.items() if name not in result}


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``eval.json``, and its tables, plots and page, into an evaluation's folder."""
    present(result, tables_of(result), figures(result), folder, "evaluation", "eval.json")


def tables_of(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ``eval.json``: those of runs, then those of seeds."""
    return [*tables(result), *seed_tables(result)]


def present(
    result: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    folder: Path,
    subject: str,
    name: str,
) -> None:
    """Write a result as JSON, its tables as Markdown and LaTeX, its plots as PNG, and a page.

    Args:
        result: has the keys ``pair``, ``settings`` and ``versions``.
        tables, figures: tables and plots of the result.
        folder: folder to write into.
        subject: subject of the page, in one word.
        name: name of the JSON file.

    Raises:
        RunError: the folder cannot be written.
    """
    with disk_errors(folder, RESUME_ADVICE):
        with replacing(folder / name) as staged:
            text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
            staged.write_text(text + "\n", encoding="utf-8")
        for name, text in (("tables.md", as_markdown(tables)), ("tables.tex", as_latex(tables))):
            with replacing(folder / name) as staged:
                staged.write_text(text, encoding="utf-8")
        with replacing(folder / "plots") as staged:
            staged.mkdir()
            for figure in figures:
                write_png(figure, staged / f"{figure.key}.png")
        write_page(result, tables, figures, folder / "report.html", subject)


@contextmanager
def opened(output: Path, *, contents: Sequence[str] = CONTENTS) -> Iterator[Path]:
    """Claim the folder of an evaluation for this process, and yield it.

    Args:
        output: the folder; created if absent.
        contents: names of the entries that it may have.

    Raises:
        UserError: another process uses the folder, or it has other entries.
        RunError: the folder cannot be written.
    """
    workspace = Workspace(
        output, "--output", "evaluating into", contents, advice=RESUME_ADVICE, unusable=RunError
    )
    if foreign := sorted(set(workspace.names()) - set(contents)):
        raise workspace.foreign("holds files that are not an evaluation", foreign)
    with workspace.claimed(), workspace.disk_errors():
        sweep_tree(output)
        yield output


def clear(folder: Path) -> None:
    """Remove the contents of a folder that :func:`opened` has claimed.

    Call it after the checks of a command with ``--overwrite``, so that a mistake loses nothing.
    """
    for path in list(folder.iterdir()):
        if path.name != LOCK:
            remove(path)
