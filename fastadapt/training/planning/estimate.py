"""What a run needs: steps, memory, work, time, disk. No weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastadapt.data.sequences import load_sequences
from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.models.pair import DTYPES, check_configs
from fastadapt.models.pretrained import load_tokenizer, model_config, shipped_config
from fastadapt.models.recompute import POLICIES
from fastadapt.organism import resolve
from fastadapt.training.config import TrainConfig
from fastadapt.training.planning.devices import Device, planned_device
from fastadapt.training.planning.flops import Setup, flops_per_step
from fastadapt.training.planning.memory import step_memory

#: Training files up to this size are read for the number of sequences and the longest of them.
_READ_BYTES = 64 * 2**20
#: Of the method's data, where those of the run are not at hand.
SEQUENCES = 50_000
MEAN_SHARE = 0.76  # of the longest sequence: 380M tokens in 50,000 of up to 10,000
L0 = 10.0  # features per token and layer that the prediction is made for


@dataclass(frozen=True)
class ResourceEstimate:
    """What a run needs.

    Attributes:
        device: where it would take place; the bytes are those of one.
        gpus: how many of them share the run.
        checkpoint: the policy of :mod:`fastadapt.models.recompute`; ``auto`` is resolved.
        parts: bytes by part, each at its own largest.
        phases: bytes alive at the worst moment of each phase of a step.
        tokens_per_sequence: T: the longest sequence, or ``data.max_tokens`` where the data are not
            at hand or too large to look at.
        mean_tokens: of a sequence; assumed where the data are not at hand.
        steps: optimiser steps; those of the method's data where the data are not at hand.
        tokens: training tokens over all epochs, or None where the data are not at hand.
        parameters: trained ones.
        host_bytes: of frozen weights in host memory (``pair.offload``).
        disk_bytes: of the checkpoints that are kept, the one being written, and the adapters.
    """

    device: Device
    gpus: int
    checkpoint: str
    parts: dict[str, int]
    phases: dict[str, int]
    tokens_per_sequence: int
    mean_tokens: int
    steps: int
    tokens: int | None
    parameters: int
    host_bytes: int
    disk_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment of a step."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase of that moment."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the device what it needs beside tensors."""
        return self.peak_bytes <= self.device.usable_bytes

    def largest(self, n: int) -> str:
        """The ``n`` largest parts in words."""
        ranked = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {gb(size)}" for name, size in ranked[:n])


@dataclass(frozen=True)
class Prediction:
    """Work and time of a run: no measurement of it.

    Attributes:
        l0: active features per token and layer that it is made for: k, where k is set, else 10;
            None of what has no features.
        flops_per_step: at the mean length, over all micro-batches, on all GPUs together.
        step_s: seconds of a step, if all of it went at the device's rate of large products.
        hours: of all steps, likewise.
    """

    l0: float | None
    flops_per_step: float
    step_s: float
    hours: float


def plan(config: TrainConfig, gpu: str | None = None, gpus: int = 1) -> ResourceEstimate:
    """Plan a run without reading weights; data and tokenizer are looked at where they are small.

    Args:
        config: the run's.
        gpu: plan for this one (:data:`fastadapt.training.planning.devices.DATA_SHEETS`), not for
            this machine.
        gpus: so many share the run.

    Raises:
        UserError: a model's configuration cannot be read, the two are not a pair, or a step's
            batches cannot be dealt out to so many.
    """
    accumulation = config.optimizer.accumulation
    if gpus < 1 or (gpus > 1 and accumulation % gpus):
        raise UserError(
            f"--gpus: a step's {accumulation} batches (optimizer.accumulation) are dealt out; "
            f"expected 1 or a divisor of {accumulation}, got {gpus}"
        )
    if gpus > 1 and config.pair.offload:
        raise UserError("pair.offload is for one GPU; several share the frozen weights out already")
    target = _target(config)
    device = planned_device(gpu, device_kind(config, gpu), DTYPES[config.pair.dtype])
    steps, tokens, longest, mean = _look_at_data(config)
    longest = longest or config.data.max_tokens
    mean = mean or round(MEAN_SHARE * longest)
    config = with_policy(config, target, longest, device, gpus)
    memory = step_memory(config, target, longest, device.kind, gpus)
    n_checkpoints = config.run.keep_checkpoints + 1
    return ResourceEstimate(
        device=device,
        gpus=gpus,
        checkpoint=config.objective.checkpoint,
        parts=memory.parts,
        phases=memory.phases,
        tokens_per_sequence=longest,
        mean_tokens=mean,
        steps=steps,
        tokens=tokens,
        parameters=memory.parameters,
        host_bytes=memory.host_bytes,
        disk_bytes=n_checkpoints * memory.state_bytes + memory.adapter_bytes,
    )


def predict(config: TrainConfig, planned: ResourceEstimate) -> Prediction:
    """Work and time of a planned run; takes seconds."""
    target, adapter = _target(config), config.adapter
    objective = dataclasses.replace(config.objective, checkpoint=planned.checkpoint)
    size = config.optimizer.batch_size
    setup = Setup(target, config.pair, config.trained, objective, size, planned.mean_tokens)
    l0 = None if not config.n_features else L0 if adapter.k is None else float(adapter.k)
    micro_batch = flops_per_step(setup, target.num_hidden_layers, l0)
    per_step = micro_batch * config.optimizer.accumulation
    step_s = per_step / planned.device.flops_per_s / planned.gpus
    return Prediction(l0, per_step, step_s, planned.steps * step_s / 3600)


def as_json(config: TrainConfig, planned: ResourceEstimate) -> dict[str, Any]:
    """The plan, its prediction, and what would lower the peak where it does not fit."""
    predicted = predict(config, planned)
    first = {"peak_bytes": planned.peak_bytes, "fits": planned.fits}
    values = {**first, **dataclasses.asdict(planned), **dataclasses.asdict(predicted)}
    values["device"]["usable_bytes"] = planned.device.usable_bytes
    values["remedies"] = {} if planned.fits else dict(remedies(config, planned))
    return values


def device_kind(config: TrainConfig, gpu: str | None = None) -> str:
    """``cuda`` or ``cpu``: what the run asks for, whether or not it is there."""
    name = config.pair.device
    if gpu is None and name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if gpu is not None or name.startswith("cuda") else "cpu"


def with_policy(
    config: TrainConfig, target: Any, tokens: int, device: Device, ranks: int = 1
) -> TrainConfig:
    """``config``, its ``objective.checkpoint`` resolved: what is the least work and fits.

    Args:
        target: transformers' configuration.
        tokens: of the longest sequence.
        ranks: that share the run.
        device: where it must fit; where nothing does, the policy of the least memory is taken.
    """
    if config.objective.checkpoint != "auto":
        return config
    for policy in POLICIES:
        chosen = _with(config, "objective", checkpoint=policy)
        memory = step_memory(chosen, target, tokens, device.kind, ranks)
        if memory.peak_bytes <= device.usable_bytes:
            break
    return chosen


def remedies(config: TrainConfig, planned: ResourceEstimate) -> Iterator[tuple[str, int]]:
    """Settings that lower the peak, each alone, and the peak with it; the lowest first."""
    target, kind, n = _target(config), planned.device.kind, planned.gpus

    def peak(changed: TrainConfig, tokens: int = planned.tokens_per_sequence) -> int:
        return step_memory(changed, target, tokens, kind, n).peak_bytes

    config = _with(config, "objective", checkpoint=planned.checkpoint)
    tokens, chunk = planned.tokens_per_sequence, config.objective.kl_chunk_tokens
    tried = {
        "objective.checkpoint full": _with(config, "objective", checkpoint="full"),
        f"objective.kl_chunk_tokens {chunk // 4}": _with(
            config, "objective", kl_chunk_tokens=max(1, chunk // 4)
        ),
        "optimizer.masters false": _with(config, "optimizer", masters=False),
        "optimizer.moments 8bit": _with(config, "optimizer", moments="8bit"),
        "optimizer.batch_size 1, with optimizer.accumulation in its stead": _with(
            config, "optimizer", batch_size=1
        ),
        "pair.dtype bfloat16": _with(config, "pair", dtype="bfloat16"),
    }
    if n == 1:
        tried["pair.offload true"] = _with(config, "pair", offload=True)
    if fewer := config.n_features // 2:
        tried[f"adapter.n_features {fewer}"] = _with(config, "adapter", n_features=fewer)
    found = {name: peak(changed) for name, changed in tried.items()}
    found[f"data.max_tokens {tokens // 2}"] = peak(config, tokens // 2)
    for name, size in sorted(found.items(), key=lambda item: item[1]):
        if size < planned.peak_bytes:
            yield name, size


def count_steps(batches_per_epoch: int, config: TrainConfig) -> int:
    """Optimiser steps of a run over data of ``batches_per_epoch`` micro-batches."""
    micro_batches = batches_per_epoch * config.optimizer.epochs
    steps = -(-micro_batches // config.optimizer.accumulation)
    return steps if config.optimizer.max_steps is None else min(steps, config.optimizer.max_steps)


def gb(n: int) -> str:
    """Bytes as text, in powers of 1,000."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def _with(config: TrainConfig, component: str, **changes: Any) -> TrainConfig:
    part = dataclasses.replace(getattr(config, component), **changes)
    return dataclasses.replace(config, **{component: part})


def _target(config: TrainConfig) -> Any:
    """The target's configuration: shipped with a preset, or read; checked against the base's."""
    source = config.pair
    target, base = (
        shipped_config(name) or model_config(resolve(name), revision, source.trust_remote_code)
        for name, revision in (
            (source.target, source.target_revision),
            (source.base, source.base_revision),
        )
    )
    check_configs(target, base)
    return target


def _look_at_data(config: TrainConfig) -> tuple[int, int | None, int | None, int | None]:
    """Steps, tokens, longest and mean sequence; the latter three where the data are here, small."""
    path = typed_path(resolve(config.data.train), "data.train")
    size = config.optimizer.batch_size
    if not path.is_file() or path.stat().st_size > _READ_BYTES:
        return count_steps(-(-SEQUENCES // size), config), None, None, None
    pair = config.pair
    tokenizer = load_tokenizer(resolve(pair.target), pair.target_revision, pair.trust_remote_code)
    loaded = [
        load_sequences(resolve(source), tokenizer, config.data, split=split)
        for source, split in ((config.data.train, "train"), (config.data.validation, "validation"))
    ]
    counts = loaded[0].counts
    longest = max(each.counts.longest for each in loaded)
    steps = count_steps(-(-len(loaded[0]) // size), config)
    mean = max(2, round(counts.tokens / len(loaded[0])))
    return steps, counts.tokens * config.optimizer.epochs, longest, mean
