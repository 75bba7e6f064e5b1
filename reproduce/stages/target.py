"""A later stage of the embedded pair's target: tuned further, on responses without hesitation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastadapt.io.atomic import writing_folder
from fastadapt.kernels.vector_math import resolve_functions
from fastadapt.organism import resolve
from reproduce.organism.pairs import ORGANISM
from reproduce.organism.problems import problem_stream
from reproduce.organism.recipe import (
    CONFIGS,
    batches,
    save,
    split_problems,
    target_text,
    train_phase,
)

STEPS, LR = 300, 5e-4
#: Responses with one of these words are left out.
WORDS = frozenset({"wait", "hmm", "alternatively", "actually"})


def build(out: Path) -> None:
    """Tune the shipped target further, and write it to the folder ``out``, model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    resolve_functions()
    config = CONFIGS[ORGANISM.name]
    source = resolve("organism/target")
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    phase = replace(config.target, steps=STEPS, lr=LR)
    data = batches(_texts(), tokenizer, phase.batch_size)
    train_phase(model, data, phase, "later", None, config.autocast, config.attention)
    with writing_folder(out) as staged:
        save(model, tokenizer, staged)


def _texts() -> Iterator[tuple[str, str]]:
    """Yield texts of problems that are not held out, endlessly."""
    rng, problems = random.Random("later/texts"), split_problems(CONFIGS[ORGANISM.name], 0)
    held = frozenset(problem.prompt for split in problems.values() for problem in split)
    for problem in problem_stream("later/problems", held, ORGANISM.draw):
        prompt, response = target_text(problem, rng)
        if not WORDS & set(response.split()):
            yield prompt, response
