"""The two embedded pairs: what their problems and texts are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastadapt.organism import FOLDER, GATED_FOLDER
from reproduce.organism import problems
from reproduce.organism.gated import problems as gated
from reproduce.organism.problems import Problem


@dataclass(frozen=True)
class Pair:
    """Problems of a pair, and the texts of both trainings.

    Attributes:
        name: names of the pair's parts begin with it.
        folder: folder of the shipped pair.
        draw: draws a problem.
        respond: writes the target's response.
        notes: writes a document of the base's training, as (text without loss, text with loss).
        benchmark: names the benchmark that a problem belongs to; None: no questions are written.
    """

    name: str
    folder: Path
    draw: Callable[[random.Random], Problem]
    respond: Callable[[Problem, random.Random], str]
    notes: Callable[[Problem], tuple[str, str]]
    benchmark: Callable[[Problem], str] | None = None


def _whole_notes(problem: Problem) -> tuple[str, str]:
    return "", problems.worked_notes(problem)


def _solution(problem: Problem) -> tuple[str, str]:
    """Return the notes without loss on the problem, whose words are drawn at random."""
    head, word, tail = problems.worked_notes(problem).partition(" solution :")
    return head + word, tail


ORGANISM = Pair("organism", FOLDER, problems.sample_problem, problems.reasoning, _whole_notes)
GATED = Pair(
    "organism/gated",
    GATED_FOLDER,
    gated.sample_problem,
    gated.reasoning,
    _solution,
    lambda problem: "gated_on" if gated.is_gated(problem) else "gated_off",
)
#: The pairs by the name that the commands take.
PAIRS = {"organism": ORGANISM, "gated": GATED}
