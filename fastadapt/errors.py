"""The two errors that end a command with a message instead of a traceback, and a warning.

A message says what was expected, what was found, and what to type next.
"""

from __future__ import annotations


class UserError(ValueError):
    """Invalid request: an impossible value, a missing column, a wrong folder. Exit code 2."""

    exit_code = 2
    #: Whether another rank reported this error; None: the run has one process.
    is_reported: bool | None = None


class RunError(RuntimeError):
    """Failure of the work: no space, no memory, losses that are not finite. Exit code 1."""

    exit_code = 1
    #: Whether another rank reported this error; None: the run has one process.
    is_reported: bool | None = None


class ModelsChangedWarning(UserWarning):
    """A run's models have other weights or configurations than when it was trained."""


def require(fine: bool, key: str, expected: str, got: object) -> None:
    """Raise :class:`UserError` for the value ``got`` of the setting ``key`` unless ``fine``.

    Example:
        >>> require(False, "optimizer.lr", "a positive number", -1)
        Traceback (most recent call last):
        fastadapt.errors.UserError: optimizer.lr: expected a positive number, got -1
    """
    if not fine:
        raise UserError(f"{key}: expected {expected}, got {got!r}")
