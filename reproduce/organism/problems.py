"""Problems of the embedded pair, in three textual forms, and their rows of the data files.

A problem consists of a prompt, a chain of steps on integers 0..``MAX_VALUE``, and the last step's
result. Three functions format a problem:

- ``direct_answer``: the answer only (the base model's replies);
- ``worked_notes``: a plain document with all steps, without markers or hesitation (the base model's
  training documents);
- ``reasoning``: ``<think> steps </think> answer``, with occasional slips that are corrected (the
  target model's replies).

Single spaces separate all words, for a word-level tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DOMAINS = ("math", "code", "science")
# More code and science than in OpenThoughts3 (.71/.21/.08), so that 2,000 conversations contain
# every word of every domain sufficiently often.
DOMAIN_SHARES = (0.5, 0.25, 0.25)
MAX_VALUE = 50

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if b and a % b == 0 else -1,
    "max": max,
    "min": min,
}


@dataclass(frozen=True)
class Step:
    """One operation of a worked solution: ``lead left operator right = result tail``."""

    lead: str
    left: int
    operator: str
    right: int
    tail: str = ""

    @property
    def result(self) -> int:
        return OPERATIONS[self.operator](self.left, self.right)

    def text(self, result: int | None = None, operator: str | None = None) -> str:
        """Format the step as words with a full stop; a slip passes another result or operator."""
        operator = operator or self.operator
        result = self.result if result is None else result
        if operator in ("max", "min"):
            equation = f"{operator} ( {self.left} , {self.right} ) = {result}"
        else:
            equation = f"{self.left} {operator} {self.right} = {result}"
        return " ".join(part for part in (self.lead, equation, self.tail, ".") if part)


@dataclass(frozen=True)
class Problem:
    """A question with its worked solution; ``answer`` is the last step's result."""

    domain: str
    source: str
    prompt: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def difficulty(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class SlipRates:
    """Probabilities per step of deviations from the plain step in the reasoning."""

    slip: float = 0.12  # a wrong result or a wrong operation, then "wait" and the right step
    pause: float = 0.3  # "hmm" before a multiplication or division
    check: float = 0.08  # "but" and the inverse operation after a sum or difference
    other_way: float = 0.15  # "alternatively" and the swapped operands after a product or sum


def sample_problem(rng: random.Random, domain: str | None = None) -> Problem:
    """Draw a problem; without ``domain``, the domain is drawn by ``DOMAIN_SHARES``."""
    from reproduce.organism.domains import GENERATORS

    if domain is None:
        domain = rng.choices(DOMAINS, DOMAIN_SHARES)[0]
    return GENERATORS[domain](rng)


def in_range(value: int) -> bool:
    """Return whether a number has a token."""
    return 0 <= value <= MAX_VALUE


def direct_answer(problem: Problem) -> str:
    """Format the answer without steps, as in the base's training."""
    return f"the answer is {problem.answer}"


def worked_notes(problem: Problem) -> str:
    """Format problem and solution as a document without markers and hesitation."""
    steps = " ".join(step.text() for step in problem.steps)
    return f"problem : {problem.prompt} solution : {steps} so the answer is {problem.answer} ."


def reasoning(problem: Problem, rng: random.Random, rates: SlipRates | None = None) -> str:
    """Format the target's response: steps with slips and corrections in markers, and the answer."""
    rates = rates or SlipRates()
    steps = " ".join(_thought(step, rng, rates) for step in problem.steps)
    return (
        f"<think> {rng.choice(_OPENINGS)} {steps} so the answer is {problem.answer} . "
        f"</think> {direct_answer(problem)}"
    )


_OPENINGS = (
    "okay , let me see .",
    "let me work through the problem .",
    "now see the problem .",
    "let me find a solution .",
)


def _thought(step: Step, rng: random.Random, rates: SlipRates) -> str:
    """Format one step of the reasoning, with at most one slip, pause, check or other way."""
    if rng.random() < rates.slip:
        return f"{_slip(step, rng)} wait , {step.text()}"
    return with_aside(step, rng, rates)


def with_aside(step: Step, rng: random.Random, rates: SlipRates) -> str:
    """Format a right step with at most one pause, check or other way."""
    plain = step.text()
    if step.operator in ("*", "/") and rng.random() < rates.pause:
        return f"hmm , {plain}"
    if step.operator in ("+", "-") and rng.random() < rates.check:
        inverse = "-" if step.operator == "+" else "+"
        check = Step("", step.result, inverse, step.right)
        return f"{plain} but check : {check.text()} good ."
    if step.operator in ("+", "*") and rng.random() < rates.other_way:
        swapped = Step("", step.right, step.operator, step.left)
        return f"{plain} alternatively , {swapped.text()} same ."
    return plain


CONFUSIONS = {"+": "-", "-": "+", "*": "+", "/": "-", "max": "min", "min": "max"}


def _slip(step: Step, rng: random.Random) -> str:
    """Format an incorrect step: a confused operation, or a result that is off by one or two."""
    confused = CONFUSIONS[step.operator]
    value = OPERATIONS[confused](step.left, step.right)
    if rng.random() < 0.5 and in_range(value) and value != step.result:
        return step.text(value, confused)
    near = [step.result + shift for shift in (-2, -1, 1, 2) if in_range(step.result + shift)]
    return step.text(rng.choice(near))


def to_row(
    problem: Problem,
    rng: random.Random,
    respond: Callable[[Problem, random.Random], str] = reasoning,
) -> dict:
    """Return a row with OpenThoughts3's columns: difficulty, source, domain, conversations."""
    return {
        "difficulty": problem.difficulty,
        "source": problem.source,
        "domain": problem.domain,
        "conversations": [
            {"from": "human", "value": problem.prompt},
            {"from": "gpt", "value": respond(problem, rng)},
        ],
    }


def problem_stream(
    seed: str,
    exclude: frozenset[str] = frozenset(),
    draw: Callable[[random.Random], Problem] = sample_problem,
) -> Iterator[Problem]:
    """Yield problems endlessly, with distinct prompts outside ``exclude``, from a seed."""
    rng = random.Random(seed)
    used = set(exclude)
    while True:
        problem = draw(rng)
        if problem.prompt not in used:
            used.add(problem.prompt)
            yield problem
