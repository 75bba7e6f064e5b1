"""What of a run is in a checkpoint, and how a run takes it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.training.checkpoint import Checkpoint
from fastadapt.training.finish import versions

if TYPE_CHECKING:
    from fastadapt.training.loop import Run


def capture(run: Run) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Everything that the steps to come depend on, or count on: tensors and JSON scalars.

    Groups: ``weights, exp_avg, exp_avg_sq`` (see ``AdapterOptimizer.tensors``), ``counters``
    (tokens since each feature fired, running thresholds), ``rng`` (torch's generators).
    """
    counters = {"since_fired": run.dead.since_LF}
    for i, adapter in enumerate(run.model.adapters):
        counters |= {f"{i}.{name}": value for name, value in adapter.named_buffers()}
    rng = {"cpu": torch.get_rng_state()}
    if run.model.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.model.device)
    scalars = {
        **run.optimizer.scalars(),
        "step": run.step,
        "steps": run.steps,
        "sequences": len(run.feed.train),
        "tokens": run.tokens,
        "bad_in_row": run.bad_in_row,
        "bad_total": run.bad_total,
        "threads": torch.get_num_threads(),
        "wall_s": run.wall_s,
        **versions(),
    }
    return {**run.optimizer.tensors(), "counters": counters, "rng": rng}, scalars


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a run where it stood when ``checkpoint`` was saved.

    Raises:
        UserError: the data or the adapters are not those that the run began with.
    """
    tensors, scalars = checkpoint.tensors, checkpoint.scalars
    then, now = scalars["sequences"], len(run.feed.train)
    if (then, scalars["steps"]) != (now, run.steps):
        raise UserError(
            f"--resume: data.train held {then} sequences when the run began "
            f"({scalars['steps']} steps), now it holds {now} ({run.steps} steps). "
            "Give the data the run began with."
        )
    run.optimizer.load(tensors, scalars)
    counters = dict(tensors["counters"])
    run.dead.since_LF.copy_(counters.pop("since_fired"))
    for i, adapter in enumerate(run.model.adapters):
        for name, buffer in adapter.named_buffers():
            buffer.copy_(counters[f"{i}.{name}"])
    torch.set_rng_state(tensors["rng"]["cpu"])
    if "cuda" in tensors["rng"] and run.model.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng"]["cuda"], run.model.device)
    run.step, run.tokens = checkpoint.step, scalars["tokens"]
    run.bad_in_row, run.bad_total = scalars["bad_in_row"], scalars["bad_total"]
    run.wall_before = scalars["wall_s"]


def facts(run: Run) -> dict[str, Any]:
    """What is fixed from the start, for the first record of the log."""
    return {
        "steps": run.steps,
        "sequences": len(run.feed.train),
        "held_out_sequences": len(run.feed.held_out),
        "epoch_tokens": run.feed.train.counts.tokens,
        "too_long": run.feed.train.counts.too_long,
        "n_layers": run.model.n_layers,
        "d_model": run.model.d_model,
        "n_features": run.model.n_features,
        "parameters": sum(p.numel() for p in run.model.adapters.parameters()),
        "device": str(run.model.device),
        "threads": torch.get_num_threads(),
    }
