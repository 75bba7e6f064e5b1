"""Repeatedly kill a process that saves checkpoints without a pause; print counts of outcomes.

Run as a program: ``crash_saves.py FOLDER KILLS SEED``. The program ends when KILLS kills have left
an unfinished save. Kills between two saves or during the removal of older checkpoints count too.
Every tensor of a checkpoint holds its step, which shows whether a checkpoint mixes two steps. The
counts are printed as one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastadapt.training.checkpoint import list_checkpoints, load_latest, save_checkpoint, sweep

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "weights": [(64, 33), (64,)],
    "exp_avg": [(64, 33), (64,)],
    "counters": [(257,)],
}


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        stem: {f"t{i}": torch.full(shape, float(step)) for i, shape in enumerate(shapes)}
        for stem, shapes in SHAPES.items()
    }


def save_without_a_pause(folder: Path, first: int, pipe: int) -> None:
    step = first
    while True:
        save_checkpoint(folder, step, tensors_of(step), {"step": step}, keep=2)
        os.write(pipe, b"%d\n" % step)
        step += 1


def kill_once(folder: Path, first: int, delay: float) -> list[int]:
    """Start saving at step ``first``, kill after ``delay`` seconds; return the steps committed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_without_a_pause(folder, first, write)
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the saving process ended by itself: {status}"
    with os.fdopen(read, "rb") as pipe:
        return [int(line) for line in pipe.read().split()]


def main(folder: Path, kills: int, seed: int) -> dict[str, int]:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    began = time.perf_counter()
    save_checkpoint(folder, 1, tensors_of(1), {"step": 1}, keep=2)
    typical = min(time.perf_counter() - began, 0.05)  # the first save may be slower than the others
    counts = {"kills": 0, "mid_save": 0, "lost": 0, "mixed": 0, "unresumable": 0, "damaged": 0}
    committed = 1
    while counts["mid_save"] < kills and counts["kills"] < 20 * kills:
        steps = kill_once(folder, committed + 1, draw.uniform(0, 4 * typical))
        committed = max([committed, *steps])
        counts["kills"] += 1
        counts["mid_save"] += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        checkpoint, passed = load_latest(folder)
        counts["damaged"] += len(passed)
        if checkpoint is None:
            counts["unresumable"] += 1
            break
        counts["lost"] += checkpoint.step < committed
        values = [t.flatten() for group in checkpoint.tensors.values() for t in group.values()]
        whole = {stem: len(group) for stem, group in checkpoint.tensors.items()}
        same = bool((torch.cat(values) == checkpoint.step).all())
        if not same or checkpoint.scalars["step"] != checkpoint.step:
            counts["mixed"] += 1
        assert whole == {stem: len(shapes) for stem, shapes in SHAPES.items()}
        sweep(folder)
        committed = checkpoint.step
    # A kill after the commit leaves older checkpoints, which the next save removes.
    save_checkpoint(folder, committed + 1, tensors_of(committed + 1), {}, keep=2)
    return counts | {"steps": committed, "kept": len(list_checkpoints(folder))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
