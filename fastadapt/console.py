"""What every command prints with: tables and lines on standard output, errors beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastadapt.ranks import leads


def print_error(message: str) -> None:
    """`error: ` and the message, on standard error."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="bold red"), Text(message), sep="", end="\n")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """A table on standard output; all columns but the first to the right, unless ``left``."""
    # A pipe has no width: lines there are as long as they need to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i and not left else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def quiet_transformers() -> None:
    """No bars of transformers' own, which would cross ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def say(message: str) -> None:
    """A line on standard error, of rank 0 alone."""
    if leads():
        print(message, file=sys.stderr, flush=True)
