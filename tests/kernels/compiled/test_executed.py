"""Execute the compiled kernels on this CPU: no fault, results within the budget, faults reported.

The quick tests of Triton kernels run here and not in Triton's interpreter, which finds less and
takes as long. ``make prove-kernels`` runs all of them; see ``tests/kernels/executed.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]
#: Tests of every kernel. The others in the folder run in `make prove-kernels`.
TESTS = (
    "test_faults.py",
    "test_transcode.py",
    "test_transcoder_triton.py",
    "test_linear_kl_triton.py",
    "test_linear_kl_edges.py",
    "test_nmse.py",
    "test_frozen.py",
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(KERNELS / test) for test in TESTS]
    ended = subprocess.run(
        [*command, "-m", "not slow", "-k", "triton or faults"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert " 0 not checked for races" in ended.stdout
    assert "kernels without a launch: none" in ended.stdout
