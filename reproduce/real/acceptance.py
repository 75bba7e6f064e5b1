"""Measure the behaviour that the LoRA teaches, and whether the adapters of a run explain it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastadapt.effects.generate import MODELS, GenerateConfig, generate_all
from fastadapt.effects.requests import prompt_ids
from fastadapt.effects.run import load_run
from fastadapt.evaluation.benchmarks.grading import hesitations
from fastadapt.training.logs.run_log import read_run
from reproduce.real.texts import WORD, Problem

#: Least factor of the target's rate over the base's, and of the hybrid's KL that adapters close.
FACTOR, CLOSED = 10.0, 0.8
#: Largest L0 of the adapters.
L0 = 10.0


@dataclass(frozen=True)
class Rate:
    """How often sampled responses of a model contain :data:`WORD`.

    Attributes:
        model: ``base``, ``hybrid``, ``adapter`` or ``target``.
        responses: number of responses.
        tokens: their tokens.
        words: how often the word occurs in them.
    """

    model: str
    responses: int
    tokens: int
    words: int

    @property
    def per_1000(self) -> float:
        """Occurrences per 1,000 sampled tokens."""
        return 1000 * self.words / max(1, self.tokens)


def sampled_rates(
    run: Path,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Rate]:
    """Sample one response to each problem from every model of a run, at temperature 0.7.

    Args:
        run: folder of the run.
        problems: held-out problems.
        max_new_tokens: largest number of tokens of a response.
        seed: seed of the sampling.
        progress: called with the name of each model before it generates.

    Raises:
        UserError: the folder holds no finished run.
    """
    loaded = load_run(run)
    prompts = [prompt_ids(loaded.models, problem.text) for problem in problems]
    rates = []
    for model in MODELS:
        progress(model)
        config = GenerateConfig((model,), 0.7, max_new_tokens, seed)
        responses = [answer for (answer,) in generate_all(loaded, prompts, config)]
        rates.append(
            Rate(
                model,
                len(responses),
                sum(len(response.tokens) for response in responses),
                sum(hesitations(response.text, (WORD.lower(),)) for response in responses),
            )
        )
    return rates


def check(run: Path, rates: Sequence[Rate]) -> dict[str, Any]:
    """Compare rates and the run's summary with the bounds.

    The rate of a base that never says the word counts as one occurrence in its tokens, so that the
    factor is finite.

    Returns:
        ``rates``; ``factor``: the target's rate over the base's; ``closed``: share of the hybrid's
        KL that the adapters close; ``l0``; ``failed``: names of the missed bounds.
    """
    by_model = {rate.model: rate for rate in rates}
    base, target = by_model["base"], by_model["target"]
    summary = read_run(run).summary
    factor = target.per_1000 / (1000 * max(1, base.words) / max(1, base.tokens))
    closed = 1 - summary["kl_adapter"] / summary["kl_hybrid"]
    l0 = summary["l0_mean"]
    passed = {"factor": factor >= FACTOR, "closed": closed >= CLOSED, "l0": l0 <= L0}
    return {
        "rates": [{**asdict(rate), "per_1000_tokens": rate.per_1000} for rate in rates],
        "factor": factor,
        "closed": closed,
        "l0": l0,
        "failed": [name for name, ok in passed.items() if not ok],
    }
