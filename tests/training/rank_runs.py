"""Train several configurations, one after the other, on the ranks that torchrun started.

Run as a program, with or without torchrun: ``rank_runs.py CONFIG.yaml[@FAULT:STEP] ...``. If the
folder of a configuration holds a run, the run is resumed. FAULT happens after 1-based STEP:

- ``stop``: rank 0 gets a request to stop;
- ``kill``: rank 1 is killed (SIGKILL) during the next step;
- ``full``: rank 1 can no longer write files, as on a full disk;
- ``nan``: the second micro-batch of the next step has a loss of NaN.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Any

import torch

from fastadapt import objective as module
from fastadapt.distributed.ranks import exit_process, should_report
from fastadapt.errors import RunError, UserError
from fastadapt.training import loop
from fastadapt.training.config import TrainConfig, load_config
from fastadapt.training.trainer import train

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(argument: str) -> None:
    """Run the training of one argument of the program."""
    path, _, event = argument.partition("@")
    fault, _, step = event.partition(":")
    config, stop = load_config(Path(path)), Event()

    def sink(record: dict[str, Any]) -> None:
        if fault == "stop" and (record["kind"], record["step"]) == ("train", int(step)):
            stop.set()

    loop.objective = module.objective
    if fault in ("kill", "nan", "full") and RANK == 1 % WORLD:
        plant(fault, int(step), config)
    resume = (Path(config.run.output) / "config.yaml").exists()
    train(config, resume=resume, sinks=[sink], stop=stop)


def plant(fault: str, step: int, config: TrainConfig) -> None:
    """Plant a fault in the second micro-batch of 0-based ``step``, which rank 1 computes."""
    calls = config.optimizer.accumulation // WORLD  # calls of this rank in a step
    fatal, count = calls * step + 1 // WORLD, iter(range(10_000))

    def objective(*args: Any, **options: Any) -> Any:
        out = module.objective(*args, **options)
        if next(count) != fatal:
            return out
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
            return out
        loss = out.loss * math.nan
        return out._replace(loss=loss, metrics={**out.metrics, "loss": loss.detach()})

    loop.objective = objective


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:]:
        try:
            run(each)
        except (UserError, RunError) as error:
            if should_report(error):
                print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
    exit_process(0)
