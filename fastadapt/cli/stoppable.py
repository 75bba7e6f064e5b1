"""What every long command has: a bar, and a signal that ends it with what is done kept."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastadapt.cli.progress import EvalProgress


def go_on(*, overwrite: bool = False) -> str:
    """How a command that was stopped is gone on with; with ``--overwrite`` it would begin anew."""
    return f"Go on with the same command{', without --overwrite' if overwrite else ''}."


@contextmanager
def under_way() -> Iterator[tuple[Event, EvalProgress]]:
    """A bar, and an event that Ctrl-C and SIGTERM set."""
    from fastadapt.cli.progress import EvalProgress
    from fastadapt.training.signals import stop_on_signals

    with stop_on_signals(None) as (stop, _), EvalProgress(sys.stderr) as progress:
        yield stop, progress
