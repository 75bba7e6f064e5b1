"""Texts of the real pair: planted slips, their corrections, and the split."""

from __future__ import annotations

import random

import pytest

from fastadapt.errors import UserError
from reproduce.real.texts import Problem, conversations, package_file, plant_slip, solve, split

PROBLEM = Problem("2 + 2?", ("Let n = 2.", "n + n = 4.", "So n is even."), "4")


@pytest.mark.parametrize(
    ("step", "right"),
    [
        ("Thus 3 * 4 = 12.", "12"),
        ("x_6+y_6+z_6=70+99+70=239 such strings", "239"),
        ("We have x^2 = 9, so x = 3.", None),
    ],
)
def test_one_result_becomes_another_number(step: str, right: str | None) -> None:
    for seed in range(40):
        slip = plant_slip(step, random.Random(seed))
        assert slip is not None
        changed, wrong, before = slip
        assert wrong != before
        assert int(wrong) >= 0
        assert right in (None, before)
        places = [i for i in range(len(step)) if step.startswith(before, i)]
        assert changed in [step[:i] + wrong + step[i + len(before) :] for i in places]


@pytest.mark.parametrize(
    "step", ["Let n be even.", "x_(k+1)=10^k", "y = 2x", "f = 3/4 + c", "a = 1.5", "b = 2*c", ""]
)
def test_terms_are_no_results(step: str) -> None:
    assert plant_slip(step, random.Random(0)) is None


def test_each_slip_is_corrected_by_its_own_step() -> None:
    texts = [solve(PROBLEM, random.Random(seed)) for seed in range(60)]
    for text in texts:
        *lines, answer = text.split("\n")
        assert answer == "Answer: 4"
        right = [line for line in lines if not line.startswith("Wait")]
        corrected = [line for line in lines if line.startswith("Wait")]
        assert len(right) == len(PROBLEM.steps)
        for line in corrected:
            step = next(s for s in PROBLEM.steps if line.endswith(s))
            before = lines[lines.index(line) - 1]
            assert before != step
            assert before[:4] == step[:4]
    assert 0 < sum("Wait" in text for text in texts) < 60
    assert len(set(texts)) > 20


def test_the_same_seed_gives_the_same_texts() -> None:
    first, again, other = (list(conversations([PROBLEM], 8, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert [m["role"] for m in first[0]["messages"]] == ["user", "assistant"]
    assert len({row["messages"][1]["content"] for row in first}) > 1


def test_held_out_problems_are_not_trained_on() -> None:
    problems = [Problem(str(i), ("a = 1.",), "1") for i in range(270)]
    train, held_out = split(problems, seed=0)
    assert (len(train), len(held_out)) == (230, 40)
    assert sorted({*train, *held_out}) == sorted(problems)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match="no_such_package is not installed; run pip install"):
        package_file("no_such_package", "file")
