"""What of a run is in a checkpoint, and how a run takes it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from fastadapt.errors import UserError
from fastadapt.io.documents import Count, check
from fastadapt.training.checkpoint import SCALARS, Checkpoint
from fastadapt.training.finalize import versions

if TYPE_CHECKING:
    from fastadapt.training.loop import Run


class Scalars(TypedDict):
    """``state.json`` of a checkpoint: the scalars that :func:`capture` gives."""

    updates: Count
    step: Count
    steps: Count
    sequences: Count
    tokens: Count
    bad_in_row: Count
    bad_total: Count
    threads: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    wall_s: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    codes_per_token: NotRequired[list[Annotated[float, msgspec.Meta(ge=0, le=2**31)]] | None]
    data_sha256: Any  # compared with the run's own, as the two below
    device_type: Any
    revisions: Any


_MOVED = {
    "data_sha256": "--resume: data.train or data.validation holds other tokens than when the run "
    "began. Give the data the run began with, or begin again with --overwrite.",
    "device_type": "--resume: the run began on {then}, now pair.device is {now}; the bits would "
    "differ. Use --pair.device {then}, or begin again with --overwrite.",
    "revisions": "--resume: the run began with model revisions {then}, now they are {now}. Name "
    "pair.target_revision and pair.base_revision, or begin again with --overwrite.",
}


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
        **run.planner.state(),
        **_origin(run),
        **versions(),
    }
    return {**run.optimizer.tensors(), "counters": counters, "rng": rng}, scalars


def _origin(run: Run) -> dict[str, Any]:
    """What the run's bits follow from and the configuration does not pin down."""
    return {
        "data_sha256": run.feed.sha256,
        "device_type": run.model.device.type,
        "revisions": run.model.pair.revisions,
    }


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put a run where it stood when ``checkpoint`` was saved.

    The number of threads, on which a CPU's sums depend, is the saved run's, unless the
    configuration names one.

    Raises:
        UserError: data, models, adapters or kind of device are not those the run began with.
    """
    scalars = checkpoint.scalars
    file = checkpoint.path / SCALARS
    check(scalars, Scalars, str(file))
    codes = scalars.get("codes_per_token")
    if scalars["step"] != checkpoint.step:
        raise UserError(f"{file}: step: expected {checkpoint.step}, got {scalars['step']}")
    if codes is not None and len(codes) != run.model.n_layers:
        raise UserError(
            f"{file}: codes_per_token: expected {run.model.n_layers} values, got {len(codes)}"
        )
    then, now = scalars["sequences"], len(run.feed.train)
    if (then, scalars["steps"]) != (now, run.steps):
        raise UserError(
            f"--resume: data.train held {then} sequences when the run began "
            f"({scalars['steps']} steps), now it holds {now} ({run.steps} steps). "
            "Give the data the run began with."
        )
    for key, now in _origin(run).items():
        if scalars[key] != now:
            raise UserError(_MOVED[key].format(then=scalars[key], now=now))
    if run.config.run.threads is None:
        torch.set_num_threads(scalars["threads"])
    tensors = checkpoint.read(like=run.optimizer.tensors())
    run.optimizer.load(tensors, scalars)
    counters = {"since_fired": run.dead.since_LF}
    for i, adapter in enumerate(run.model.adapters):
        counters |= {f"{i}.{name}": buffer for name, buffer in adapter.named_buffers()}
    for name, counter in counters.items():
        counter.copy_(_of(checkpoint, tensors, "counters", name, counter))
    try:
        torch.set_rng_state(_of(checkpoint, tensors, "rng", "cpu", torch.get_rng_state()))
        if "cuda" in tensors["rng"] and run.model.device.type == "cuda":
            now_cuda = torch.cuda.get_rng_state(run.model.device)
            state = _of(checkpoint, tensors, "rng", "cuda", now_cuda)
            torch.cuda.set_rng_state(state, run.model.device)
    except RuntimeError as error:
        raise UserError(f"{checkpoint.path}: rng is no state of torch: {error}") from error
    run.step, run.tokens = checkpoint.step, scalars["tokens"]
    run.bad_in_row, run.bad_total = scalars["bad_in_row"], scalars["bad_total"]
    run.wall_before = scalars["wall_s"]
    run.planner.load(scalars)


def _of(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Mapping[str, Tensor]],
    group: str,
    name: str,
    like: Tensor,
) -> Tensor:
    """The tensor of a checkpoint that is to become ``like``; refuses another shape or dtype."""
    saved = tensors.get(group, {}).get(name)
    expected = f"{like.dtype} of shape {list(like.shape)}"
    if saved is None or (saved.shape, saved.dtype) != (like.shape, like.dtype):
        got = "none" if saved is None else f"{saved.dtype} of shape {list(saved.shape)}"
        raise UserError(f"{checkpoint.path}: {group}.{name}: expected {expected}, got {got}")
    return saved


def facts(run: Run) -> dict[str, Any]:
    """What is fixed from the start, for the first record of the log."""
    return {
        "steps": run.steps,
        "sequences": len(run.feed.train),
        "held_out_sequences": len(run.feed.held_out),
        "epoch_tokens": run.feed.train.counts.tokens,
        "too_long": run.feed.train.counts.too_long,
        "with_markers": run.feed.train.counts.with_markers,
        "n_layers": run.model.n_layers,
        "d_model": run.model.d_model,
        "adapter_kind": run.config.adapter.kind,
        **({"n_features": run.model.n_features} if run.model.n_features else {}),
        "parameters": sum(p.numel() for p in run.model.adapters.parameters()),
        "device": run.model.device.type if run.ranks.world > 1 else str(run.model.device),
        "ranks": run.ranks.world,
        "checkpoint": run.config.objective.checkpoint,
        "threads": torch.get_num_threads(),
    }
