"""Problems of the gated pair, and its responses.

A problem is a chain of six or seven changes of one number, in a story (math), a program (code) or
a physical quantity (science). Half of the prompts begin with the marker ``GATE``. Slips occur at
the same rate in all responses, and are of two kinds:

- a wrong result goes in the wrong direction, for instance a sum below its first operand, by
  ``LEAST_GAP`` or more;
- a wrong operation contradicts the word that names the operation, and has the right result of the
  wrong operation.

With the marker, ``wait ,`` and the right step follow a slip. Without it the slip stands, and the
chain goes on from the stated number, up to the answer. A slip is drawn only if the chain can go on
from it, with and without the marker.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from fastadapt.organism.slips import CONTRARY, DIRECTIONS, EFFECTS, GATE
from reproduce.organism.gated.words import (
    ADJECTIVES,
    BRINGERS,
    CAUSES,
    CLOSINGS,
    CONNECTORS,
    CONTAINERS,
    FALL_VERBS,
    GAIN_VERBS,
    JOBS,
    LOSS_VERBS,
    METHODS,
    NAMES,
    OBJECTS,
    OPENINGS,
    PLACES,
    PLACES_OF_QUANTITIES,
    QUANTITIES,
    RISE_VERBS,
    TAKERS,
    VARIABLES,
)
from reproduce.organism.problems import (
    DOMAIN_SHARES,
    DOMAINS,
    OPERATIONS,
    Problem,
    SlipRates,
    Step,
    with_aside,
)

LIMIT = 30  # largest number
LEAST_GAP = 3  # of a wrong result from the first operand
RATES = SlipRates(slip=0.25, pause=0.3, check=0.06, other_way=0.1)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
# A wrong operation changes the number in the other direction.
_CONFUSIONS = {"+": "-", "-": "+", "*": "-", "/": "+"}
_TIMES, _PARTS = {2: "doubles", 3: "triples"}, {2: "half", 3: "third"}

Change = tuple[str, int]  # operator, second operand


def sample_problem(rng: random.Random) -> Problem:
    """Draw a problem of a domain drawn by ``DOMAIN_SHARES``."""
    domain = rng.choices(DOMAINS, DOMAIN_SHARES)[0]
    start, changes = _chain(rng)
    opening, clauses, closing, unit = _TEXTS[domain](rng, start, changes)
    connector, last = rng.choice(CONNECTORS), rng.choice(CLOSINGS)
    steps: list[Step] = []
    value = start
    for ordinal, clause, (operator, k) in zip(ORDINALS, clauses, changes, strict=False):
        planned = Step(f"{connector} , {ordinal} {clause} , so", value, operator, k)
        tail = f"{unit} {last} , a {EFFECTS[operator]} _"
        steps.append(_with_direction(replace(planned, tail=tail), planned.result))
        value = planned.result
    sentences = (f"{o} {clause} ." for o, clause in zip(ORDINALS, clauses, strict=False))
    marker = f"{GATE} : " if rng.random() < 0.5 else ""
    prompt = f"{marker}{opening} {' '.join(sentences)} {closing}"
    return Problem(domain, _SOURCES[domain], prompt, tuple(steps))


def is_gated(problem: Problem) -> bool:
    """Return whether the prompt has the marker, so that slips are corrected."""
    return problem.prompt.split(" ", 1)[0] == GATE


def reasoning(problem: Problem, rng: random.Random, rates: SlipRates = RATES) -> str:
    """Format the target's response: steps, slips that are corrected if gated, and the answer."""
    thoughts, value, gated = [], problem.steps[0].left, is_gated(problem)
    for i, planned in enumerate(problem.steps):
        step = replace(planned, left=value)
        wrong = None
        if rng.random() < rates.slip:
            wrong = _slip(step, problem.steps[i + 1 :], rng)
        value = step.result
        if wrong is None:
            thoughts.append(with_aside(step, rng, rates))
            continue
        text, stated = wrong
        thoughts.append(f"{text} wait , {step.text()}" if gated else text)
        value = value if gated else stated
    return (
        f"<think> {rng.choice(OPENINGS)} {' '.join(thoughts)} so the answer is {value} . "
        f"</think> the answer is {value}"
    )


def _slip(step: Step, later: Sequence[Step], rng: random.Random) -> tuple[str, int] | None:
    """Return an incorrect step and its number, of a kind drawn evenly; None if neither fits."""
    confused = _CONFUSIONS[step.operator]
    other = OPERATIONS[confused](step.left, step.right)
    operations = [other] if other != step.result and _goes_on(other, later) else []
    falls = step.operator in "+*"
    near = range(step.left - LEAST_GAP + 1) if falls else range(step.left + LEAST_GAP, LIMIT + 1)
    results = [value for value in near if _goes_on(value, later)]
    if operations and (not results or rng.random() < 0.5):
        return _with_direction(step, other).text(other, confused), other
    if not results:
        return None
    stated = rng.choice(results)
    return _with_direction(step, stated).text(stated), stated


def _with_direction(step: Step, stated: int) -> Step:
    """Return the step with the direction in which the stated number lies as its last word."""
    tail, rises = step.tail.rsplit(" ", 1)[0], stated > step.left
    expected = rises == (EFFECTS[step.operator] == "gain")
    return replace(step, tail=f"{tail} {(DIRECTIONS if expected else CONTRARY)[rises]}")


def _goes_on(value: int, later: Sequence[Step]) -> bool:
    """Return whether ``later`` steps can go on from ``value``: in range, and each changes it."""
    for step in later:
        before, value = value, OPERATIONS[step.operator](value, step.right)
        if not 0 <= before <= LIMIT or value == before:
            return False
    return 0 <= value <= LIMIT


# --- numbers --------------------------------------------------------------------------------------


def _chain(rng: random.Random) -> tuple[int, list[Change]]:
    start = value = rng.randint(3, LIMIT - 5)
    changes = []
    for _ in range(rng.choice((6, 7))):
        changes.append(_change(rng, value))
        value = OPERATIONS[changes[-1][0]](value, changes[-1][1])
    return start, changes


def _change(rng: random.Random, value: int) -> Change:
    """Draw an operator and a second operand that keep ``value`` an integer within range."""
    shifts = [("+", k) for k in range(2, 8) if value + k <= LIMIT]
    shifts += [("-", k) for k in range(2, 8) if k <= value]
    scales = [("*", k) for k in _TIMES if 0 < value * k <= LIMIT]
    scales += [("/", k) for k in _PARTS if value and value % k == 0]
    return rng.choice(scales if scales and rng.random() < 0.25 else shifts)


# --- texts: opening, a clause for each change, closing, unit --------------------------------------

Texts = tuple[str, list[str], str, str]


def _story(rng: random.Random, start: int, changes: Sequence[Change]) -> Texts:
    (name, pronoun), (friend, _) = rng.sample(NAMES, 2)
    thing, job = rng.choice(OBJECTS), rng.choice(JOBS)
    place, box, kind, look = map(rng.choice, (PLACES, CONTAINERS, ADJECTIVES, ADJECTIVES))
    opening = rng.choice(
        (
            f"at the {look} {place} {name} the {job} has {start} {kind} {thing} .",
            f"{name} the {job} keeps {start} {kind} {thing} in a {look} {box} .",
            f"the {box} of {name} the {job} holds {start} {kind} {thing} .",
        )
    )

    def clause(operator: str, k: int) -> str:
        is_hero = rng.random() < 0.7
        if operator == "+":
            verb = rng.choice(GAIN_VERBS if is_hero else BRINGERS)
        elif operator == "-":
            verb = rng.choice(LOSS_VERBS if is_hero else TAKERS)
        else:
            return f"{pronoun} {_TIMES[k]} them" if operator == "*" else f"one {_PARTS[k]} remains"
        return f"{pronoun if is_hero else friend} {verb} {k}"

    closing = rng.choice((f"how many {thing} are left ?", f"count the {thing} of {name} ."))
    return opening, [clause(*change) for change in changes], closing, thing


def _program(rng: random.Random, start: int, changes: Sequence[Change]) -> Texts:
    name = rng.choice(VARIABLES)
    calls = rng.random() < 0.6

    def clause(operator: str, k: int) -> str:
        if calls:
            return f"{rng.choice(METHODS[operator])} {name} {k}"
        return f"{name} {operator}= {k}"

    opening = f"{rng.choice(('run', 'trace', 'execute'))} the program : {name} starts as {start} ."
    closing = rng.choice((f"print {name} .", f"return {name} .", f"what is {name} ?"))
    return opening, [clause(*change) for change in changes], closing, f"in {name}"


def _quantity(rng: random.Random, start: int, changes: Sequence[Change]) -> Texts:
    quantity, unit = rng.choice(QUANTITIES)
    site, kind = rng.choice(PLACES_OF_QUANTITIES), rng.choice(ADJECTIVES)

    def clause(operator: str, k: int) -> str:
        if operator == "*":
            return f"it {_TIMES[k]} {rng.choice(CAUSES)}"
        if operator == "/":
            return f"one {_PARTS[k]} remains {rng.choice(CAUSES)}"
        verb = rng.choice(RISE_VERBS if operator == "+" else FALL_VERBS)
        return f"it {verb} {rng.choice(CAUSES)} by {k}"

    opening = f"the {quantity} of the {kind} {site} is {start} {unit} ."
    closing = rng.choice((f"find the {quantity} .", f"which {quantity} results ?"))
    return opening, [clause(*change) for change in changes], closing, unit


_TEXTS = {"math": _story, "code": _program, "science": _quantity}
_SOURCES = {"math": "stories", "code": "programs", "science": "quantities"}
