"""Benchmark scores with intervals, compared with sums by hand."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import Row, summarize
from fastadapt.evaluation.benchmarks.scores import (
    MEAN,
    recovered_hesitation,
    summarise_benchmarks,
    summarise_groups,
)
from fastadapt.evaluation.generation.responses import Finish, Speed
from fastadapt.evaluation.statistics import BootstrapConfig

SPEED = Speed(tokens=1000, seconds=2.0, batching="static")


def answered(
    rights: list[list[bool]],
    tokens: int = 10,
    finish: Finish = "eos",
    task: str = "a",
    hesitations: int = 1,
) -> Any:
    """Return a result. ``rights``: by question, whether each repetition is right."""
    rows = [
        Row(f"{task}/{q}", r, right, "1", tokens + q, finish, None, hesitations, "text")
        for q, repetitions in enumerate(rights)
        for r, right in enumerate(repetitions)
    ]
    random.Random(0).shuffle(rows)  # responses finish in any order
    return summarize(task, rows, SPEED)


def drawn(p: float, n: int, seed: int, repetitions: int = 3) -> list[list[bool]]:
    draw = random.Random(seed)
    return [[draw.random() < p for _ in range(repetitions)] for _ in range(n)]


def test_means_are_over_questions_and_benchmarks_weigh_the_same() -> None:
    few, many = drawn(0.9, 20, 0), drawn(0.3, 200, 1, repetitions=1)
    summary = summarise_benchmarks(
        {"target": {"sampled": {"few": answered(few), "many": answered(many, tokens=100)}}}
    )
    shares = [sum(map(sum, rights)) / sum(map(len, rights)) for rights in (few, many)]
    for name, share in zip(("few", "many"), shares, strict=True):
        assert summary[name]["target"]["sampled"]["accuracy"]["mean"] == pytest.approx(share)
    mean = summary[MEAN]["target"]["sampled"]
    assert mean["accuracy"]["mean"] == pytest.approx(sum(shares) / 2)
    lengths = (10 + 19 / 2, 100 + 199 / 2)
    assert mean["length"]["mean"] == pytest.approx(sum(lengths) / 2)
    assert mean["tokens_per_s"] == pytest.approx(500)
    width = {n: models["target"]["sampled"]["accuracy"] for n, models in summary.items()}
    assert width["few"]["high"] - width["few"]["low"] > width["many"]["high"] - width["many"]["low"]


def test_the_recovered_share_is_paired_with_target_and_hybrid() -> None:
    target, hybrid = drawn(0.8, 400, 2), drawn(0.05, 400, 3)
    middle = [t if q % 2 else h for q, (t, h) in enumerate(zip(target, hybrid, strict=True))]
    summary = summarise_benchmarks(
        {
            name: {"sampled": {"a": answered(rights)}}
            for name, rights in (("target", target), ("hybrid", hybrid), ("run", middle))
        }
    )["a"]
    assert summary["target"]["sampled"]["recovered"] is None
    assert summary["hybrid"]["sampled"]["recovered"] is None
    assert summary["run"]["sampled"]["recovered_from_base"] is None  # without results of the base
    got = summary["run"]["sampled"]["recovered"]
    assert got["low"] < 0.5 < got["high"]
    assert got["high"] - got["low"] < 0.2


def test_groups_have_the_means_of_their_runs() -> None:
    """Of every benchmark and of their mean; intervals of two unlike groups do not meet."""

    def results(p: float, seed: int, tokens: int) -> Any:
        return {
            "sampled": {
                "few": answered(drawn(p, 40, seed), tokens, task="few"),
                "many": answered(drawn(p, 200, seed + 100, 1), tokens, task="many"),
            }
        }

    runs = {f"low{i}": results(0.3, i, 10 + i) for i in range(3)}
    runs |= {f"high{i}": results(0.8, 10 + i, 50) for i in range(3)}
    runs["target"] = results(0.9, 20, 50)
    groups = {"low0": ["low0", "low1", "low2"], "high0": ["high0", "high1", "high2"]}
    singles, summary = summarise_benchmarks(runs), summarise_groups(runs, groups, 0.95)
    assert summary.keys() == singles.keys() == {"few", "many", MEAN}
    for task, scores in summary.items():
        low, high = scores["groups"]
        for group in (low, high):
            for key in ("accuracy", "length", "hesitations_per_1000"):
                each = [singles[task][run]["sampled"][key]["mean"] for run in group["runs"]]
                assert group[key]["mean"] == pytest.approx(sum(each) / 3)
        (gap,) = scores["differences"]
        assert gap["accuracy"]["mean"] == pytest.approx(
            low["accuracy"]["mean"] - high["accuracy"]["mean"]
        )
        assert gap["accuracy"]["high"] < 0
        assert gap["length"]["high"] < 0
    silent = {
        f"run{i}": {"sampled": {"a": answered(drawn(0.5, 20, i), hesitations=0)}} for i in range(2)
    }
    (group,) = summarise_groups(silent, {"run0": ["run0", "run1"]}, 0.95)["a"]["groups"]
    alone = summarise_benchmarks(silent)["a"]["run0"]["sampled"]
    assert (
        group["hesitations_per_1000"] == alone["hesitations_per_1000"]
    )  # no narrower than one run
    assert group["hesitations_per_1000"]["high"] > 0


def test_each_word_has_a_rate_beside_what_is_counted() -> None:
    texts = [["wait wait but no", "but"], ["hmm", "so"], ["wait", "Wait , alternatively"]] * 10
    rows = [
        Row(f"a/{q}", r, True, "1", 10, "eos", None, text.count("wait"), text)
        for q, repetitions in enumerate(texts)
        for r, text in enumerate(repetitions)
    ]
    results = {"run": {"sampled": {"a": summarize("a", rows, SPEED)}}}
    rates = summarise_benchmarks(results)["a"]["run"]["sampled"]["by_word"]
    counts = {"wait": 4, "hmm": 1, "but": 2, "alternatively": 1}
    assert {word: rate["mean"] for word, rate in rates.items()} == {
        word: pytest.approx(1000 * n / 60)
        for word, n in counts.items()  # of every three questions
    }
    assert all(rate["low"] <= rate["mean"] <= rate["high"] for rate in rates.values())
    few = summarise_benchmarks(results, words=("no",))["a"]["run"]["sampled"]["by_word"]
    assert few["no"]["mean"] == pytest.approx(1000 / 60)


def test_the_floor_of_the_gain_is_the_base_with_examples_at_temperature_0() -> None:
    """If the base was sampled with examples at temperature 0, answers without do not count."""
    target, few, run = drawn(0.8, 300, 2), drawn(0.4, 300, 3), drawn(0.6, 300, 4)
    results = {
        name: {mode: {"a": answered(rights)} for mode, rights in modes.items()}
        for name, modes in {
            "target": {"sampled": target},
            "base": {"sampled": drawn(0.05, 300, 5), "4-shot": target, "4-shot, greedy": few},
            "run": {"sampled": run},
        }.items()
    }
    means = [sum(map(sum, rights)) / 900 for rights in (run, few, target)]
    summary = summarise_benchmarks(results)["a"]
    share = summary["run"]["sampled"]["recovered_from_base"]
    assert share["mean"] == pytest.approx((means[0] - means[1]) / (means[2] - means[1]))
    assert summary["base"]["4-shot, greedy"]["recovered_from_base"] is None
    del results["base"]["4-shot"], results["base"]["4-shot, greedy"]
    zero = summarise_benchmarks(results)["a"]["run"]["sampled"]["recovered_from_base"]
    assert zero["mean"] > share["mean"]


def test_hesitation_is_recovered_beyond_a_floor() -> None:
    """The share is that of the rates; its interval covers a known share, and needs a clear gain."""

    def model(rates: list[float], seed: int) -> Any:
        draw = random.Random(seed)
        rows = []
        for q, rate in enumerate(rates):
            tokens = draw.randrange(20, 60)
            n = sum(draw.random() < rate for _ in range(tokens))
            rows.append(Row(f"a/{q}", 0, True, "1", tokens, "eos", None, n, "text"))
        return {"a": summarize("a", rows, SPEED)}

    covered = 0
    for seed in range(40):
        draw = random.Random(f"questions {seed}")
        shared = [draw.uniform(0.5, 1.5) for _ in range(300)]
        floor, ceiling, middle = (
            model([0.1 * level * factor for factor in shared], 3 * seed + i)
            for i, level in enumerate((0.2, 1.0, 0.6))
        )
        share = recovered_hesitation(middle, floor, ceiling, BootstrapConfig(resamples=200))
        rates = [m["a"].hesitations_per_1000 for m in (middle, floor, ceiling)]
        assert share["mean"] == pytest.approx((rates[0] - rates[1]) / (rates[2] - rates[1]))
        covered += share["low"] <= 0.5 <= share["high"]
    assert covered >= 34  # of 40 at 95%: fewer has a probability of 0.3%
    assert recovered_hesitation(middle, floor, floor)["mean"] is None


def test_a_clear_gain_on_few_questions_is_detected() -> None:
    """17 of 20 against none. Resamples without spread must not make the gain undefined."""
    rights = {"target": 17, "hybrid": 0, "run": 11}
    results = {
        name: {"sampled": {"a": answered([[q < n] for q in range(20)])}}
        for name, n in rights.items()
    }
    got = summarise_benchmarks(results)["a"]["run"]["sampled"]["recovered"]
    assert got["mean"] == pytest.approx(11 / 17)
    assert 0.2 < got["low"] < got["high"] < 1


def test_without_a_hybrid_nothing_is_recovered_and_shares_are_counted() -> None:
    summary = summarise_benchmarks(
        {
            "target": {"sampled": {"a": answered(drawn(0.5, 9, 4), finish="length")}},
            "run": {
                "sampled": {"a": answered(drawn(0.5, 9, 5), finish="degenerate")},
                "greedy": {"a": answered(drawn(0.5, 9, 6, repetitions=1))},
            },
        }
    )
    assert MEAN not in summary
    run = summary["a"]["run"]
    assert run["sampled"]["recovered"] is None
    assert (run["sampled"]["degenerate"], run["sampled"]["truncated"]) == (1.0, 0.0)
    assert summary["a"]["target"]["sampled"]["truncated"] == 1.0
    assert run["greedy"]["hesitations_per_1000"]["mean"] == pytest.approx(1000 / 14)


def test_no_hesitation_in_few_tokens_has_a_wide_interval() -> None:
    silent = {
        n: answered(drawn(0.5, n, n), tokens=t, hesitations=0) for n, t in ((10, 5), (20, 50))
    }
    summary = summarise_benchmarks({"run": {"sampled": {str(n): r for n, r in silent.items()}}})
    exposure = {n: sum(row.length_tokens for row in silent[n].rows) for n in silent}
    for n, tokens in exposure.items():
        rate = summary[str(n)]["run"]["sampled"]["hesitations_per_1000"]
        assert rate == {
            "mean": 0,
            "low": 0,
            "high": pytest.approx(1000 * 3.6889 / tokens, rel=1e-4),
        }
    # Both tasks have the same weight, so a token of the one with 20 questions counts half.
    rate = summary[MEAN]["run"]["sampled"]["hesitations_per_1000"]
    both = exposure[10] + exposure[20] / 2
    assert rate == {"mean": 0, "low": 0, "high": pytest.approx(1000 * 3.6889 / both, rel=1e-4)}


def test_models_with_different_questions_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"expected the same number of questions for all models, got"
    ):
        summarise_benchmarks(
            {
                "target": {"sampled": {"a": answered(drawn(0.5, 9, 4))}},
                "run": {"sampled": {"a": answered(drawn(0.5, 8, 5))}},
            }
        )


def test_a_word_that_never_occurs_has_the_upper_end_of_a_rate_without_events() -> None:
    results = {"run": {"sampled": {"a": answered(drawn(0.5, 20, 0), hesitations=0)}}}
    scores = summarise_benchmarks(results, words=("wait",))["a"]["run"]["sampled"]
    assert scores["by_word"]["wait"] == scores["hesitations_per_1000"]
    assert scores["by_word"]["wait"]["high"] > 0


def test_intervals_of_the_mean_over_benchmarks_are_within_benchmarks() -> None:
    """Two benchmarks of which every question has the same length: their mean is not uncertain."""
    runs = {
        name: {
            "sampled": {
                "easy": answered([[True]] * 30, tokens=10, task="easy"),
                "hard": answered([[False]] * 30, tokens=100, task="hard"),
            }
        }
        for name in ("one", "two")
    }
    summary, alone = summarise_benchmarks(runs), {}
    for task in ("easy", "hard", MEAN):
        length = summary[task]["one"]["sampled"]["length"]
        alone[task] = length["high"] - length["low"]
    assert alone[MEAN] == pytest.approx((alone["easy"] + alone["hard"]) / 8**0.5, rel=0.1)
    group = summarise_groups(runs, {"one": ["one", "two"]}, 0.95)[MEAN]["groups"][0]
    assert group["length"]["high"] - group["length"]["low"] == pytest.approx(alone[MEAN], rel=0.2)
