"""What whole steps take on paper: operations, and bytes by the trainer's plan or by two short ones.

T tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

from benchmarks.step_models import L0, Sizes, model_config, pair_config
from fastadapt.adapter.module import AdapterConfig
from fastadapt.objective import ObjectiveConfig
from fastadapt.training.config import from_dict
from fastadapt.training.planning.flops import Setup, count
from fastadapt.training.planning.memory import step_memory

__all__ = ["necessary_flops", "on_the_line", "planned_bytes"]


@cache
def necessary_flops(sizes: Sizes, T: int, cutoffs: tuple[int, ...]) -> float:
    """Of our step with nothing recomputed, mean over the cutoffs; counting takes seconds."""
    objective, adapter = ObjectiveConfig(checkpoint="none"), AdapterConfig(sizes.features)
    setup = Setup(model_config(sizes), pair_config(sizes), adapter, objective, 1, T)
    return sum(count(setup, sizes.layers, k, L0) for k in cutoffs) / len(cutoffs)


def planned_bytes(sizes: Sizes, T: int, policy: str, device: str) -> int:
    """What the memory plan says of our step."""
    config = from_dict(
        {
            "pair": asdict(pair_config(sizes)),
            "adapter": {"n_features": sizes.features},
            "objective": {
                "checkpoint": policy,
                "logits_dtype": None if device == "cpu" else "bfloat16",
            },
            "data": {"train": "none.jsonl", "validation": "none.jsonl"},
            "optimizer": {"masters": False},
            "run": {"output": "none"},
        }
    )
    return step_memory(config, model_config(sizes), T, device).peak_bytes


def on_the_line(peaks: dict[int, int], T: int) -> int:
    """Bytes at T tokens by those at two numbers of tokens: what a step keeps grows as they do."""
    (few, low), (many, high) = sorted(peaks.items())
    return round(low + (high - low) / (many - few) * (T - few))
