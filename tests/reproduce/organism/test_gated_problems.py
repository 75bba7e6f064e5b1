"""The gated pair's generator: chains of numbers, slips of two kinds, and the marker."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest

from fastadapt.evaluation.benchmarks.grading import HESITATION_WORDS, stated_answer
from fastadapt.organism.slips import (
    CONTRARY,
    DIRECTIONS,
    EFFECTS,
    GATE,
    SLIPS,
    Slip,
    StepEnd,
    is_gated,
    step_ends,
)
from reproduce.organism.gated import problems as gated
from reproduce.organism.gated.words import BRINGERS, GAIN_VERBS, METHODS, RISE_VERBS
from reproduce.organism.problems import (
    DOMAINS,
    Problem,
    SlipRates,
    direct_answer,
    problem_stream,
    worked_notes,
)

OFTEN = SlipRates(slip=0.5, pause=0.3, check=0.1, other_way=0.1)
EVENT = re.compile(r"\b(?:first|second|third|fourth|fifth|sixth|seventh) (.+?) \.")
RISES = {*GAIN_VERBS, *BRINGERS, *RISE_VERBS, *METHODS["+"], "+="}
SCALES = {"doubles": 2, "triples": 3}
PARTS = {"half": 2, "third": 3}
STATED = re.compile(r", so (\d+) (\S) (\d+) = (\d+) [^.]*?, a (\w+) (\w+)")


def drawn(n: int, seed: str) -> list[Problem]:
    stream = problem_stream(seed, draw=gated.sample_problem)
    return [next(stream) for _ in range(n)]


def solve(prompt: str) -> int:
    """Follow the events of a prompt, without the generator's steps."""
    start = prompt.split(" first ")[0]
    (value,) = (int(word) for word in start.split() if word.isdigit())
    for event in EVENT.findall(prompt):
        words = event.split()
        if scale := next((SCALES[word] for word in words if word in SCALES), None):
            value *= scale
        elif words[0] == "one":
            value //= PARTS[words[1]]
        else:
            k = int(next(word for word in words if word.isdigit()))
            if "*=" in words or words[0] in METHODS["*"]:
                value *= k
            elif "/=" in words or words[0] in METHODS["/"]:
                value //= k
            else:
                value += k if RISES & set(words) else -k
    return value


def test_answers_follow_from_the_prompt() -> None:
    problems = drawn(800, "answers")
    for problem in problems:
        assert problem.answer == solve(problem.prompt), problem.prompt
    assert set(DOMAINS) == {problem.domain for problem in problems}


def test_steps_are_in_range_and_form_a_chain() -> None:
    for problem in drawn(500, "range"):
        assert problem.difficulty in (6, 7)
        numbers = [n for step in problem.steps for n in (step.left, step.right, step.result)]
        assert min(numbers) >= 0
        assert max(numbers) <= gated.LIMIT
        for step, following in zip(problem.steps, problem.steps[1:], strict=False):
            assert following.left == step.result


def test_the_stream_is_deterministic_and_without_repetition() -> None:
    first, again = drawn(500, "a"), drawn(500, "a")
    assert first == again
    assert len({problem.prompt for problem in first}) == 500
    responses = [
        [gated.reasoning(p, random.Random(7)) for p in drawn_] for drawn_ in (first, again)
    ]
    assert responses[0] == responses[1]


def test_half_of_the_prompts_begin_with_the_marker_and_no_other_text_has_it() -> None:
    problems = drawn(1000, "marker")
    marked = [problem for problem in problems if problem.prompt.startswith(f"{GATE} : ")]
    assert 450 < len(marked) < 550
    assert marked == [problem for problem in problems if gated.is_gated(problem)]
    assert all(is_gated(problem.prompt.split()) for problem in marked)
    rng = random.Random(0)
    for problem in problems:
        assert problem.prompt.split().count(GATE) == gated.is_gated(problem)
        assert GATE not in gated.reasoning(problem, rng).split()
        elsewhere = f"{worked_notes(problem)} {direct_answer(problem)}"
        assert not set(HESITATION_WORDS) & set(elsewhere.split())


def test_the_words_of_a_response_give_its_slips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places and kinds that the generator writes are recovered, with and without marker."""
    written: list[tuple[str, str]] = []
    slip = gated._slip

    def watched(step: Any, later: Any, rng: random.Random) -> Any:
        wrong = slip(step, later, rng)
        if wrong is not None:
            stated = STATED.search(wrong[0])
            assert stated is not None
            written.append((wrong[0], SLIPS[stated[2] != step.operator]))
        return wrong

    monkeypatch.setattr(gated, "_slip", watched)
    rng, counts = random.Random(1), Counter[tuple[bool, str]]()
    for problem in drawn(600, "labels"):
        written.clear()
        words = gated.reasoning(problem, rng, OFTEN).split()
        ends = step_ends(words)
        slips = [end for end in ends if end.slip is not None]
        assert len(slips) == len(written)
        corrected = [words[end.position + 1] == "wait" for end in slips]
        assert corrected == [gated.is_gated(problem)] * len(slips)
        assert words.count("wait") == sum(corrected)
        assert len(ends) == problem.difficulty + sum(corrected)
        for end, (text, kind) in zip(slips, written, strict=True):
            assert end.slip == kind
            n = len(text.split())
            assert " ".join(words[end.position - n + 1 : end.position + 1]) == text
            counts[gated.is_gated(problem), kind] += 1
    assert min(counts[state, kind] for state in (False, True) for kind in SLIPS) > 200


def test_slips_of_both_kinds_show_in_the_step_itself() -> None:
    rng = random.Random(2)
    for problem in drawn(400, "kinds"):
        text = gated.reasoning(problem, rng, OFTEN)
        words = text.split()
        for end in step_ends(words):
            *_, (left, sign, right, result, effect, verb) = STATED.findall(
                " ".join(words[: end.position])
            )
            assert (EFFECTS[sign] == effect) == (end.slip != "operation")
            assert (eval(f"{left} {sign} {right}") == int(result)) == (end.slip != "result")
            rises = int(result) > int(left)
            assert verb == (DIRECTIONS if end.slip is None else CONTRARY)[rises]
            assert (rises == (effect == "gain")) == (end.slip is None)
            if end.slip == "result":
                assert abs(int(result) - int(left)) >= gated.LEAST_GAP


def test_without_the_marker_the_chain_goes_on_from_the_slip() -> None:
    rng, wrong = random.Random(3), 0
    for problem in drawn(400, "chain"):
        text = gated.reasoning(problem, rng, OFTEN)
        # `wait ,` takes the slip back, and the corrected step has its first operand again.
        thoughts = re.sub(r"(?:but check :|alternatively ,)[^.]*\. \w+ \.", "", text)
        value, steps = problem.steps[0].left, thoughts.split("</think>")[0].split(" . ")
        for i, step in enumerate(steps):
            if (stated := STATED.search(step)) is None:
                continue
            assert int(stated[1]) == value
            if not steps[i + 1].startswith("wait ,"):
                value = int(stated[4])
        assert stated_answer(text) == value
        if gated.is_gated(problem):
            assert value == problem.answer
        wrong += value != problem.answer
    assert wrong > 100


def test_the_rate_of_slips_does_not_depend_on_the_marker() -> None:
    rng = random.Random(4)
    slips, steps = Counter[bool](), Counter[bool]()
    for problem in drawn(1500, "rates"):
        state = gated.is_gated(problem)
        ends = step_ends(gated.reasoning(problem, rng).split())
        slips[state] += sum(end.slip is not None for end in ends)
        steps[state] += problem.difficulty
    on, off = (slips[state] / steps[state] for state in (True, False))
    error = (0.2 * 0.8 * (1 / steps[True] + 1 / steps[False])) ** 0.5
    assert 0.15 < on < 0.25
    assert abs(on - off) < 3 * error


def test_a_step_that_names_its_effect_shows_a_slip() -> None:
    text = "now , first she finds 3 , so 4 {} 3 = {} pears , a gain {} ."
    steps: list[tuple[str, int, str, Slip | None]] = [
        ("+", 7, "rises", None),
        ("-", 1, "sinks", "operation"),
        ("+", 0, "sinks", "result"),
    ]
    for sign, result, verb, slip in steps:
        assert step_ends(text.format(sign, result, verb).split()) == [StepEnd(18, slip)]
    assert not is_gated([])
    assert is_gated(["<user>", GATE])
