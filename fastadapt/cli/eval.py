"""`fastadapt eval`: how faithful trained runs are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastadapt.cli.console import print_table, quiet_transformers
from fastadapt.cli.options.eval import default_output, eval_parser, parse_eval
from fastadapt.cli.progress import resume_hint, stoppable
from fastadapt.io.names import typed_path


def evaluate(argv: list[str]) -> int:
    """`fastadapt eval`."""
    if not argv or {"-h", "--help"} & set(argv):
        eval_parser().print_help()
        return 0
    config, flags = parse_eval(argv)

    from fastadapt.evaluation.comparison import Comparison
    from fastadapt.evaluation.folder import opened
    from fastadapt.evaluation.models_under_test import Students

    quiet_transformers()
    given = flags.output
    output = typed_path(given, "--output") if given else default_output(flags.runs)
    students = Students.open(
        flags.runs,
        flags.names,
        dtype=flags.dtype,
        device=flags.device,
        trust_remote_code=flags.trust_remote_code,
    )
    with (
        opened(output, overwrite=flags.overwrite) as folder,
        stoppable() as (stop, progress),
    ):
        result = Comparison(students, folder, config, progress, stop).run(flags.parts)
    if result is None:
        print(f"Stopped; what was measured is kept in {output}.")
        print(resume_hint(overwrite=flags.overwrite))
        return 0
    _print(result, output)
    return 0


def _print(result: dict[str, Any], output: Path) -> None:
    from fastadapt.reporting.tables import tables

    for table in tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print()
    for name in ("eval.json", "tables.md", "tables.tex", "plots", "report.html"):
        print(f"{name}: {(output / name).resolve()}")
