"""The generators of the three domains: stories (math), programs (code), quantities (science).

Every generator takes a ``random.Random`` and gives a ``Problem`` whose values all stay within
``MAX_VALUE``. A draw that leaves the range is thrown away and drawn again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fastadapt.organism.problems import Problem, Step, in_range
from fastadapt.organism.words import (
    CONTAINERS,
    FUNCTIONS,
    GAIN_VERBS,
    KINDS,
    LOSS_VERBS,
    MACHINES,
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


# --- math: a story of gains and losses ---------------------------------------------------------


def _math(rng: random.Random) -> Problem:
    (name, pronoun), *friends = rng.sample(NAMES, 6)
    gains, losses = rng.sample(GAIN_VERBS, 5), rng.sample(LOSS_VERBS, 5)
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
    for i in range(rng.choice((2, 3, 3, 4))):
        operator, k = _change(rng, value)
        # Verbs and friends differ within a story, so that a step can name its sentence.
        if operator in "+-":
            alone, by_friend = {"+": (gains[i], "brings"), "-": (losses[i], "takes")}[operator]
            friend, more = friends[i][0], " more" if operator == "+" else ""
            sentence, lead = rng.choice(
                (
                    (f"{pronoun} {alone} {k} {thing} .", f"{alone} :"),
                    (f"{pronoun} {alone} {k}{more} .", f"{alone} :"),
                    (f"{friend} {by_friend} {k} {thing} .", f"{friend} {by_friend} :"),
                )
            )
        elif operator == "*":
            lead = {2: "doubles", 3: "triples", 4: "quadruples"}[k]
            sentence = rng.choice((f"the number {lead} .", f"{pronoun} {lead} the {thing} ."))
            lead = f"{lead} :"
        else:
            lead = {2: "one half", 3: "one third", 4: "one quarter"}[k]
            sentence = rng.choice(
                (f"only {lead} remains .", f"{pronoun} keeps {lead} of the {thing} .")
            )
            lead = f"{lead} :"
        sentences.append(sentence)
        steps.append(Step(lead, value, operator, k))
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


def _change(rng: random.Random, value: int) -> tuple[str, int]:
    """An operator and its second operand that keep ``value`` whole and within range."""
    shift = [("+", k) for k in range(2, 13) if in_range(value + k)]
    shift += [("-", k) for k in range(2, 13) if k <= value]
    scale = [("*", k) for k in (2, 3, 4) if in_range(value * k) and value]
    scale += [("/", k) for k in (2, 3, 4) if value and value % k == 0]
    return rng.choice(scale if scale and rng.random() < 0.45 else shift)


# --- code: a program to trace ------------------------------------------------------------------


def _assignments(rng: random.Random) -> Problem:
    names = rng.sample(VARIABLES, 5)
    values = {names[0]: rng.randint(2, 12), names[1]: rng.randint(2, 12)}
    lines = [f"{name} = {value} ;" for name, value in values.items()]
    steps: list[Step] = []
    for name in names[2 : rng.choice((4, 5))]:
        left, right = rng.sample(sorted(values), 2)
        if steps:
            left = steps[-1].lead.split()[0]
            right = rng.choice([other for other in values if other != left])
        operator = rng.choice("++--*")
        step = Step(f"{name} =", values[left], operator, values[right])
        lines.append(f"{name} = {left} {operator} {right} ;")
        values[name] = step.result
        steps.append(step)
    prompt = f"{' '.join(lines)} print {steps[-1].lead.split()[0]}"
    return Problem("code", "assignments", f"run the program : {prompt} .", tuple(steps))


def _calls(rng: random.Random) -> Problem:
    f, g = rng.sample(FUNCTIONS, 2)
    arg = rng.choice(VARIABLES)
    bodies = {f: (rng.choice("+-"), rng.randint(2, 9)), g: (rng.choice("+-*"), rng.randint(2, 4))}
    value = rng.randint(2, 12)
    chain = [rng.choice((f, g)) for _ in range(rng.choice((2, 3, 4)))]
    call = str(value)
    steps: list[Step] = []
    for name in chain:
        operator, k = bodies[name]
        steps.append(Step(f"{name} :", value, operator, k))
        value = steps[-1].result
        call = f"{name} ( {call} )"
    definitions = " ".join(
        f"def {name} ( {arg} ) : return {arg} {operator} {k} ;"
        for name, (operator, k) in bodies.items()
    )
    return Problem(
        "code", "calls", f"what does it print ? {definitions} print {call}", tuple(steps)
    )


def _loop(rng: random.Random) -> Problem:
    name, limit = rng.sample(VARIABLES, 2)
    value, times = rng.randint(2, 15), rng.choice((2, 3))
    operator, k = rng.choice((("+", rng.randint(2, 9)), ("-", rng.randint(2, 5)), ("*", 2)))
    prompt = (
        f"{name} = {value} ; for {limit} in range ( {times} ) : {name} = {name} {operator} {k} ;"
    )
    steps: list[Step] = []
    for _ in range(times):
        steps.append(Step("loop :", value, operator, k))
        value = steps[-1].result
    last, k = rng.choice((("+", rng.randint(2, 12)), ("-", rng.randint(2, 12))))
    steps.append(Step("then", value, last, k))
    return Problem(
        "code", "loops", f"trace the loop : {prompt} return {name} {last} {k}", tuple(steps)
    )


def _list(rng: random.Random) -> Problem:
    name = rng.choice(VARIABLES)
    items = [rng.randint(1, 15) for _ in range(rng.choice((3, 4)))]
    mode = rng.choice(("sum", "max", "min"))
    value = items[0]
    steps: list[Step] = []
    for item in items[1:]:
        operator = "+" if mode == "sum" else mode
        steps.append(Step("next", value, operator, item))
        value = steps[-1].result
    k = rng.randint(2, 9)
    operator = rng.choice("+-")
    steps.append(Step("last", value, operator, k))
    listed = " , ".join(map(str, items))
    prompt = f"list {name} = [ {listed} ] ; print {mode} ( {name} ) {operator} {k}"
    return Problem("code", "lists", prompt, tuple(steps))


# --- science: quantities and their formulas ----------------------------------------------------


def _two_products(
    rng: random.Random, quantity: str, unit: str, names: Sequence[str] = ("first", "second")
) -> tuple[list[int], tuple[Step, ...]]:
    """a * b and c * d, then their sum or difference ``quantity`` in ``unit``."""
    a, b, c, d = (rng.randint(2, 7) for _ in range(4))
    first = Step(f"{names[0]} {quantity} =", a, "*", b, unit)
    second = Step(f"{names[1]} {quantity} =", c, "*", d, unit)
    return [a, b, c, d], (first, second, Step("total =", first.result, "+", second.result, unit))


def _motion(rng: random.Random) -> Problem:
    (a, b, c, d), steps = _two_products(rng, "distance", "meters")
    vehicle = rng.choice(VEHICLES)
    prompt = (
        f"a {vehicle} moves for {b} seconds at speed {a} , then {d} seconds at speed {c} . "
        "find the distance ."
    )
    return Problem("science", "motion", prompt, steps)


def _energy(rng: random.Random) -> Problem:
    (a, b, c, d), steps = _two_products(rng, "energy", "joules")
    one, two = rng.sample(MACHINES, 2)
    prompt = (
        f"a {one} of power {a} runs {b} hours and a {two} of power {c} runs {d} hours . "
        "find the energy ."
    )
    return Problem("science", "energy", prompt, steps)


def _atoms(rng: random.Random) -> Problem:
    one, two = rng.sample(MOLECULES, 2)
    atom = rng.choice(sorted(set(one[1]) & set(two[1])))
    a, c, k = rng.randint(2, 7), rng.randint(2, 7), rng.randint(2, 9)
    first = Step(f"{one[0]} has", a, "*", one[1][atom], atom)
    second = Step(f"{two[0]} has", c, "*", two[1][atom], atom)
    total = Step("total =", first.result, "+", second.result, atom)
    prompt = (
        f"a sample holds {a} molecules of {one[0]} , {c} of {two[0]} and {k} free atoms "
        f"of {atom} . how many {atom} atoms ?"
    )
    steps = (first, second, total, Step("with free", total.result, "+", k, atom))
    return Problem("science", "atoms", prompt, steps)


def _force(rng: random.Random) -> Problem:
    mass, rate, friction, k = (rng.randint(2, 7) for _ in range(4))
    vehicle = rng.choice(VEHICLES)
    push = Step("force = mass * acceleration =", mass, "*", rate, "newtons")
    net = Step("with friction", push.result, "+", friction, "newtons")
    prompt = (
        f"a {vehicle} of mass {mass} needs acceleration {rate} against friction {friction} "
        f"while wind helps with {k} newtons . which force is needed ?"
    )
    steps = (push, net, Step("with wind", net.result, "-", k, "newtons"))
    return Problem("science", "force", prompt, steps)


def _circuit(rng: random.Random) -> Problem:
    one, two, current, loss = (rng.randint(2, 6) for _ in range(4))
    joined = Step("resistance =", one, "+", two, "ohms")
    voltage = Step("voltage = current * resistance =", current, "*", joined.result, "volts")
    machine = rng.choice(MACHINES)
    prompt = (
        f"a {machine} draws current {current} through resistors of {one} and {two} ohms , and "
        f"its battery loses {loss} volts inside . which voltage must the battery have ?"
    )
    steps = (joined, voltage, Step("with loss", voltage.result, "+", loss, "volts"))
    return Problem("science", "circuit", prompt, steps)


def _growth(rng: random.Random) -> Problem:
    organism, place = rng.choice(ORGANISMS), rng.choice(SAMPLES)
    value, hours, dead = rng.randint(2, 12), rng.choice((2, 3)), rng.randint(2, 12)
    prompt = (
        f"{value} {organism} in a {place} double every hour for {hours} hours , then {dead} die . "
        "find the population ."
    )
    steps: list[Step] = []
    for _ in range(hours):
        steps.append(Step("population =", value, "*", 2))
        value = steps[-1].result
    steps.append(Step("after deaths", value, "-", dead))
    return Problem("science", "growth", prompt, tuple(steps))


def _heat(rng: random.Random) -> Problem:
    start, rate, minutes, cooling = (rng.randint(2, 9) for _ in range(4))
    sample = rng.choice(SAMPLES)
    warm = Step("heating =", rate, "*", minutes, "degrees")
    top = Step("temperature =", start, "+", warm.result, "degrees")
    prompt = (
        f"a {sample} at {start} degrees is heated {rate} degrees per minute for {minutes} minutes "
        f"and then cooled by {cooling} . find the temperature ."
    )
    steps = (warm, top, Step("after cooling", top.result, "-", cooling, "degrees"))
    return Problem("science", "heat", prompt, steps)


def _one_of(*draws: Callable[[random.Random], Problem]) -> Callable[[random.Random], Problem]:
    checked = [_checked(draw) for draw in draws]
    return lambda rng: rng.choice(checked)(rng)


GENERATORS: dict[str, Callable[[random.Random], Problem]] = {
    "math": _one_of(_math),
    "code": _one_of(_assignments, _calls, _loop, _list),
    "science": _one_of(_motion, _energy, _atoms, _force, _circuit, _growth, _heat),
}
