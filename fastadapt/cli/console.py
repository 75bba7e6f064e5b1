"""Printing for every command: tables on standard output, errors and notices on standard error."""

from __future__ import annotations

import codecs
import io
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fastadapt.errors import ModelsChangedWarning
from fastadapt.reporting.terminal import rich_table

#: Replacements for characters of the library's texts that an encoding lacks.
_STAND_INS = str.maketrans(
    {
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "--",
        "\N{MINUS SIGN}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{FULL BLOCK}": "#",
        "\N{GREEK SMALL LETTER EPSILON}": "epsilon",
        "\N{GREEK SMALL LETTER LAMDA}": "lambda",
        "\N{GREEK SMALL LETTER THETA}": "theta",
        "\N{DOUBLE VERTICAL LINE}": "||",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{MIDDLE DOT}": ".",
        "\N{PLUS-MINUS SIGN}": "+-",
        "\N{LESS-THAN OR EQUAL TO}": "<=",
        "\N{GREATER-THAN OR EQUAL TO}": ">=",
        "\N{RIGHTWARDS ARROW}": "->",
    }
)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded by similar ASCII text, or by Python's escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_STAND_INS)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error("fastadapt", _stand_in)


def write_any_text() -> None:
    """Let standard output and error take any text, whatever their encoding is.

    Characters that the encoding lacks are replaced: the work of a command is complete before its
    tables are printed, so that a character must not make the command fail.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastadapt")


def is_unicode(stream: Any) -> bool:
    """Return whether a stream's encoding can represent every Unicode character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def print_error(message: str) -> None:
    """Print `error: ` and the message on standard error, without invisible characters."""
    from rich.console import Console
    from rich.text import Text

    from fastadapt.reporting.visible import visible_lines

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="bold red"), Text(visible_lines(message)), sep="", end="\n")


def show_warnings() -> None:
    """Print the library's own warnings as `warning: ` and the message, each time they arise."""
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, ModelsChangedWarning):
            say(f"warning: {message}")
        else:
            shown(message, category, *where, **more)

    if shown.__name__ != show.__name__:
        warnings.showwarning = show
        warnings.simplefilter("always", ModelsChangedWarning)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> None:
    """Print a table. Columns after the first are right-aligned; left-aligned if ``left``."""
    from rich.console import Console

    # A pipe has no width: lines there are as long as they need to be.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(rich_table(head, rows, left=left))


def quiet_transformers() -> None:
    """Turn off the progress bars of transformers, which would mix with those of the commands."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def say(message: str) -> None:
    """Print a line on standard error, on rank 0 only."""
    from fastadapt.distributed.ranks import is_main

    if is_main():
        print(message, file=sys.stderr, flush=True)
