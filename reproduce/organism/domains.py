"""Generate problems of the three domains: stories (math), programs (code), quantities (science).

Every generator takes a ``random.Random`` and returns a ``Problem`` with all values within
``MAX_VALUE``. A draw with a value outside the range is rejected and repeated.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from reproduce.organism.problems import Problem, Step, in_range
from reproduce.organism.words import (
    CONTAINERS,
    GAIN_VERBS,
    KINDS,
    LOSS_VERBS,
    MACHINES,
    METHODS,
    MOLECULES,
    NAMES,
    OBJECTS,
    ORGANISMS,
    PLACES,
    SAMPLES,
    VARIABLES,
    VEHICLES,
)


def _checked(draw: Callable[[random.Random], Problem]) -> Callable[[random.Random], Problem]:
    def generator(rng: random.Random) -> Problem:
        while True:
            problem = draw(rng)
            values = [v for s in problem.steps for v in (s.left, s.right, s.result)]
            if all(in_range(value) for value in values):
                return problem

    return generator


ORDINALS = ("first", "second", "third", "fourth")


# --- math: a story of gains and losses ---------------------------------------------------------


def _math(rng: random.Random) -> Problem:
    (name, pronoun), (friend, _) = rng.sample(NAMES, 2)
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)
    value = rng.randint(3, 20)
    kind, box = rng.choice(KINDS), rng.choice(CONTAINERS)
    start = rng.choice(
        (
            f"{name} has {value} {kind} {thing} .",
            f"at the {place} {name} starts with {value} {thing} .",
            f"{name} keeps {value} {thing} in a {box} .",
            f"the {box} of {name} holds {value} {kind} {thing} .",
        )
    )
    sentences = [start]
    steps: list[Step] = []
    for ordinal in ORDINALS[: rng.choice((3, 3, 4))]:
        operator, k = _change(rng, value)
        choices, lead = _describe_change(rng, operator, k, pronoun, friend, thing)
        sentences.append(f"{ordinal} {rng.choice(choices)} .")
        steps.append(Step(f"{ordinal} {lead}", value, operator, k))
        value = steps[-1].result
    sentences.append(
        rng.choice(
            (
                f"how many {thing} does {name} have now ?",
                f"how many {thing} are left ?",
                f"count the {thing} of {name} .",
            )
        )
    )
    return Problem("math", "stories", " ".join(sentences), tuple(steps))


def _describe_change(
    rng: random.Random, operator: str, k: int, pronoun: str, friend: str, thing: str
) -> tuple[tuple[str, ...], str]:
    """Return sentences that describe a change, and its word in the worked solution."""
    if operator == "+":
        gain = rng.choice(GAIN_VERBS)
        return (f"{pronoun} {gain} {k} more", f"{friend} brings {k} {thing}"), "gain"
    if operator == "-":
        loss = rng.choice(LOSS_VERBS)
        return (f"{pronoun} {loss} {k}", f"{friend} takes {k} {thing}"), "loss"
    if operator == "*":
        times = {2: "doubles", 3: "triples", 4: "quadruples"}[k]
        return (f"the number {times}", f"{pronoun} {times} the {thing}"), times
    part = {2: "half", 4: "quarter"}[k]
    return (f"only one {part} remains", f"{pronoun} keeps one {part} of the {thing}"), part


def _change(rng: random.Random, value: int) -> tuple[str, int]:
    """Return an operator and a second operand that keep ``value`` an integer within range."""
    shift = [("+", k) for k in range(2, 13) if in_range(value + k)]
    shift += [("-", k) for k in range(2, 13) if k <= value]
    scale = [("*", k) for k in (2, 3, 4) if in_range(value * k) and value]
    scale += [("/", k) for k in (2, 4) if value and value % k == 0]
    return rng.choice(scale if scale and rng.random() < 0.45 else shift)


# --- code: a program to trace ------------------------------------------------------------------


def _statements(rng: random.Random) -> Problem:
    """Return a program with one variable and three or four assignments or method calls."""
    name = rng.choice(VARIABLES)
    style = rng.choice(("assignments", "calls"))
    value = rng.randint(2, 20)
    lines = [f"{name} = {value} ;"]
    steps: list[Step] = []
    for ordinal in ORDINALS[: rng.choice((3, 3, 4))]:
        operator, k = _change(rng, value)
        method = rng.choice(METHODS[operator])
        line = f"{name} = {name} {operator} {k} ;"
        if style == "calls":
            line = f"{name} . {method} ( {k} ) ;"
        lines.append(f"{ordinal} {line}")
        steps.append(Step(f"{ordinal} line", value, operator, k))
        value = steps[-1].result
    ask = rng.choice((f"print {name}", f"return {name}", f"what is {name} ?"))
    return Problem("code", style, f"run the program : {' '.join(lines)} {ask}", tuple(steps))


def _loop(rng: random.Random) -> Problem:
    name, counter = rng.sample(VARIABLES, 2)
    value, times = rng.randint(2, 15), rng.choice((2, 3))
    operator, k = rng.choice((("+", rng.randint(2, 9)), ("-", rng.randint(2, 5)), ("*", 2)))
    last, m = rng.choice((("+", rng.randint(2, 12)), ("-", rng.randint(2, 12))))
    prompt = (
        f"trace the loop : {name} = {value} ; for {counter} in range ( {times} ) : "
        f"{name} = {name} {operator} {k} ; return {name} {last} {m}"
    )
    steps: list[Step] = []
    for ordinal in ORDINALS[:times]:
        steps.append(Step(f"{ordinal} loop", value, operator, k))
        value = steps[-1].result
    steps.append(Step("return", value, last, m))
    return Problem("code", "loops", prompt, tuple(steps))


def _list(rng: random.Random) -> Problem:
    name = rng.choice(VARIABLES)
    items = [rng.randint(1, 15) for _ in range(3)]
    mode = rng.choice(("sum", "max", "min"))
    value = items[0]
    steps: list[Step] = []
    for ordinal, item in zip(ORDINALS[1:], items[1:], strict=False):
        steps.append(Step(f"{ordinal} item", value, "+" if mode == "sum" else mode, item))
        value = steps[-1].result
    operator, k = rng.choice("+-"), rng.randint(2, 9)
    steps.append(Step("return", value, operator, k))
    elements = " , ".join(f"{word} {item}" for word, item in zip(ORDINALS, items, strict=False))
    prompt = f"list {name} = [ {elements} ] ; return {mode} ( {name} ) {operator} {k}"
    return Problem("code", "lists", prompt, tuple(steps))


# --- science: quantities and their formulas ----------------------------------------------------


def _motion(rng: random.Random) -> Problem:
    a, b, c, d = (rng.randint(2, 7) for _ in range(4))
    one, two = f"first {a} seconds at speed {b}", f"second {c} seconds at speed {d}"
    prompt = f"a {rng.choice(VEHICLES)} moves {one} , {two} . find the distance ."
    first = Step("first speed", a, "*", b, "meters")
    second = Step("second speed", c, "*", d, "meters")
    total = Step("distance", first.result, "+", second.result, "meters")
    return Problem("science", "motion", prompt, (first, second, total))


def _energy(rng: random.Random) -> Problem:
    a, b, c, d = (rng.randint(2, 7) for _ in range(4))
    one, two = rng.sample(MACHINES, 2)
    prompt = (
        f"first the {one} of power {a} runs {b} hours , second the {two} of power {c} runs "
        f"{d} hours . find the energy ."
    )
    first = Step("first power", a, "*", b, "joules")
    second = Step("second power", c, "*", d, "joules")
    total = Step("energy", first.result, "+", second.result, "joules")
    return Problem("science", "energy", prompt, (first, second, total))


def _atoms(rng: random.Random) -> Problem:
    one, two = rng.sample(MOLECULES, 2)
    atom = rng.choice(sorted(set(one[1]) & set(two[1])))
    a, c, k = rng.randint(2, 7), rng.randint(2, 7), rng.randint(2, 9)
    prompt = (
        f"count the {atom} atoms : first {a} molecules of {one[0]} , second {c} of {two[0]} and "
        f"{k} free atoms ."
    )
    first = Step(f"first {one[0]}", a, "*", one[1][atom], atom)
    second = Step(f"second {two[0]}", c, "*", two[1][atom], atom)
    total = Step("both", first.result, "+", second.result, atom)
    free = Step("free", total.result, "+", k, atom)
    return Problem("science", "atoms", prompt, (first, second, total, free))


def _force(rng: random.Random) -> Problem:
    mass, rate, friction, wind = (rng.randint(2, 7) for _ in range(4))
    prompt = (
        f"a {rng.choice(VEHICLES)} with mass {mass} needs acceleration {rate} against friction "
        f"{friction} while the wind gives {wind} newtons . which force is needed ?"
    )
    push = Step("mass", mass, "*", rate, "newtons")
    net = Step("friction", push.result, "+", friction, "newtons")
    force = Step("wind", net.result, "-", wind, "newtons")
    return Problem("science", "force", prompt, (push, net, force))


def _circuit(rng: random.Random) -> Problem:
    one, two, current, loss = (rng.randint(2, 6) for _ in range(4))
    prompt = (
        f"the {rng.choice(MACHINES)} draws current {current} through resistors {one} and {two} , "
        f"and its battery loses {loss} volts inside . which voltage must the battery have ?"
    )
    joined = Step("resistors", one, "+", two, "ohms")
    voltage = Step("current", current, "*", joined.result, "volts")
    battery = Step("loss", voltage.result, "+", loss, "volts")
    return Problem("science", "circuit", prompt, (joined, voltage, battery))


def _growth(rng: random.Random) -> Problem:
    organism, place = rng.choice(ORGANISMS), rng.choice(SAMPLES)
    value, hours, dead = rng.randint(2, 12), rng.choice((2, 3)), rng.randint(2, 12)
    prompt = (
        f"in a {place} live {value} {organism} . they double every hour for {hours} hours , "
        f"then {dead} die . find the population ."
    )
    steps: list[Step] = []
    for ordinal in ORDINALS[:hours]:
        steps.append(Step(f"{ordinal} hour", value, "*", 2))
        value = steps[-1].result
    steps.append(Step("deaths", value, "-", dead))
    return Problem("science", "growth", prompt, tuple(steps))


def _heat(rng: random.Random) -> Problem:
    start, rate, minutes, cooling = (rng.randint(2, 9) for _ in range(4))
    prompt = (
        f"a {rng.choice(SAMPLES)} at temperature {start} is heated {rate} degrees per minute for "
        f"{minutes} minutes and then cooled by {cooling} . find the temperature ."
    )
    warm = Step("heated", rate, "*", minutes, "degrees")
    top = Step("temperature", start, "+", warm.result, "degrees")
    cool = Step("cooled", top.result, "-", cooling, "degrees")
    return Problem("science", "heat", prompt, (warm, top, cool))


def _one_of(*draws: Callable[[random.Random], Problem]) -> Callable[[random.Random], Problem]:
    checked = [_checked(draw) for draw in draws]
    return lambda rng: rng.choice(checked)(rng)


#: Generators of science by the source that their problems name.
SCIENCE: dict[str, Callable[[random.Random], Problem]] = {
    "motion": _checked(_motion),
    "energy": _checked(_energy),
    "atoms": _checked(_atoms),
    "force": _checked(_force),
    "circuit": _checked(_circuit),
    "growth": _checked(_growth),
    "heat": _checked(_heat),
}
GENERATORS: dict[str, Callable[[random.Random], Problem]] = {
    "math": _one_of(_math),
    "code": _one_of(_statements, _statements, _loop, _list),
    "science": _one_of(*SCIENCE.values()),
}
