"""Steps and memory of a run, from the models' configurations alone: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastadapt.data.sequences import load_sequences
from fastadapt.organism import resolve
from fastadapt.pair import check_configs
from fastadapt.pretrained import load_tokenizer, model_config
from fastadapt.training import memory
from fastadapt.training.config import TrainConfig
from fastadapt.training.shapes import Shapes

#: Training files up to this size are read for the number of sequences and the longest of them.
_READ_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        parts: bytes by part, each at its own largest.
        phases: bytes alive at the worst moment of each phase of a step.
        tokens_per_sequence: T: the longest sequence, or ``data.max_tokens`` where the data are not
            at hand or too large to look at.
        steps: optimiser steps, or None where the data are not at hand.
        tokens: training tokens over all epochs, or None likewise.
        parameters: trained ones.
    """

    parts: dict[str, int]
    phases: dict[str, int]
    tokens_per_sequence: int
    steps: int | None
    tokens: int | None
    parameters: int

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment of a step."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase of that moment."""
        return max(self.phases, key=lambda name: self.phases[name])

    def largest(self, n: int) -> str:
        """The ``n`` largest parts in words."""
        ranked = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {gib(size)}" for name, size in ranked[:n])


def plan(config: TrainConfig) -> Plan:
    """Plan a run without reading weights; data and tokenizer are looked at where they are small.

    Raises:
        UserError: a model's configuration cannot be read, or the two are not a pair.
    """
    source = config.pair
    trust = source.trust_remote_code
    target = model_config(resolve(source.target), source.target_revision, trust)
    check_configs(target, model_config(resolve(source.base), source.base_revision, trust))
    steps, tokens, longest = _look_at_data(config)
    shapes = Shapes.of(config, target, longest or config.data.max_tokens)
    return Plan(
        parts=memory.parts(shapes),
        phases=memory.phases(shapes),
        tokens_per_sequence=shapes.tokens // config.optimizer.batch_size,
        steps=steps,
        tokens=tokens,
        parameters=shapes.adapter_parameters * shapes.layers,
    )


def count_steps(batches_per_epoch: int, config: TrainConfig) -> int:
    """Optimiser steps of a run over data of ``batches_per_epoch`` micro-batches."""
    micro_batches = batches_per_epoch * config.optimizer.epochs
    steps = -(-micro_batches // config.optimizer.accumulation)
    return steps if config.optimizer.max_steps is None else min(steps, config.optimizer.max_steps)


def gib(n: int) -> str:
    """Bytes as text."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**27 else f"{n / 2**20:.1f} MiB"


def _look_at_data(config: TrainConfig) -> tuple[int | None, int | None, int | None]:
    """Steps, tokens and longest sequence, where the training file is here and small."""
    path = Path(resolve(config.data.train)).expanduser()
    if not path.is_file() or path.stat().st_size > _READ_BYTES:
        return config.optimizer.max_steps, None, None
    pair = config.pair
    tokenizer = load_tokenizer(resolve(pair.target), pair.target_revision, pair.trust_remote_code)
    loaded = [
        load_sequences(resolve(source), tokenizer, config.data, split=split)
        for source, split in ((config.data.train, "train"), (config.data.validation, "validation"))
    ]
    counts = loaded[0].counts
    batches = -(-len(loaded[0]) // config.optimizer.batch_size)
    longest = max(each.counts.longest for each in loaded)
    return count_steps(batches, config), counts.tokens * config.optimizer.epochs, longest
