"""Open files that anyone may have put there: regular ones alone."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; a pipe, which would wait for a writer, or a device is an error.

    Raises:
        OSError: it cannot be opened, or is no regular file.

    Example:
        >>> open_regular("/dev/zero")
        Traceback (most recent call last):
        OSError: [Errno 22] Not a regular file: '/dev/zero'
    """
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb", opener=_without_waiting))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        opened.pop_all()
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
