"""What features do: python -m reproduce.study RUN [--output FOLDER] [--repetitions N]

Collects the features of a run if that was not done, switches selected and random sets of them, and
writes tables, plots and a page into FOLDER (``study`` in the run). Called again it goes on where it
stopped. What is done, and why so: ``reproduce/study/__init__.py``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from fastadapt.adapter.files import adapters_of
from fastadapt.cli.console import print_error, print_table, quiet_transformers
from fastadapt.cli.progress import Progress, resume_hint
from fastadapt.errors import RunError, UserError
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig
from fastadapt.evaluation.folder import opened
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.collect import collect
from fastadapt.features.store.store import Store, adapter_digest
from fastadapt.training.signals import stop_on_signals
from reproduce.study.conditions import RUN, StudyConfig
from reproduce.study.report import tables
from reproduce.study.running import CONTENTS, Study


def main(argv: list[str]) -> int:
    """The study of one run, with the defaults of ``StudyConfig`` but for the repetitions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    # Where little is left of the reasoning, a response has ten tokens, and few hesitate.
    parser.add_argument("--repetitions", type=int, default=3, help="responses per question")
    options = parser.parse_args(argv)
    output = options.output or options.run / "study"
    quiet_transformers()
    config = StudyConfig(benchmarks=BenchmarkConfig(repetitions=options.repetitions))
    result, anew = None, False
    with stop_on_signals(None) as (stop, _), Progress(sys.stderr) as progress:
        collect(options.run, progress=partial(progress, "texts collected"), stop=stop)
        if not stop.is_set():
            store = Store.open(options.run, adapter=adapter_digest(adapters_of(options.run)))
            students = ModelSet.open([options.run], [RUN])
            anew = options.overwrite
            with opened(output, overwrite=anew, contents=CONTENTS) as folder:
                result = Study(students, store, folder, config, progress, stop).run()
    if result is None:
        print(f"Stopped; what was measured is kept in {output}.")
        print(resume_hint(overwrite=anew))
        return 0
    for table in tables(result):
        print(table.title)
        print_table(table.head, table.rows)
        print(f"{table.note}\n")
    print(f"{output / 'report.html'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, RunError) as error:
        print_error(str(error))
        sys.exit(error.exit_code)
