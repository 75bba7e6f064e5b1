"""Estimate what a run needs: steps, memory, operations, time, disk. No weight is read."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastadapt.data.batches import padded_width
from fastadapt.data.mixtures import Mixture, load_held_out, load_training, plan_batches
from fastadapt.errors import UserError
from fastadapt.io.names import typed_path
from fastadapt.models.pair import DTYPES
from fastadapt.models.recompute import POLICIES
from fastadapt.models.sources.pair_sources import Sources, planned_config
from fastadapt.models.trained_files import read_initial
from fastadapt.organism import resolve
from fastadapt.training.config import TrainConfig, check_dtype
from fastadapt.training.planning.devices import Device, planned_device
from fastadapt.training.planning.flops import Setup, flops_per_step
from fastadapt.training.planning.memory import step_memory
from fastadapt.training.planning.recompute import RecomputePlanner
from fastadapt.training.planning.share import measured_share

#: Training files up to this size are read, to count sequences and tokens.
_READ_BYTES = 64 * 2**20
#: Number of sequences of the paper's data, assumed if the run's data were not read.
SEQUENCES = 50_000
MEAN_SHARE = 0.76  # mean over longest sequence: 380M tokens in 50,000 sequences of up to 10,000
L0 = 10.0  # active features per token and layer, assumed unless k or a target is set


@dataclass(frozen=True)
class RecomputeEstimate:
    """What layers save for the backward pass of a batch of one length, averaged over cutoffs.

    Attributes:
        tokens: tokens of the batch's longest sequence.
        layers: mean number of layers by policy of :mod:`fastadapt.models.recompute`.
        peak_bytes: the largest planned peak of a step.
    """

    tokens: int
    layers: dict[str, float]
    peak_bytes: int


@dataclass(frozen=True)
class ResourceEstimate:
    """Resources that a run needs.

    Data are read only if they are a local file that is not too large.

    Attributes:
        device: the planned device; ``parts`` and ``phases`` are bytes of one device.
        gpus: number of devices that share the run.
        checkpoint: the policy of :mod:`fastadapt.models.recompute` of all layers; ``auto`` if it
            depends on layer and batch.
        recompute: policies for the longest and the median batch; empty unless they are ``auto``.
        parts: bytes by part, each at its own largest.
        phases: bytes alive at the worst moment of each phase of a step of the longest sequence, at
            cutoff 1.
        tokens_per_sequence: tokens of the longest sequence, without padding; ``data.max_tokens`` if
            the data were not read.
        mean_tokens: mean tokens of a sequence; assumed if the data were not read.
        steps: optimiser steps; those of the paper's data if the data were not read.
        tokens: training tokens over all epochs; None if the data were not read.
        parameters: number of trained parameters.
        host_bytes: frozen weights in host memory (``pair.offload``).
        disk_bytes: retained checkpoints, one more while it is written, and the adapters.
    """

    device: Device
    gpus: int
    checkpoint: str
    recompute: list[RecomputeEstimate]
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
        """Bytes alive at the worst moment of a step: the most of ``phases`` and ``recompute``."""
        return max(*self.phases.values(), *(each.peak_bytes for each in self.recompute))

    @property
    def peak_phase(self) -> str | None:
        """The phase with the most bytes alive; None if an entry of ``recompute`` has more."""
        return next((name for name in self.phases if self.phases[name] == self.peak_bytes), None)

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the usable memory of the device."""
        return self.peak_bytes <= self.device.usable_bytes

    def largest(self, n: int) -> str:
        """Return the ``n`` largest parts and their sizes as text."""
        ranked = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {gb(size)}" for name, size in ranked[:n])


@dataclass(frozen=True)
class Prediction:
    """Predicted operations and time of a run.

    Attributes:
        l0: expected active features per token and layer: k or the target L0 if it is set, else
            10; None without transcoders.
        flops_per_step: operations of a step at the mean length, on all devices together.
        share: share of the device's rate that a step reaches, measured here; None if the device is
            not here, or the model too large to measure.
        step_s: seconds of a step at this share of the device's rate; without one, at the whole
            rate, which no step reaches.
        hours: hours of all steps at the same rate.
    """

    l0: float | None
    flops_per_step: float
    share: float | None
    step_s: float
    hours: float


def plan(
    config: TrainConfig, gpu: str | None = None, gpus: int = 1, *, timed: bool = True
) -> ResourceEstimate:
    """Estimate the resources of a run, without reading weights.

    Args:
        config: the run's configuration.
        gpu: GPU to plan for, a key of :data:`fastadapt.training.planning.devices.DATA_SHEETS`; by
            default this machine's device.
        gpus: number of GPUs that share the run.
        timed: measure the rate of this machine's device, which takes memory and half a second; else
            its rate is NaN.

    Raises:
        UserError: a model's configuration cannot be read, the two models are not a pair, no run
            can train in ``pair.dtype``, or the batches of a step cannot be divided among ``gpus``.
    """
    check_dtype(config)
    accumulation = config.optimizer.accumulation
    if gpus < 1 or (gpus > 1 and accumulation % gpus):
        raise UserError(
            f"--gpus: ranks divide a step's {accumulation} batches (optimizer.accumulation); "
            f"expected 1 or a divisor of {accumulation}, got {gpus}"
        )
    if gpus > 1 and config.pair.offload:
        raise UserError(
            "pair.offload needs --gpus 1; more GPUs shard the frozen weights already. Use "
            "--pair.offload false"
        )
    Sources.find(config.pair).check_differ()
    if config.run.init_from is not None:
        read_initial(config.run.init_from, config.adapter)
    target = _target(config)
    dtype = DTYPES[config.pair.dtype]
    device = planned_device(gpu, device_kind(config, gpu), dtype, timed=timed)
    steps, tokens, longest, mean, median = _count_data(config, target)
    longest = longest or config.data.max_tokens
    mean = mean or round(MEAN_SHARE * longest)
    width = _width(config, device.kind, longest)
    config, planner = with_policy(config, target, width, device, gpus)
    policies, recompute = None, []
    if planner is not None:
        policies = planner.policies(width, 1)
        recompute = [
            _recompute(planner, config, target, n, _width(config, device.kind, n))
            for n in (longest, median or mean)
        ]
    memory = step_memory(config, target, width, device.kind, gpus, policies)
    n_checkpoints = config.run.keep_checkpoints + 1
    return ResourceEstimate(
        device=device,
        gpus=gpus,
        checkpoint=config.objective.checkpoint,
        recompute=recompute,
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


def expected_l0(config: TrainConfig) -> float | None:
    """Return k, the target L0 or, without either, an assumption; None for a baseline."""
    if not config.n_features:
        return None
    if stays_dense(config):
        return config.n_features / 2  # as in new adapters
    given = config.objective.l0 if config.adapter.k is None else config.adapter.k
    return L0 if given is None else float(given)


def stays_dense(config: TrainConfig) -> bool:
    """Return whether nothing lowers the L0 of a run's adapters, so that products stay dense."""
    limits = config.objective.sparsity, config.objective.l0, config.adapter.k
    return bool(config.n_features) and not any(limits)


def predict(config: TrainConfig, planned: ResourceEstimate) -> Prediction:
    """Predict operations and time of a planned run; takes seconds."""
    target = _target(config)
    objective = dataclasses.replace(config.objective, checkpoint=planned.checkpoint)
    size, n_layers, kind = (
        config.optimizer.batch_size,
        target.num_hidden_layers,
        planned.device.kind,
    )
    mean = _width(config, kind, planned.mean_tokens)
    setup = Setup(target, config.pair, config.trained, objective, size, mean)
    l0 = expected_l0(config)
    policies = None
    if planned.checkpoint == "auto":
        longest = _width(config, kind, planned.tokens_per_sequence)
        planner = RecomputePlanner(config, target, longest, planned.device, planned.gpus)
        codes = None if l0 is None else [l0] * n_layers

        def policies(cutoff: int) -> tuple[str, ...]:
            return planner.policies(mean, cutoff, codes)

    micro_batch = flops_per_step(setup, n_layers, l0, policies)
    per_step = micro_batch * config.optimizer.accumulation
    share = measured_share(setup, planned.device) if planned.device.is_here else None
    rate = planned.device.flops_per_s * (share or 1.0)
    step_s = per_step / rate / planned.gpus
    return Prediction(l0, per_step, share, step_s, planned.steps * step_s / 3600)


def as_json(config: TrainConfig, planned: ResourceEstimate) -> dict[str, Any]:
    """Return plan and prediction as JSON values, with remedies for a run that does not fit."""
    predicted = predict(config, planned)
    first = {"peak_bytes": planned.peak_bytes, "fits": planned.fits}
    values = {**first, **dataclasses.asdict(planned), **dataclasses.asdict(predicted)}
    values["device"]["usable_bytes"] = planned.device.usable_bytes
    values["remedies"] = {} if planned.fits else dict(remedies(config, planned))
    return values


def device_kind(config: TrainConfig, gpu: str | None = None) -> str:
    """Return ``cuda`` or ``cpu``, the device type that the run is configured for."""
    name = config.pair.device
    if gpu is None and name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if gpu is not None or name.startswith("cuda") else "cpu"


def with_policy(
    config: TrainConfig, target: Any, tokens: int, device: Device, ranks: int = 1
) -> tuple[TrainConfig, RecomputePlanner | None]:
    """Resolve ``objective.checkpoint: auto``.

    Returns:
        The configuration with one policy for all steps, and None: the configured policy, ``none``
        if the longest batch fits so, or ``full`` if no policies fit. Else the configuration with
        ``auto``, and the planner that chooses the policies of each batch.

    Args:
        config: the run's configuration.
        target: transformers' configuration of the target.
        tokens: tokens of the longest sequence, with padding.
        device: the device whose usable memory the step must fit into.
        ranks: number of devices that share the run.
    """
    if config.objective.checkpoint != "auto":
        return config, None
    planner = RecomputePlanner(config, target, tokens, device, ranks)
    if not planner.recomputes:
        return _with(config, "objective", checkpoint="none"), None
    if not planner.fits:
        return _with(config, "objective", checkpoint="full"), None
    return config, planner


def _recompute(
    planner: RecomputePlanner, config: TrainConfig, target: Any, tokens: int, width: int
) -> RecomputeEstimate:
    """Estimate what layers save at one length, for adapters of sparse codes.

    ``width`` is the length with padding.
    """
    n_layers = target.num_hidden_layers
    l0 = expected_l0(config)
    codes = None if l0 is None else [l0] * n_layers
    cutoffs = range(config.objective.first_cutoff, n_layers + 1)
    chosen = {cutoff: planner.policies(width, cutoff, codes) for cutoff in cutoffs}
    counts = {p: sum(each.count(p) for each in chosen.values()) for p in POLICIES}
    return RecomputeEstimate(
        tokens=tokens,
        layers={policy: n / len(cutoffs) for policy, n in counts.items()},
        peak_bytes=max(planner.peak_bytes(width, k, p, codes) for k, p in chosen.items()),
    )


def remedies(config: TrainConfig, planned: ResourceEstimate) -> Iterator[tuple[str, int]]:
    """Yield settings that lower the peak, each with its peak in bytes; the lowest peak first."""
    target, kind, n = _target(config), planned.device.kind, planned.gpus

    def peak(changed: TrainConfig, tokens: int = planned.tokens_per_sequence) -> int:
        width = _width(changed, kind, tokens)
        return step_memory(changed, target, width, kind, n).peak_bytes

    # What does not fit with policies by layer does not fit with less memory than "full" needs.
    policy = "full" if planned.checkpoint == "auto" else planned.checkpoint
    config = _with(config, "objective", checkpoint=policy)
    tokens, chunk = planned.tokens_per_sequence, config.objective.kl_chunk_tokens
    tried = {
        "objective.checkpoint full": _with(config, "objective", checkpoint="full"),
        "optimizer.masters false": _with(config, "optimizer", masters=False),
        "optimizer.moments 8bit": _with(config, "optimizer", moments="8bit"),
        "optimizer.batch_size 1, with optimizer.accumulation in its stead": _with(
            config, "optimizer", batch_size=1
        ),
        "pair.dtype bfloat16": _with(config, "pair", dtype="bfloat16"),
    }
    if planned.peak_phase == "head":  # the only phase that chunks matter in
        smaller = _with(config, "objective", kl_chunk_tokens=max(1, chunk // 4))
        tried[f"objective.kl_chunk_tokens {chunk // 4}"] = smaller
    if n == 1:
        tried["pair.offload true"] = _with(config, "pair", offload=True)
    fewer = config.n_features // 2
    if fewer and config.run.init_from is None:
        tried[f"adapter.n_features {fewer}"] = _with(config, "adapter", n_features=fewer)
    peaks = {name: peak(changed) for name, changed in tried.items()}
    peaks[f"data.max_tokens {tokens // 2}"] = peak(config, tokens // 2)
    for name, size in sorted(peaks.items(), key=lambda item: item[1]):
        if size < planned.peak_bytes:
            yield name, size


def count_steps(batches_per_epoch: int, config: TrainConfig) -> int:
    """Return the optimiser steps of a run with ``batches_per_epoch`` micro-batches in its data."""
    micro_batches = batches_per_epoch * config.optimizer.epochs
    steps = -(-micro_batches // config.optimizer.accumulation)
    return steps if config.optimizer.max_steps is None else min(steps, config.optimizer.max_steps)


def gb(n: int) -> str:
    """Return a number of bytes as text, in powers of 1,000.

    Example:
        >>> gb(3_000_000_000), gb(5_000_000)
        ('3.00 GB', '5.0 MB')
    """
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def _with(config: TrainConfig, component: str, **changes: Any) -> TrainConfig:
    part = dataclasses.replace(getattr(config, component), **changes)
    return dataclasses.replace(config, **{component: part})


def _width(config: TrainConfig, device_type: str, tokens: int) -> int:
    """Return the number of tokens with padding of a batch whose longest sequence has ``tokens``."""
    return padded_width(tokens, config.data.multiple(device_type))


def _target(config: TrainConfig) -> Any:
    """Return the target's configuration; raise ``UserError`` if the base's does not match."""
    return Sources.find(config.pair).configs(planned_config)[0]


def _count_data(
    config: TrainConfig, target: Any
) -> tuple[int, int | None, int | None, int | None, int | None]:
    """Return steps, tokens, longest, mean and median sequence; None for data not read."""
    data, size = config.data, config.optimizer.batch_size
    names = [data.train] if isinstance(data.train, str) else [part.source for part in data.train]
    paths = [typed_path(resolve(name), "data.train") for name in names]
    if not all(path.is_file() and path.stat().st_size <= _READ_BYTES for path in paths):
        return count_steps(-(-SEQUENCES // size), config), None, None, None, None
    tokenizer = Sources.find(config.pair).tokenizer()
    context = target.get_text_config().max_position_embeddings
    train = load_training(data, tokenizer, context)
    longest = max(train.counts.longest, load_held_out(data, tokenizer, context).counts.longest)
    order = plan_batches(train, size, config.run.seed, data.bucket)
    steps = count_steps(order.n_batches, config)
    lengths = train.lengths
    if isinstance(train, Mixture):
        lengths = [lengths[i] for batch in range(order.n_batches) for i in order[batch]]
    mean = max(2, round(statistics.mean(lengths)))
    median = round(statistics.median(lengths))
    return steps, sum(lengths) * config.optimizer.epochs, longest, mean, median
