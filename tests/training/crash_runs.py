"""Train, kill at a given step, resume, kill again, resume to the end; for many pairs of steps.

Run as a program: ``crash_runs.py CONFIG.yaml FOLDER FIRST,SECOND ...``. Each pair of steps gives
one run ``FOLDER/FIRST-SECOND``. The run is killed (SIGKILL) when a step of the pair has been
recorded, which is after its update and before its checkpoint. ``FOLDER/whole`` is not interrupted.
Every training is a fork, so that the libraries are imported only once.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastadapt.training.config import TrainConfig, load_config


def training(config: TrainConfig, *, resume: bool, kill_at: int | None) -> None:
    """Train in a fork that kills itself after step ``kill_at``; check how the fork ended."""
    child = os.fork()
    if child == 0:
        from fastadapt.training.trainer import train

        def kill(record: dict[str, Any]) -> None:
            if record["kind"] == "train" and record["step"] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            train(config, resume=resume, sinks=[kill])
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    expected = 0 if kill_at is None else signal.SIGKILL
    if status != expected:
        raise SystemExit(f"training to step {kill_at} ended with {status}, expected {expected}")


def main(config: TrainConfig, folder: Path, kills: list[list[int]]) -> None:
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # once, before all forks

    torch.set_num_threads(1)

    def into(name: str) -> TrainConfig:
        run = dataclasses.replace(config.run, output=str(folder / name))
        return dataclasses.replace(config, run=run)

    training(into("whole"), resume=False, kill_at=None)
    for steps in kills:
        output = into("-".join(map(str, steps)))
        for i, step in enumerate(steps):
            training(output, resume=i > 0, kill_at=step)
        training(output, resume=True, kill_at=None)


if __name__ == "__main__":
    main(
        load_config(Path(sys.argv[1])),
        Path(sys.argv[2]),
        [[int(step) for step in steps.split(",")] for steps in sys.argv[3:]],
    )
