"""`fastadapt data prepare`: training and validation conversations from a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastadapt.cli.console import print_table
from fastadapt.cli.parser import resume_command
from fastadapt.cli.progress import stoppable
from fastadapt.data.prepare.selection import PrepareConfig


def prepare(
    source: str = PrepareConfig.source,
    *,
    config: PrepareConfig,
    resume: bool = False,
    overwrite: bool = False,
    allow_fewer: bool = False,  # read through the configuration, like the source
    trust_remote_code: bool = False,
    argv: list[str],
) -> int:
    """Select training and validation conversations from a data set: streamed, filtered, drawn by
    domain in a seeded order, with no prompt in both files. Without options, repeat the selection
    of arXiv 2602.20904.

    Args:
        source: hub id, or .jsonl or .parquet file, or folder of such files
        resume: resume the unfinished selection in --output
        overwrite: remove the selection in --output first
        allow_fewer: take fewer conversations where a domain cannot fill its quota
    """
    from fastadapt.data.prepare import prepare as select
    from fastadapt.data.prepare.report import summary
    from fastadapt.organism import resolve

    config = dataclasses.replace(config, tokenizer=resolve(config.tokenizer))
    with stoppable() as (stop, progress):
        result = select(
            config,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            sink=progress.record,
            stop=stop,
        )
    if result["interrupted"]:
        print(f"Stopped after {result['rows']:,} rows, which are saved.")
        print(f"Resume with: {resume_command(argv, ('data', 'prepare'))}")
        return 0
    for head, rows in summary(result):
        print_table(head, rows)
        print()
    for name in result["files"]:
        print(f"{name}: {(Path(result['output']) / name).resolve()}")
    return 0
