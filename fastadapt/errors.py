"""The two ways a command of this library fails.

A :class:`UserError` is a mistake in what was asked (exit code 2), a :class:`RunError` a failure
while doing it (exit code 1). Both carry a message that stands alone, without a traceback: what was
expected, what was got, and what to do.
"""

from __future__ import annotations


class UserError(ValueError):
    """What was asked cannot be done: an impossible value, a missing column, a wrong folder."""

    exit_code = 2
    told: bool | None = None  #: of a run of several processes: whether another one has told it


class RunError(RuntimeError):
    """What was asked failed on the way: no space, no memory, losses that are not finite."""

    exit_code = 1
    told: bool | None = None  #: of a run of several processes: whether another one has told it
