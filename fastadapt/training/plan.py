"""Steps of a run."""

from fastadapt.training.config import TrainConfig


def count_steps(batches_per_epoch: int, config: TrainConfig) -> int:
    """Optimiser steps of a run over data of ``batches_per_epoch`` micro-batches."""
    micro_batches = batches_per_epoch * config.optimizer.epochs
    steps = -(-micro_batches // config.optimizer.accumulation)
    return steps if config.optimizer.max_steps is None else min(steps, config.optimizer.max_steps)


def gib(n: int) -> str:
    """Bytes as text."""
    return f"{n / 2**30:.2f} GiB"
