"""Modules that FSDP2 shards over two processes take the steps of whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).with_name("sharded_modules.py"))


@pytest.mark.slow
def test_sharded_modules_take_the_steps_of_whole_ones() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["adapter", "skip", "centred"]
