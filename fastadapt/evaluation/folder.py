"""The folder of an evaluation: who may write there, and what is written at the end.

::

    texts/             responses of the target to held-out prompts
    outputs/           per position of these, every student's KL and top-1 agreement
    partial/           the same where only some layers are replaced, summed per text
    speed.json         how fast each model generates
    benchmarks/        responses of every model to questions, and how they were judged
    eval.json          what came out, with intervals
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
from fastadapt.reporting.tables import Table, as_latex, as_markdown, tables

LOCK = ".lock"
#: What the message of a full disk ends with.
GO_ON = "What was measured before is intact: run the same command again."
#: Everything that is ever in the folder.
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
#: What each part has in ``eval.json``.
_SECTIONS: Mapping[Part, Any] = {
    "outputs": OutputsPart,
    "partial": PartialPart,
    "speed": SpeedPart,
    "benchmarks": BenchmarksPart,
}
#: Sections that other parts have too.
_SHARED = {"texts"}


def kept_part(folder: Path, part: Part, result: Mapping[str, Any]) -> dict[str, Any]:
    """What ``eval.json`` has of a part, if it is of the same models, runs and settings.

    Args:
        folder: of the evaluation.
        part: one that was not asked for this time.
        result: the new contents, as far as they are there.

    Raises:
        UserError: the file is damaged, or what it has of the part is.
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
            f"{error}. Remove {path} and evaluate all --parts again: what was measured beside it "
            "is not measured anew."
        ) from error
    return {name: section for name, section in sections.items() if name not in result}


def write(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``eval.json`` and everything that is made of it."""
    present(result, tables(result), figures(result), folder, "evaluation", "eval.json")


def present(
    result: Mapping[str, Any],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    folder: Path,
    what: str,
    name: str,
) -> None:
    """Write a result as JSON, its tables as Markdown and LaTeX, its plots, and a page of all.

    Args:
        result: with ``pair``, ``settings`` and ``versions``.
        tables, figures: of the result.
        folder: to write into.
        what: the result is, in a word.
        name: of the JSON file.

    Raises:
        RunError: the folder cannot be written.
    """
    with disk_errors(folder, GO_ON):
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
        write_page(result, tables, figures, folder / "report.html", what)


@contextmanager
def opened(
    output: Path, *, overwrite: bool = False, contents: Sequence[str] = CONTENTS
) -> Iterator[Path]:
    """The folder of an evaluation, for this process alone; ``contents`` may be in it.

    Raises:
        UserError: it is in use, cannot be written, or holds something else.
    """
    workspace = Workspace(
        output, "--output", "evaluating into", contents, advice=GO_ON, unusable=RunError
    )
    if foreign := sorted(set(workspace.names()) - set(contents)):
        raise workspace.foreign("holds something that is no evaluation", foreign)
    with workspace.claimed(), workspace.disk_errors():
        sweep_tree(output)
        for path in list(output.iterdir()) if overwrite else ():
            if path.name != LOCK:
                remove(path)
        yield output
