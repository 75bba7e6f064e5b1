"""Open regular files only. The files are untrusted."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, without blocking on a pipe that has no writer.

    Raises:
        OSError: the file cannot be opened, or is no regular file.

    Example:
        >>> open_regular("/dev/zero")
        Traceback (most recent call last):
        OSError: [Errno 22] Not a regular file: '/dev/zero'
    """
    with ExitStack() as opened:
        file = opened.enter_context(open(path, "rb", opener=_open_nonblocking))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        opened.pop_all()
    return file


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
