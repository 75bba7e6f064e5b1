"""Execute the compiled kernels on this CPU: no fault, results within the budget, faults reported.

Here every kernel is launched, and two of five faults are made; ``make prove-kernels`` executes
all tests of Triton kernels. See ``tests/kernels/executed.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]
#: Of the tests that launch every kernel, enough to launch each, and each activation in two ways.
CHOSEN = (
    "not plan0-True and not plan1-False and not products_of_tiles "
    "and not (keeps_the_budget and (batch_topk or jumprelu or threshold))"
)
FAULTS = "without_a_fault or programs or never"


def execute(folder: Path, *arguments: str) -> str:
    """Run tests of ``tests/kernels`` on compiled kernels; return the output."""
    pytest.importorskip("ttsem", reason="ttsem executes compiled kernels")
    environment = os.environ | {
        "FASTADAPT_IR": "ttir",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(folder),
    }
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("FASTADAPT_PROOF", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    return ended.stdout


def test_every_kernel_is_right_and_without_a_fault(tmp_path: Path) -> None:
    ignored = KERNELS / "compiled"
    output = execute(
        tmp_path,
        str(KERNELS),
        f"--ignore={ignored}",
        *("-m", "every_kernel and not slow"),
        *("-k", CHOSEN),
    )
    assert " 0 not checked for races" in output
    assert "kernels without a launch: none" in output


@pytest.mark.slow
def test_faults_are_reported(tmp_path: Path) -> None:
    output = execute(tmp_path, str(KERNELS / "test_faults.py"), "-k", FAULTS)
    assert "3 passed" in output
    assert "skipped" not in output
