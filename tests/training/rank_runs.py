"""Train several configurations, one after the other, on the ranks that torchrun started.

Run as a program, alone or under torchrun: ``rank_runs.py CONFIG.yaml ...``. A configuration whose
folder holds a run already is resumed. ``CONFIG.yaml:STEP`` stops after that step; with a ``!`` for
the colon, rank 1 is killed (SIGKILL) in the middle of the step after it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fastadapt.training import loop
from fastadapt.training.config import load_config
from fastadapt.training.trainer import train


def run(argument: str) -> None:
    """One training, as asked."""
    match = re.fullmatch(r"(.+\.yaml)(?:([:!])(\d+))?", argument)
    assert match is not None
    config, last = load_config(Path(match[1])), int(match[3] or -1)
    stop = Event()

    def sink(record: dict[str, Any]) -> None:
        if match[2] == ":" and (record["kind"], record["step"]) == ("train", last):
            stop.set()

    if match[2] == "!" and os.environ.get("RANK") == "1":
        _killed_within(last)
    resume = (Path(config.run.output) / "config.yaml").exists()
    train(config, resume=resume, sinks=[sink], stop=stop)


def _killed_within(step: int) -> None:
    """Let this process be killed between forward and backward of 0-based ``step``."""
    real, calls = loop.objective, iter(range(1000))

    def objective(*args: Any) -> Any:
        out = real(*args)
        if next(calls) == step:  # a rank makes one call a step, where accumulation equals ranks
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    loop.objective = objective  # type: ignore[assignment]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:]:
        run(each)
