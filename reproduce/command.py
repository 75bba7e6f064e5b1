"""Run the command of a reproduction with exit codes and messages as those of ``fastadapt``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from fastadapt.cli.console import print_error
from fastadapt.errors import RunError, UserError


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Exit with the code that ``main`` returns for the typed arguments, or with that of its error.

    The message of a :class:`UserError` or :class:`RunError` is printed without a traceback.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, RunError) as error:
        print_error(str(error))
        sys.exit(error.exit_code)
