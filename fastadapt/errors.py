"""The two errors that a command of this library ends with.

Both carry a message that is printed without a traceback: what was expected, what was found, what to
do next.
"""

from __future__ import annotations


class UserError(ValueError):
    """An invalid request: an impossible value, a missing column, a wrong folder. Exit code 2."""

    exit_code = 2
    #: Whether another rank reported this error; None: the run has one process.
    is_reported: bool | None = None


class RunError(RuntimeError):
    """A failure while working: no space, no memory, losses that are not finite. Exit code 1."""

    exit_code = 1
    #: Whether another rank reported this error; None: the run has one process.
    is_reported: bool | None = None
