"""The share of a device's product rate that a real step reaches, measured on two layers.

A step also moves memory, launches kernels and runs elementwise operations, so that a time computed
from the rate of large products alone is too short.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training.planning.devices import Device
from fastadapt.training.planning.flops import Setup, count, random_pair

_LAYERS = 2
_ROUNDS = 3  # timings, after one that warms up
#: Tokens of the measured batch, and values of its weights and streams, at most, by device type.
_TOKENS = {"cpu": 512, "cuda": 8192}
_PARAMETERS = {"cpu": 20_000_000, "cuda": 4_000_000_000}


def measured_share(setup: Setup, device: Device) -> float | None:
    """Return the rate of a step of two layers with random weights over ``device.flops_per_s``.

    Args:
        setup: shapes and settings of the run's step.
        device: this machine's device, with its measured rate.

    Returns:
        The share; None if two layers of the run are too large to be timed in seconds, or do not fit
        into the free memory.
    """
    config = setup.target
    width, inner = config.hidden_size, config.intermediate_size
    layer = 4 * width * width + 6 * width * inner  # attention, and both models' MLPs
    if _LAYERS * layer + 2 * config.vocab_size * width > _PARAMETERS[device.kind]:
        return None
    tokens = min(setup.tokens, _TOKENS[device.kind])
    small = replace(
        setup,
        tokens=tokens,
        sequences=max(1, min(setup.sequences, _TOKENS[device.kind] // tokens)),
        objective=replace(setup.objective, checkpoint="none"),
    )
    try:
        seconds = _seconds(small, device.kind)
    except torch.OutOfMemoryError:  # of a GPU that others use
        return None
    # With new adapters half of the features fire, so products are dense.
    trained = small.trained
    n_features = trained.n_features if isinstance(trained, AdapterConfig) else None
    dense = None if n_features is None else float(n_features)
    return count(small, _LAYERS, 1, dense) / seconds / device.flops_per_s


def _seconds(setup: Setup, kind: str) -> float:
    """Return the median seconds of a step of random weights on this machine's device."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ReplacementModel.create(random_pair(setup, _LAYERS, kind), setup.trained)
    ids = torch.zeros(setup.sequences, setup.tokens, dtype=torch.int64, device=kind)
    seconds = []
    for _ in range(_ROUNDS + 1):
        began = time.perf_counter()
        objective(model, Batch(ids, None, ids), 1, setup.objective).loss.backward()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
