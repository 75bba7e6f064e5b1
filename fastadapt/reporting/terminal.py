"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WIDTH = 120  # characters per line of a table as text


def rich_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> Any:
    """Return rich's table.

    Columns after the first are right-aligned, except words without a head and all if ``left``.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        is_right = bool(i and name and not left)
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: no cell is read as rich's markup
    return table


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """Return a table as lines of text, without colours; see :func:`rich_table`.

    Example:
        >>> print(table_text(["model", "KL"], [["hybrid", "1.49"], ["adapter", "0.105"]]))
        model   ┃    KL
        ━━━━━━━━╇━━━━━━
        hybrid  │  1.49
        adapter │ 0.105
    """
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    # In a notebook, rich would display the table and write nothing to the file.
    console = Console(
        file=file, width=_WIDTH, highlight=False, force_terminal=False, force_jupyter=False
    )
    console.print(rich_table(head, rows, left=left))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
