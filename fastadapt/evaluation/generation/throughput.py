"""Measures the generation speed of models relative to the target.

Tokens per second of sampled responses depend on their lengths. Here every model generates the same
number of tokens after the same prompts, greedily and past end-of-sequence tokens. Models take
turns, so that other load on the machine slows all of them alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import torch

from fastadapt.errors import UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.evaluation.result_schema import SpeedFile
from fastadapt.io.atomic import disk_errors, replacing
from fastadapt.io.documents import DocumentError, read_json, same
from fastadapt.io.names import has_file


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of the measurement of speed.

    Args:
        batch_size: sequences per batch.
        prompt_tokens: tokens per prompt.
        new_tokens: generated tokens per sequence.
        rounds: number of timings of every model; medians are reported.
    """

    batch_size: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"speed.{name}: expected 1 or more, got {getattr(self, name)}")


def measure_speed(
    models: ModelSet,
    path: Path,
    config: SpeedConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> dict[str, Any]:
    """Time the target, the hybrid and every run, or read the stored measurement.

    Args:
        models: the runs.
        path: JSON file that stores the result.
        config: settings.
        progress: called with (completed rounds, total rounds).
        stop: set it to stop after the current round; nothing is stored then.

    Returns:
        The settings, ``device``, and ``models``: by name ``tokens_per_s``, and ``overhead``, the
        median over rounds of the model's time over the target's, minus 1. Empty if stopped.

    Raises:
        UserError: the file is damaged.
        RunError: the file cannot be written.
    """
    config = config or SpeedConfig()
    names = ["target", "hybrid", *models.runs]
    facts = {
        **asdict(config),
        "device": _device(models),
        "fingerprints": {name: models.fingerprint(name) for name in names},
    }
    if (stored := _read_stored(path, facts, names)) is not None:
        return stored
    model = models.model
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, config.prompt_tokens)
    ids = torch.randint(model.model.config.vocab_size, shape, generator=generator)
    ids = ids.to(model.device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(config.rounds + 1):  # turn 0 is a warm-up
        if stop is not None and stop.is_set():
            return {}
        for name in names:
            with models.generating(name) as generates:
                took = _time(generates, ids, config.new_tokens)
            if turn:
                seconds[name].append(took)
        if progress is not None and turn:
            progress(turn, config.rounds)
    n_tokens = config.batch_size * config.new_tokens
    speed = {
        **asdict(config),
        "device": facts["device"],
        "models": {
            name: {
                "tokens_per_s": n_tokens / median(taken),
                "overhead": median(_ratios(taken, seconds["target"])) - 1,
            }
            for name, taken in seconds.items()
        },
    }
    with disk_errors(path), replacing(path) as staged:
        staged.write_text(json.dumps({"facts": facts, "speed": speed}, indent=1) + "\n")
    return speed


def _read_stored(path: Path, facts: dict[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the result in ``path`` if it has the same models and settings."""
    if not has_file(path):
        return None
    try:
        content = read_json(path, SpeedFile)
        speed: dict[str, Any] = content["speed"]
        if not same(content["facts"], facts):
            return None
        for key in speed.keys() & facts.keys():
            if not same(speed[key], facts[key]):
                raise DocumentError(
                    f"{path}: speed.{key}: expected {facts[key]!r}, as in facts, got {speed[key]!r}"
                )
        if absent := [name for name in names if name not in speed["models"]]:
            raise DocumentError(f"{path}: speed.models: expected the key {absent[0]!r}")
    except DocumentError as error:
        raise UserError(
            f"{error}. Remove the file and evaluate again to measure the speed again."
        ) from error
    return speed


def _ratios(taken: Sequence[float], target: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(taken, target, strict=True)]


@torch.no_grad()
def _time(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    """Return the seconds in which a model generates one batch."""
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - began


def _device(models: ModelSet) -> str:
    device = models.model.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
