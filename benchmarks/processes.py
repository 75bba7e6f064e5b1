"""Runs a command for so long and no longer, with everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ended"]

ROOT = Path(__file__).resolve().parent.parent
END = 4000  # characters of output that are kept
GRACE_S = 10.0


def ended(
    command: list[str], env: dict[str, str], seconds: float, *, interrupt: bool = False
) -> dict[str, Any]:
    """Exit code ``rc`` (None: it did not end in time), and the end of the output unless it is 0.

    Args:
        command: run from the checkout's root, in a process group of its own, which ends with it.
        seconds: for everything.
        interrupt: ask it to stop (as with Ctrl-C) 10 s before that, so that it can say what it did.
    """
    # A group, not a session: what ends this process's session ends that of the command too.
    own: dict[str, Any] = {"process_group": 0}
    if sys.version_info < (3, 11):
        own = {"start_new_session": True}
    process = subprocess.Popen(
        command,
        env=env | {"PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **own,
    )
    try:
        output, late = _wait(process, seconds, GRACE_S if interrupt else 0.0)
    finally:
        _end_group(process)
    if late:
        return {"rc": None, "why": f"not finished in {seconds:.0f} s", "end": output[-END:]}
    return {"rc": process.returncode, **({"end": output[-END:]} if process.returncode else {})}


def _wait(process: subprocess.Popen[str], seconds: float, grace_s: float) -> tuple[str, bool]:
    """What it printed, and whether it had to be stopped."""
    try:
        return process.communicate(timeout=max(seconds - grace_s, seconds / 2))[0], False
    except subprocess.TimeoutExpired:
        pass
    if grace_s:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=min(grace_s, seconds / 2))[0], True
        except subprocess.TimeoutExpired:
            pass
    _end_group(process)
    return process.communicate()[0], True


def _end_group(process: subprocess.Popen[str]) -> None:
    """Everything of it that still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
