"""Time limits of commands and of the processes they start; the sanitizer, with a stand-in."""

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


def test_exit_code_and_the_end_of_a_failed_commands_output() -> None:
    env = dict(os.environ)
    assert run_for(python("print('fine')"), env, 20) == {"rc": 0}
    failed = run_for(python("print('so'); raise SystemExit(3)"), env, 20)
    assert failed == {"rc": 3, "end": "so\n"}


def test_a_timeout_ends_the_command_and_its_child(tmp_path: Path) -> None:
    """The child shares the output, so killing only the parent would leave the output open."""
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "print('started'); time.sleep(60)"
    )
    start = time.monotonic()
    result = run_for(python(code), dict(os.environ), 3)
    assert time.monotonic() - start < 15
    assert result == {"rc": None, "why": "not finished in 3 s", "end": "started\n"}
    assert has_ended(int(child.read_text()))


def has_ended(pid: int) -> bool:
    """Return whether the process ends within 2 s; a zombie has ended."""
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
    """Handle SIGINT as in a terminal, or ignore it as under ``nohup ... &``."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint")
def test_an_interrupt_precedes_the_kill() -> None:
    code = (
        "import time\n"
        "try:\n    print('started')\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('half is done')"
    )
    result = run_for(python(code), dict(os.environ), 4, interrupt=True)
    assert result["rc"] is None
    assert result["end"] == "started\nhalf is done\n"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a stand-in for the tool in two CUDA folders outside the PATH; return the newer."""
    for version in ("12.4", "13.0"):
        path = tmp_path / f"cuda-{version}" / "bin" / sanitizer.TOOL
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    monkeypatch.setattr(sanitizer, "FOLDERS", str(tmp_path / "cuda*" / "bin"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


class Commands:
    """Stand in for processes: record commands and return given exit codes, or whole results."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *codes: int | dict) -> None:
        self.commands: list[tuple[list[str], float]] = []
        remaining = list(codes)

        def run(command: list[str], env: dict[str, str], seconds: float) -> dict:
            self.commands.append((command, seconds))
            code = remaining.pop(0)
            return code if isinstance(code, dict) else {"rc": code}

        monkeypatch.setattr(sanitizer, "run_for", run)


def test_each_tool_runs_after_the_kernels_within_its_time(
    tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(monkeypatch, 0, 0, 9)
    seconds = iter([450.0, 450.0, 300.0, 300.0, 110.0, 110.0])
    rows = list(sanitizer.rows("cuda", {}, lambda: next(seconds)))
    assert [(row["implementation"], row["right"]) for row in rows] == [
        ("the kernels without the tool", True),
        ("memcheck", True),
        ("racecheck", False),
    ]
    alone, memcheck, racecheck = (command for command, _ in commands.commands)
    assert alone[0] == sys.executable
    assert memcheck[:7] == [
        *(str(tool), "--tool", "memcheck", "--error-exitcode", "9"),
        *("--report-api-errors", "no"),
    ]
    assert racecheck[:6] == [str(tool), "--tool", "racecheck", "--error-exitcode", "9", alone[0]]
    assert [seconds for _, seconds in commands.commands] == [240.0, 240.0, 105.0]


def test_a_check_that_did_not_run_is_left_out_with_the_reason(
    tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Commands(monkeypatch, 0, 0)
    seconds = iter([450.0, 450.0, 200.0, 200.0, 3.0])
    *_, last = sanitizer.rows("cuda", {}, lambda: next(seconds))
    assert last == {"left_out": "no time left for racecheck"}
    Commands(monkeypatch, 1)
    (row,) = sanitizer.rows("cuda", {}, lambda: 450.0)
    assert (row["implementation"], row["right"]) == ("the kernels without the tool", False)
    assert list(sanitizer.rows("cuda", {}, float)) == [{"left_out": "no time left"}]
    tool.unlink()
    (tool.parents[2] / "cuda-12.4" / "bin" / sanitizer.TOOL).unlink()
    (row,) = sanitizer.rows("cuda", {}, float)
    assert "neither on the PATH" in row["left_out"]
    assert list(sanitizer.rows("cpu", {}, float)) == [{"left_out": f"{sanitizer.TOOL} needs a GPU"}]


def test_a_check_without_a_result_is_left_out(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = {"rc": None, "why": "not finished in 240 s", "end": ""}
    refused = {"rc": 1, "end": "========= Error: Device not supported. Please refer to ...\n"}
    Commands(monkeypatch, 0, late, refused)
    alone, *others = sanitizer.rows("cuda", {}, lambda: 450.0)
    assert alone["right"]
    assert others == [
        {"left_out": "memcheck: not finished in 240 s"},
        {"left_out": f"racecheck: {sanitizer.TOOL}: Device not supported"},
    ]
    Commands(monkeypatch, late)
    (row,) = sanitizer.rows("cuda", {}, lambda: 450.0)
    assert row == {"left_out": "the kernels without the tool: not finished in 240 s"}
