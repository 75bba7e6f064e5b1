"""Study a run's features: python -m reproduce.study RUN [--output FOLDER] [--repetitions N]
[--prefill thinking|none]

The command collects the run's features if necessary. It removes, adds and transfers selected and
random sets, and writes tables, plots and a page to FOLDER (default: ``study`` in the run). A second
call resumes. ``reproduce/study/__init__.py`` describes the method.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import get_args

from fastadapt.adapter.files import adapters_of
from fastadapt.cli.console import print_error, print_table, quiet_transformers
from fastadapt.cli.progress import Progress, resume_hint
from fastadapt.data.rendered import Prefill
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
    """Study one run, with the defaults of ``StudyConfig`` except for the repetitions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    # Without reasoning, a response has about ten tokens and rarely hesitates: repeat questions.
    parser.add_argument("--repetitions", type=int, default=3, help="responses per question")
    help_of_prefill = "whether prompts open the reasoning; default: as the family's own template"
    parser.add_argument("--prefill", choices=get_args(Prefill), help=help_of_prefill)
    options = parser.parse_args(argv)
    output = options.output or options.run / "study"
    quiet_transformers()
    benchmarks = BenchmarkConfig(repetitions=options.repetitions, prefill=options.prefill)
    config = StudyConfig(benchmarks=benchmarks)
    result, is_overwritten = None, False
    with stop_on_signals(None) as (stop, _), Progress(sys.stderr) as progress:
        collect(options.run, progress=partial(progress, "texts collected"), stop=stop)
        if not stop.is_set():
            store = Store.open(options.run, adapter=adapter_digest(adapters_of(options.run)))
            students = ModelSet.open([options.run], [RUN])
            is_overwritten = options.overwrite
            with opened(output, overwrite=is_overwritten, contents=CONTENTS) as folder:
                result = Study(students, store, folder, config, progress, stop).run()
    if result is None:
        print(f"Stopped; partial results are in {output}.")
        print(resume_hint(overwrite=is_overwritten))
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
