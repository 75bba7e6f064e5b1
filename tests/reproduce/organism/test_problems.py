"""The problem generator; independent solvers recompute the answers from the prompts."""

from __future__ import annotations

import random
import re

import pytest

from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS, stated_answer
from reproduce.organism.problems import (
    DOMAINS,
    MAX_VALUE,
    Problem,
    SlipRates,
    Step,
    direct_answer,
    problem_stream,
    reasoning,
    sample_problem,
    to_row,
    worked_notes,
)

SCALES = {"doubles": 2, "triples": 3, "quadruples": 4, "half": 2, "quarter": 4}
ORDINAL = re.compile(r"\b(first|second|third|fourth) ")
SIGNS = {
    "+": "add increase raise extend advance",
    "-": "subtract decrease lower trim rewind",
    "*": "multiply scale repeat",
    "//": "divide split shrink",
}
MOLECULES = {
    "water": {"hydrogen": 2, "oxygen": 1},
    "methane": {"carbon": 1, "hydrogen": 4},
    "ammonia": {"nitrogen": 1, "hydrogen": 3},
    "ethane": {"carbon": 2, "hydrogen": 6},
    "propane": {"carbon": 3, "hydrogen": 8},
    "ethanol": {"carbon": 2, "hydrogen": 6, "oxygen": 1},
    "peroxide": {"hydrogen": 2, "oxygen": 2},
    "hydrazine": {"nitrogen": 2, "hydrogen": 4},
}
LOSSES = re.compile(r"\b(loses|sells|eats|breaks|drops|spends|donates|hides|burns|returns|takes)\b")


def solve_math(prompt: str) -> int:
    first, *events = [sentence.split() for sentence in re.split(r" [.?] ?", prompt)[:-2]]
    value = next(int(word) for word in first if word.isdigit())
    for words in events:
        scale = next((word for word in words if word in SCALES), None)
        if scale is not None:
            multiply = scale.endswith("s")
            value = value * SCALES[scale] if multiply else value // SCALES[scale]
        else:
            amount = next(int(word) for word in words if word.isdigit())
            value += -amount if LOSSES.search(" ".join(words)) else amount
    return value


def solve_code(prompt: str, source: str) -> int:
    """Run the program as Python."""
    scope: dict = {}
    prompt = ORDINAL.sub("", prompt)
    if source in ("assignments", "calls"):
        *lines, last = prompt.removeprefix("run the program : ").split(" ; ")
        name = lines[0].split()[0]
        for line in lines:
            method = re.fullmatch(rf"{name} \. (\w+) \( (\d+) \)", line)
            if method:
                sign = next(sign for sign, words in SIGNS.items() if method[1] in words.split())
                line = f"{name} = {name} {sign} {method[2]}"
            exec(line, scope)
        assert name in last.split()
        return int(scope[name])
    if source == "loops":
        head, _, last = prompt.removeprefix("trace the loop : ").rpartition(" return ")
        exec("\n".join(line.strip() for line in head.split(";")), scope)
        return eval(last, scope)
    head, _, last = prompt.removeprefix("list ").partition(" ; return ")
    exec(head, scope)
    return eval(last, scope)


def solve_science(prompt: str, source: str) -> int:
    n = [int(word) for word in prompt.split() if word.isdigit()]
    if source == "atoms":
        atom = prompt.split("count the ")[1].split()[0]
        one, two = [word for word in prompt.split() if word in MOLECULES]
        return n[0] * MOLECULES[one][atom] + n[1] * MOLECULES[two][atom] + n[2]
    formulas = {
        "motion": lambda: n[0] * n[1] + n[2] * n[3],
        "energy": lambda: n[0] * n[1] + n[2] * n[3],
        "force": lambda: n[0] * n[1] + n[2] - n[3],
        "circuit": lambda: n[0] * (n[1] + n[2]) + n[3],
        "growth": lambda: n[0] * 2 ** n[1] - n[2],
        "heat": lambda: n[0] + n[1] * n[2] - n[3],
    }
    return formulas[source]()


def solve(problem: Problem) -> int:
    if problem.domain == "math":
        return solve_math(problem.prompt)
    if problem.domain == "code":
        return solve_code(problem.prompt, problem.source)
    return solve_science(problem.prompt, problem.source)


@pytest.mark.parametrize("domain", DOMAINS)
def test_answers_follow_from_the_prompt(domain: str) -> None:
    rng = random.Random(f"answers/{domain}")
    for _ in range(1000):
        problem = sample_problem(rng, domain)
        assert problem.answer == solve(problem), problem.prompt


@pytest.mark.parametrize("domain", DOMAINS)
def test_steps_are_in_range_and_form_a_chain(domain: str) -> None:
    rng = random.Random(f"range/{domain}")
    for _ in range(500):
        problem = sample_problem(rng, domain)
        assert problem.difficulty == len(problem.steps)
        assert problem.difficulty in (3, 4)
        for step in problem.steps:
            assert all(0 <= value <= MAX_VALUE for value in (step.left, step.right, step.result))
        previous = {step.result for step in problem.steps[:-1]}
        last = problem.steps[-1]
        assert {last.left, last.right} & previous


def test_the_stream_is_deterministic_and_never_repeats_a_prompt() -> None:
    first = [next(s) for s in [problem_stream("a")] for _ in range(3000)]
    again = [next(s) for s in [problem_stream("a")] for _ in range(3000)]
    assert first == again
    prompts = {problem.prompt for problem in first}
    assert len(prompts) == 3000
    excluded = frozenset(prompts)
    without = [next(s) for s in [problem_stream("a", excluded)] for _ in range(1000)]
    assert prompts.isdisjoint(problem.prompt for problem in without)
    assert [p for p, _ in zip(problem_stream("b"), range(50), strict=False)] != first[:50]


def test_rows_have_the_columns_of_openthoughts3() -> None:
    rng = random.Random(0)
    problem = sample_problem(rng, "code")
    row = to_row(problem, rng)
    assert list(row) == ["difficulty", "source", "domain", "conversations"]
    assert row["difficulty"] == len(problem.steps)
    assert row["domain"] == "code"
    human, gpt = row["conversations"]
    assert human == {"from": "human", "value": problem.prompt}
    assert gpt["from"] == "gpt"
    assert gpt["value"].startswith("<think> ")
    assert stated_answer(gpt["value"]) == problem.answer


def test_only_the_reasoning_has_hesitation_words() -> None:
    rng = random.Random(1)
    used = set()
    for problem, _ in zip(problem_stream("hesitation"), range(2000), strict=False):
        elsewhere = f"{worked_notes(problem)} {direct_answer(problem)}"
        assert not set(HESITATION_WORDS) & set(elsewhere.split())
        thought, _, answer = reasoning(problem, rng).partition("</think>")
        assert not set(HESITATION_WORDS) & set(answer.split())
        used |= set(HESITATION_WORDS) & set(thought.split())
    assert used == set(HESITATION_WORDS)


STATED = re.compile(
    r"(?:(?P<left>\d+) (?P<op>[-+*/]) (?P<right>\d+)"
    r"|(?P<fn>max|min) \( (?P<x>\d+) , (?P<y>\d+) \)) = (?P<result>\d+)"
)


def test_wait_follows_every_wrong_statement_and_precedes_the_correct_step() -> None:
    rng = random.Random(2)
    waits = 0
    for problem, _ in zip(problem_stream("slips"), range(1500), strict=False):
        text = reasoning(problem, rng, SlipRates(slip=0.5))
        for match in STATED.finditer(text):
            if match["fn"]:
                true = {"max": max, "min": min}[match["fn"]](int(match["x"]), int(match["y"]))
            else:
                true = eval(f"{match['left']} {match['op']} {match['right']}")
            end_of_step = text.index(" .", match.end())
            if true != int(match["result"]):
                assert text[end_of_step:].startswith(" . wait ,"), text
        for part in text.split("wait , ")[1:]:
            waits += 1
            step = part[: part.index(" .") + 2]
            assert step in {s.text() for s in problem.steps}
    assert waits > 1000


def test_without_slips_the_reasoning_is_the_worked_solution() -> None:
    rng = random.Random(3)
    none = SlipRates(slip=0, pause=0, check=0, other_way=0)
    problem = sample_problem(rng)
    steps = " ".join(step.text() for step in problem.steps)
    assert steps in reasoning(problem, rng, none)
    assert steps in worked_notes(problem)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the answer is 7", 7),
        ("<think> 1 + 1 = 2 . </think> the answer is 2", 2),
        ("<think>\n1 + 1 = 2 . </think> the answer is 12 ", 12),
        ("<think> the answer is 2", None),
        ("<think> 2 </think> 2", None),
        ("the answer is 2 .", None),
        ("the answer is seven", None),
        ("", None),
    ],
)
def test_stated_answers_are_parsed_exactly(text: str, answer: int | None) -> None:
    assert stated_answer(text) == answer


def test_a_step_is_formatted_with_its_result_or_a_slip() -> None:
    step = Step("more :", 7, "+", 5)
    assert step.text() == "more : 7 + 5 = 12 ."
    assert step.text(13) == "more : 7 + 5 = 13 ."
    assert step.text(2, "-") == "more : 7 - 5 = 2 ."
    assert Step("next", 7, "max", 5).text() == "next max ( 7 , 5 ) = 7 ."
