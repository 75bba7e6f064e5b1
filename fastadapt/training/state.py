"""Capture and restoration of a run's state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from fastadapt.data.sequences import count_repeated
from fastadapt.errors import UserError
from fastadapt.io.documents import Count, Finite, NonNegative, check
from fastadapt.models.sources.fingerprint import changes
from fastadapt.training.checkpoint import SCALARS, Checkpoint
from fastadapt.training.finalize import versions

if TYPE_CHECKING:
    from fastadapt.training.loop import TrainingRun


class Steering(TypedDict):
    """State of :class:`fastadapt.training.sparsity.SparsityWeight` with a target L0."""

    first: NonNegative
    active: NonNegative
    tokens: NonNegative
    integral: Finite


class Scalars(TypedDict):
    """Contents of ``state.json`` in a checkpoint: the scalars of :func:`capture`."""

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
    steering: NotRequired[Steering]
    data_sha256: Any  # these five are compared with the run's values
    device_type: Any
    revisions: Any
    weights: NotRequired[dict[str, str]]
    configs: NotRequired[dict[str, str]]


_MISMATCH = {
    "data_sha256": "--resume: data.train or data.validation holds other tokens than when the run "
    "began. Pass the data of the original run, or start over with --overwrite. A run of a version "
    "without data.markers needs --data.markers tokens if its texts hold special tokens; a run of a "
    "version that read no system column needs --data.columns with the turns' column alone.",
    "device_type": "--resume: the run began on {then}, now pair.device is {now}; the bits would "
    "differ. Use --pair.device {then}, or start over with --overwrite.",
    "revisions": "--resume: the run began with model revisions {then}, now they are {now}. Name "
    "pair.target_revision and pair.base_revision, or start over with --overwrite.",
}


def capture(run: TrainingRun) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the state that later steps depend on: tensors by group, and JSON scalars.

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
        **run.sparsity.state(),
        **_origin(run),
        **versions(),
    }
    return {**run.optimizer.tensors(), "counters": counters, "rng": rng}, scalars


def _origin(run: TrainingRun) -> dict[str, Any]:
    """Return inputs that determine the run's bits and are not in its configuration."""
    return {
        "data_sha256": run.feed.sha256,
        "device_type": run.model.device.type,
        "revisions": run.model.pair.revisions,
        **run.model.pair.fingerprints,
    }


def restore(run: TrainingRun, checkpoint: Checkpoint) -> None:
    """Restore a run to the state of ``checkpoint``.

    The number of threads, on which sums on a CPU depend, is the saved run's unless configured.

    Raises:
        UserError: data, models, adapters or device type differ from the saved run's.
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
    if run.config.objective.l0 is not None and "steering" not in scalars:
        raise UserError(f"{file}: steering: expected the state of objective.l0, got none")
    then, now = scalars["sequences"], len(run.feed.train)
    if (then, scalars["steps"]) != (now, run.steps):
        raise UserError(
            f"--resume: data.train held {then} sequences when the run began "
            f"({scalars['steps']} steps), now it holds {now} ({run.steps} steps). "
            "Pass the data of the original run."
        )
    origin = _origin(run)
    for key, message in _MISMATCH.items():
        if scalars[key] != origin[key]:
            raise UserError(message.format(then=scalars[key], now=origin[key]))
    _check_models(run, scalars)
    if run.config.run.threads is None:
        torch.set_num_threads(scalars["threads"])
    tensors = checkpoint.read(like=run.optimizer.tensors())
    run.optimizer.load(tensors, scalars)
    counters = {"since_fired": run.dead.since_LF}
    for i, adapter in enumerate(run.model.adapters):
        counters |= {f"{i}.{name}": buffer for name, buffer in adapter.named_buffers()}
    for name, counter in counters.items():
        counter.copy_(_saved(checkpoint, tensors, "counters", name, counter))
    try:
        torch.set_rng_state(_saved(checkpoint, tensors, "rng", "cpu", torch.get_rng_state()))
        if "cuda" in tensors["rng"] and run.model.device.type == "cuda":
            now_cuda = torch.cuda.get_rng_state(run.model.device)
            state = _saved(checkpoint, tensors, "rng", "cuda", now_cuda)
            torch.cuda.set_rng_state(state, run.model.device)
    except RuntimeError as error:
        raise UserError(f"{checkpoint.path}: rng is not a generator's state: {error}") from error
    run.step, run.tokens = checkpoint.step, scalars["tokens"]
    run.bad_in_row, run.bad_total = scalars["bad_in_row"], scalars["bad_total"]
    run.wall_before = scalars["wall_s"]
    run.planner.load(scalars)
    run.sparsity.load(scalars)


def _check_models(run: TrainingRun, recorded: Mapping[str, Any]) -> None:
    pair = run.model.pair
    names = {"target": pair.config.target, "base": pair.config.base}
    if changed := changes(recorded, pair.fingerprints, names):
        raise UserError(
            f"--resume: the run began with other models: {'; '.join(changed)}. Give the models as "
            "they were, or start over with --overwrite."
        )


def _saved(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Mapping[str, Tensor]],
    group: str,
    name: str,
    like: Tensor,
) -> Tensor:
    """Return a checkpoint's tensor; raise if its shape or dtype is not that of ``like``."""
    saved = tensors.get(group, {}).get(name)
    expected = f"{like.dtype} of shape {list(like.shape)}"
    if saved is None or (saved.shape, saved.dtype) != (like.shape, like.dtype):
        got = "none" if saved is None else f"{saved.dtype} of shape {list(saved.shape)}"
        raise UserError(f"{checkpoint.path}: {group}.{name}: expected {expected}, got {got}")
    return saved


def facts(run: TrainingRun) -> dict[str, Any]:
    """Return the constants of a run for the first record of the log."""
    return {
        "steps": run.steps,
        "sequences": len(run.feed.train),
        "held_out_sequences": len(run.feed.held_out),
        "held_out_in_training": count_repeated(run.feed.held_out, run.feed.train),
        "epoch_tokens": run.feed.train.counts.tokens,
        "too_long": run.feed.train.counts.too_long,
        "with_markers": run.feed.train.counts.with_markers,
        "beyond_model": run.feed.train.counts.beyond_model,
        "bad_rows": run.feed.train.counts.bad,
        "counted_tokens": run.feed.train.counts.counted,
        "sources": run.feed.sources(run.steps),
        "held_out_source": run.feed.held_out_source,
        "n_layers": run.model.n_layers,
        "d_model": run.model.d_model,
        "adapter_kind": run.config.run.trains,
        **({"n_features": run.model.n_features} if run.model.n_features else {}),
        "parameters": sum(p.numel() for p in run.model.adapters.parameters()),
        "device": run.model.device.type if run.ranks.world > 1 else str(run.model.device),
        "ranks": run.ranks.world,
        "notes": run.model.pair.notes,
        "checkpoint": run.config.objective.checkpoint,
        "threads": torch.get_num_threads(),
    }
