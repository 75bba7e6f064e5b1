"""Time limits: of a command and all processes that it started, and of code of this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["OutOfTime", "interrupted_after", "run_for"]

ROOT = Path(__file__).resolve().parent.parent
END = 4000  # characters at the end of the output to record
GRACE_S = 10.0
# Children inherit ignored signals; SIGINT is ignored under `nohup ... &`.
DEFAULTS = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
# A process group instead of a session, so that ending this process's session ends the command.
START = DEFAULTS + "os.setpgid(0, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class OutOfTime(BaseException):
    """The time of a block of code ended; not an Exception, which code may catch and continue."""


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after ``seconds``, or once a call into C returns; repeatedly."""

    def interrupt(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_for(
    command: list[str], env: dict[str, str], seconds: float, *, interrupt: bool = False
) -> dict[str, Any]:
    """Run a command; return the exit code ``rc`` and, unless it is 0, the ``end`` of the output.

    ``rc`` is None, with the reason ``why``, if the command did not finish in time.

    Args:
        command: run in the checkout's root, in a new process group that is killed at the end.
        env: environment of the command.
        seconds: time limit.
        interrupt: send SIGINT (Ctrl-C) 10 s before the limit, so that the command can report.
    """
    grace_s = min(GRACE_S, seconds / 2) if interrupt else 0.0
    is_late = False
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-ISc", START, *command],
            env=env | {"PYTHONUNBUFFERED": "1"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(seconds - grace_s)
        except subprocess.TimeoutExpired:
            is_late = True
            if interrupt:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
        finally:
            process.kill()  # the process may not have created its group yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        output.seek(0)
        end = output.read().decode(errors="replace")[-END:]
    if is_late:
        return {"rc": None, "why": f"not finished in {seconds:.0f} s", "end": end}
    return {"rc": code, **({"end": end} if code else {})}
