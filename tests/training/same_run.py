"""Compare runs that must have the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from threading import Event

from fastadapt.training.checkpoint import load_latest
from fastadapt.training.config import TrainConfig
from fastadapt.training.run_dir import read_records

TIMING = {"wall_s", "tokens_per_s"}


def records(folder: Path) -> list[dict]:
    """Return the records that equal runs share: all but those of resumptions, without times."""
    shared = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] != "resume"]
    return [{k: v for k, v in record.items() if k not in TIMING} for record in shared]


def assert_same_run(folder: Path, whole: Path) -> None:
    ours, theirs = load_latest(folder / "checkpoints")[0], load_latest(whole / "checkpoints")[0]
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step
    assert ours.tensors.keys() == theirs.tensors.keys()
    for file in ("weights", "exp_avg", "exp_avg_sq", "counters", "rng"):
        a, b = (c.path / f"{file}.safetensors" for c in (ours, theirs))
        assert a.read_bytes() == b.read_bytes(), file
    timeless = [{k: v for k, v in c.scalars.items() if k != "wall_s"} for c in (ours, theirs)]
    assert timeless[0] == timeless[1]
    for path in sorted((whole / "adapter").glob("*.safetensors")):
        assert (folder / "adapter" / path.name).read_bytes() == path.read_bytes()
    assert records(folder) == records(whole)


def stop_after(event: Event, step: int) -> Callable[[dict], None]:
    def sink(record: dict) -> None:
        if record["kind"] == "train" and record["step"] == step:
            event.set()

    return sink


def into(config: TrainConfig, folder: Path) -> TrainConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, output=str(folder)))
