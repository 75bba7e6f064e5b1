"""Runs a command for a limited time, with everything that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["run_for"]

ROOT = Path(__file__).resolve().parent.parent
END = 4000  # characters of output in a result
GRACE_S = 10.0
# Signals that are ignored stay ignored in a child, as SIGINT is under `nohup ... &`.
DEFAULTS = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
# A group, not a session: what ends this process's session ends that of the command too.
START = DEFAULTS + "os.setpgid(0, 0); os.execvp(sys.argv[1], sys.argv[1:])"


def run_for(
    command: list[str], env: dict[str, str], seconds: float, *, interrupt: bool = False
) -> dict[str, Any]:
    """Exit code ``rc`` (None: not finished in time), and the end of the output unless it is 0.

    Args:
        command: run from the checkout's root, in a process group of its own, which ends with it.
        seconds: for everything.
        interrupt: send SIGINT (as Ctrl-C does) 10 s before that, so that the command can report.
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
            process.kill()  # it may not have its group yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        output.seek(0)
        end = output.read().decode(errors="replace")[-END:]
    if is_late:
        return {"rc": None, "why": f"not finished in {seconds:.0f} s", "end": end}
    return {"rc": code, **({"end": end} if code else {})}
