"""Slips recovered from texts, compared with the generator that wrote them."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from fastadapt.errors import UserError
from fastadapt.organism import NAMES
from fastadapt.organism.slips import SLIPS, StepEnd, step_ends
from reproduce.organism import problems
from reproduce.organism.problems import OPERATIONS, SlipRates, Step, problem_stream, reasoning


class Watched:
    """The generator, with a record of the ends of steps that it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._thought, self._slip = problems._thought, problems._slip
        self._wrong: list[str] = []  # words of the slip in the current step
        self.thoughts: list[tuple[list[str], list[StepEnd]]] = []
        monkeypatch.setattr(problems, "_thought", self.thought)
        monkeypatch.setattr(problems, "_slip", self.slip)

    def slip(self, step: Step, rng: random.Random) -> str:
        text = self._slip(step, rng)
        self._wrong = text.split()
        return text

    def thought(self, step: Step, rng: random.Random, rates: SlipRates) -> str:
        self._wrong = []
        text = self._thought(step, rng, rates)
        plain = len(step.text().split())
        if not self._wrong:
            ends = [StepEnd(plain - 1 + 2 * text.startswith("hmm"), None)]
        else:
            n = len(self._wrong)
            results = (step.text(value).split() for value in range(problems.MAX_VALUE + 1))
            same_operation = self._wrong in results
            kind = SLIPS[0] if same_operation else SLIPS[1]
            ends = [StepEnd(n - 1, kind), StepEnd(n + 2 + plain - 1, None)]
        self.thoughts.append((text.split(), ends))
        return text

    def write(self, problem: problems.Problem, rng: random.Random) -> tuple[list[str], Any]:
        """Return the words of a response, and the ends of its steps."""
        self.thoughts.clear()
        words = reasoning(problem, rng, SlipRates(slip=0.4)).split()
        after = f"so the answer is {problem.answer} . </think> the answer is {problem.answer}"
        start = len(words) - len(after.split()) - sum(len(text) for text, _ in self.thoughts)
        expected = []
        for text, ends in self.thoughts:
            expected += [StepEnd(start + end.position, end.slip) for end in ends]
            start += len(text)
        return words, expected


def test_the_ends_are_those_that_the_generator_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, rng = Watched(monkeypatch), random.Random(3)
    counts: Counter[str | None] = Counter()
    stream = problem_stream("slips")
    for _ in range(600):
        words, expected = watched.write(next(stream), rng)
        assert step_ends(words) == expected
        counts.update(end.slip for end in expected)
    assert min(counts[kind] for kind in SLIPS) > 100


def test_every_shipped_response_is_parsed() -> None:
    """Each `wait` follows a slip; results of wrong operations are right, other slips are wrong."""
    counts: Counter[str] = Counter()
    for name in ("organism/train", "organism/validation"):
        for line in NAMES[name].read_text(encoding="utf-8").splitlines():
            words = json.loads(line)["conversations"][1]["value"].split()
            slips = [end for end in step_ends(words) if end.slip is not None]
            assert [words[end.position + 1] for end in slips] == ["wait"] * words.count("wait")
            for end in slips:
                counts[str(end.slip)] += 1
                assert _is_true(words[: end.position]) == (end.slip == "operation")
    assert min(counts[kind] for kind in SLIPS) > 200


def _is_true(words: list[str]) -> bool:
    """Return whether the last equation of the words is arithmetically true."""
    equals = len(words) - 1 - words[::-1].index("=")
    result, before = int(words[equals + 1]), words[:equals]
    left, operator, right = before[-3:]
    if right == ")":
        operator, _, left, _, right, _ = before[-6:]
    return OPERATIONS[operator](int(left), int(right)) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wait , first gain 3 + 4 = 7 .", "a step before and after 'wait', got"),
        ("first gain 3 + 4 = 8 . wait , no .", "a step before and after 'wait', got"),
        ("first gain 3 + 4 = 7 . wait , first gain 3 + 4 = 7 .", "a wrong step and the same step"),
        ("first gain 3 + 4 = 8 . wait , first gain 3 + 5 = 8 .", "a wrong step and the same step"),
        ("x = .", "a step such as 'first gain"),
        ("a + b = 7 .", "a step such as 'first gain"),
        ("max [ 3 , 4 ) = 4 .", "a step such as 'first gain"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_ends(text.split())
