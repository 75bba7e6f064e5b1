"""Execute the compiled kernels on this CPU: no fault, results within the budget, faults reported.

``make prove-kernels`` runs every test of a Triton kernel in this way; see
``tests/kernels/executed.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]
TESTS = (
    "test_faults.py",
    "test_transcoder_triton.py::test_kernels_keep_the_budget",
    "test_linear_kl.py::test_triton_is_within_the_budget_of_the_oracle",
)


def test_compiled_kernels_are_right_and_faults_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("ttsem", reason="ttsem executes compiled kernels")
    environment = os.environ | {
        "FASTADAPT_IR": "ttir",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("FASTADAPT_PROOF", None)
    tests = [str(KERNELS / test) for test in TESTS]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert " 0 not checked for races" in ended.stdout
