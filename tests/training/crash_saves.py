"""Kill a process that saves checkpoints without a pause, again and again; tell what was found.

Run as a program: ``crash_saves.py FOLDER KILLS SEED``: until KILLS of them left an unfinished save
behind (others fell between two saves, or within the pruning, and count as well). Every tensor of a
set holds its step, so a set that mixes two steps shows. Prints one JSON object.
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

SHAPES = {"weights": [(64, 33), (64,)], "exp_avg": [(64, 33), (64,)], "counters": [(257,)]}


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        stem: {f"t{i}": torch.full(shape, float(step)) for i, shape in enumerate(shapes)}
        for stem, shapes in SHAPES.items()
    }


def save_without_a_pause(folder: Path, first: int, told: int) -> None:
    step = first
    while True:
        save_checkpoint(folder, step, tensors_of(step), {"step": step}, keep=2)
        os.write(told, b"%d\n" % step)
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
    typical = min(time.perf_counter() - began, 0.05)  # a slow first save says little of the others
    found = {"kills": 0, "mid_save": 0, "lost": 0, "mixed": 0, "unresumable": 0, "damaged": 0}
    committed = 1
    while found["mid_save"] < kills and found["kills"] < 20 * kills:
        steps = kill_once(folder, committed + 1, draw.uniform(0, 4 * typical))
        committed = max([committed, *steps])
        found["kills"] += 1
        found["mid_save"] += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        checkpoint, passed = load_latest(folder)
        found["damaged"] += len(passed)
        if checkpoint is None:
            found["unresumable"] += 1
            break
        found["lost"] += checkpoint.step < committed
        values = [t.flatten() for group in checkpoint.tensors.values() for t in group.values()]
        whole = {stem: len(group) for stem, group in checkpoint.tensors.items()}
        same = bool((torch.cat(values) == checkpoint.step).all())
        if not same or checkpoint.scalars["step"] != checkpoint.step:
            found["mixed"] += 1
        assert whole == {stem: len(shapes) for stem, shapes in SHAPES.items()}
        sweep(folder)
        committed = checkpoint.step
    # Kills between the commit and the pruning leave older sets behind; a save removes them.
    save_checkpoint(folder, committed + 1, tensors_of(committed + 1), {}, keep=2)
    return found | {"steps": committed, "kept": len(list_checkpoints(folder))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
