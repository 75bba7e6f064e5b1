"""Commands that end in time with all that they started; the sanitizer, by a stand-in."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import sanitizer
from benchmarks.processes import run_for


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_exit_code_and_the_end_of_the_output_if_it_failed() -> None:
    env = dict(os.environ)
    assert run_for(python("print('fine')"), env, 20) == {"rc": 0}
    failed = run_for(python("print('so'); raise SystemExit(3)"), env, 20)
    assert failed == {"rc": 3, "end": "so\n"}


def test_a_command_out_of_time_ends_with_what_it_started(tmp_path: Path) -> None:
    """The child holds the same pipe: killed alone, its parent would leave it waited for."""
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "print('started'); time.sleep(60)"
    )
    began = time.monotonic()
    done = run_for(python(code), dict(os.environ), 3)
    assert time.monotonic() - began < 15
    assert done == {"rc": None, "why": "not finished in 3 s", "end": "started\n"}
    assert gone(int(child.read_text()))


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody waits for."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN])
def _sigint(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in a terminal, and as in a script started with ``nohup ... &``."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint")
def test_it_may_be_asked_to_stop_before_it_is_killed() -> None:
    code = (
        "import time\n"
        "try:\n    print('started')\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('half is done')"
    )
    done = run_for(python(code), dict(os.environ), 4, interrupt=True)
    assert done["rc"] is None
    assert done["end"] == "started\nhalf is done\n"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tool in the folder of a CUDA that is on no PATH, a newer one beside an older."""
    for version in ("12.4", "13.0"):
        path = tmp_path / f"cuda-{version}" / "bin" / sanitizer.TOOL
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setattr(sanitizer, "FOLDERS", str(tmp_path / "cuda*" / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


class Commands:
    """Stands in for processes: what was started, and what each gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *codes: int) -> None:
        self.seen: list[tuple[list[str], float]] = []
        left = list(codes)

        def run(command: list[str], env: dict[str, str], seconds: float) -> dict:
            self.seen.append((command, seconds))
            return {"rc": left.pop(0)}

        monkeypatch.setattr(sanitizer, "run_for", run)


def test_each_kind_is_run_after_the_kernels_alone_and_in_time(tool, monkeypatch) -> None:
    commands = Commands(monkeypatch, 0, 0, 9)
    seconds = iter([450.0, 300.0, 110.0])
    checks = dict(sanitizer.sanitize("cuda", {}, lambda: next(seconds)))
    assert checks == {
        "memcheck": {"right": True, "ran": True, "rc": 0},
        "racecheck": {"right": False, "ran": True, "rc": 9},
    }
    alone, memcheck, racecheck = (command for command, _ in commands.seen)
    assert alone[0] == sys.executable
    assert memcheck[:7] == [
        *(str(tool), "--tool", "memcheck", "--error-exitcode", "9"),
        *("--report-api-errors", "no"),
    ]
    assert racecheck[:6] == [str(tool), "--tool", "racecheck", "--error-exitcode", "9", alone[0]]
    assert [seconds for _, seconds in commands.seen] == [240.0, 240.0, 90.0]


def test_what_did_not_run_is_not_right(tool, monkeypatch) -> None:
    Commands(monkeypatch, 0, 0)
    seconds = iter([450.0, 200.0, 20.0])
    checks = dict(sanitizer.sanitize("cuda", {}, lambda: next(seconds)))
    assert checks["racecheck"] == {"right": False, "ran": False, "why": "no time left"}
    Commands(monkeypatch, 1)
    checks = dict(sanitizer.sanitize("cuda", {}, lambda: 450.0))
    assert (checks["sanitizer"]["right"], checks["sanitizer"]["ran"]) == (False, False)
    tool.unlink()
    (tool.parents[2] / "cuda-12.4" / "bin" / sanitizer.TOOL).unlink()
    assert "neither on the PATH" in dict(sanitizer.sanitize("cuda", {}, float))["sanitizer"]["why"]
