"""Where Triton's kernels run in these tests.

On a GPU if there is one. Else in Triton's interpreter, or compiled and executed on the CPU if
FASTADAPT_IR is set (see :mod:`executed`).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import executed
import pytest
import torch

RECORD = executed.start() if executed.STAGE else None
HERE = Path(__file__).parent
PROOF = os.environ.get("FASTADAPT_PROOF") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Do not interpret kernels where the same tests execute them compiled."""
    if RECORD is not None or torch.cuda.is_available() or find_spec("ttsem") is None:
        return
    for item in items:
        if item.path.is_relative_to(HERE) and "triton" in item.nodeid:
            item.add_marker(pytest.mark.slow)
            if PROOF and not item.path.is_relative_to(HERE / "compiled"):
                item.add_marker(pytest.mark.skip("`make prove-kernels` executes it compiled"))


@pytest.fixture(scope="session")
def device() -> str:
    """Device of Triton kernels: "cuda", or "cpu" without a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send a worker's record to the process that reports; fail if a kernel was not executed."""
    if RECORD is None:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["executed"] = RECORD.as_tuple()
    elif executed.EVERY_KERNEL and (RECORD.missing() or RECORD.unchecked):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if RECORD is not None and "executed" in getattr(node, "workeroutput", {}):
        RECORD.add(*node.workeroutput["executed"])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RECORD is not None:
        for line in RECORD.lines():
            terminalreporter.write_line(line)
