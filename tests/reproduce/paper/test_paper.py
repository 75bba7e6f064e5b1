"""The page of claims: values and verdicts from files, each with data that refute the claim."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from results import synthetic_result

from fastadapt.errors import UserError
from fastadapt.reporting.formatting import number
from reproduce.paper import evaluation as e
from reproduce.paper import hesitation as h
from reproduce.paper.__main__ import main
from reproduce.paper.claims import CLAIMS
from reproduce.paper.finding import Finding
from reproduce.paper.graphs import shares
from reproduce.paper.page import find, page

PAGE = Path(__file__).parents[3] / "docs" / "paper.md"


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of the page's tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[-1].startswith("`")]


def evaluation(**changes: Any) -> dict[str, Any]:
    """Return ``eval.json`` of four models and two groups of seeds, by whose numbers claims hold."""
    names = {"thin": 0.3, "wide": 10.0, "wide-2": 10.0, "bare": 10.0, "bare-2": 10.0}
    cards = [
        {"name": name, "kind": "transcoder", "variant": "no-bridge" * name.startswith("bare")}
        | {"l0": l0, "what": name}
        for name, l0 in names.items()
    ]
    scores = {
        "target": (0.7, 50.0, 0.002),
        "hybrid": (0.1, 5.0, 0.3),
        "thin": (0.45, 50.5, 0.03),
        "wide": (0.55, 50.0, 0.01),
        "norms": (0.101, 5.0, 0.3),
    }
    answers = {
        name: {
            "sampled": {
                "accuracy": interval(right),
                "length": interval(length, 1.0),
                "degenerate": loops,
                "recovered_from_base": interval((right - 0.05) / 0.65)
                if name in ("thin", "wide")
                else None,
            }
        }
        for name, (right, length, loops) in scores.items()
    }
    answers["hybrid"]["4-shot, greedy"] = {"accuracy": interval(0.02)}
    curve = [interval(0.1 * i) for i in range(4)]
    result = {
        "students": [*cards, {"name": "norms", "kind": "norms", "variant": "", "l0": None}],
        "faithfulness": {
            name: {"top1_error": interval(0.2), "kl": interval(0.3)}
            for name in (*names, "base", "hybrid", "norms")
        },
        "order": [
            {"above": "hybrid", "below": "thin", "holds": "yes"},
            {"above": "thin", "below": "wide", "holds": "yes"},
        ],
        "partial": {
            name: {"first": curve, "last": curve, "excess": {"worst": interval(-0.1)}}
            for name in ("thin", "wide")
        },
        "bridge_seeds": [{"without": "bare", "with": "wide", "last": [interval(0.1)] * 4}],
        "seeds": {
            "groups": [
                {"name": "wide", "runs": ["wide", "wide-2"]},
                {"name": "bare", "runs": ["bare", "bare-2"]},
            ],
            "differences": [{"above": "wide", "below": "bare", "kl": interval(-0.2)}],
        },
        "benchmarks": {"a": answers},
    }
    return {**result, **changes}


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the evaluation with one value replaced; ``path`` is its keys, separated by /."""
    result = copy.deepcopy(evaluation())
    *keys, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    part: Any = result
    for key in keys:
        part = part[key]
    part[last] = value
    return result


#: Measure, its verdict on the evaluation, and a change of it that refutes the claim or blurs it.
OF_EVALUATIONS: dict[str, tuple[Any, str, str, Any, str]] = {
    "order": (e.order, "yes", "order/1/holds", "no", "no for 1 of 2"),
    "no interval": (e.order, "yes", "order/1/holds", None, "not measurable"),
    "tie": (e.order, "yes", "order/1/holds", "tie", "yes, not clearly"),
    "parts": (
        e.subsets,
        "yes",
        "partial/wide/excess/worst",
        interval(0.1),
        "no for 1 of 2",
    ),
    "monotone": (
        e.monotone,
        "yes, by the estimates",
        "partial/thin/last",
        [interval(x) for x in (0, 0.2, 0.1, 0.3)],
        "no for 1 of 2, by the estimates",
    ),
    "bridge": (e.bridge, "yes", "bridge_seeds/0/last/2", interval(-0.1), "no for 1 of 2"),
    "matched": (
        e.against("bare"),
        "yes",
        "seeds/differences/0/kl",
        interval(0.001),
        "no, not clearly",
    ),
    "gain": (
        e.gain,
        "yes",
        "benchmarks/a/thin/sampled/recovered_from_base",
        interval(0.07),
        "no for 1 of 2",
    ),
    "too much gain": (
        e.gain,
        "yes",
        "benchmarks/a/wide/sampled/recovered_from_base",
        interval(0.95),
        "no for 1 of 2",
    ),
    "lengths": (
        e.lengths,
        "yes, not clearly",
        "benchmarks/a/thin/sampled/length",
        interval(67.0, 1.0),
        "no for 1 of 2",
    ),
    "norms": (
        e.refit("norms"),
        "yes, not clearly",
        "benchmarks/a/norms/sampled/length",
        interval(54.0, 1.0),
        "no for 1 of 2",
    ),
    "few shots": (
        e.few_shot,
        "yes",
        "benchmarks/a/hybrid/4-shot, greedy/accuracy",
        interval(0.2),
        "no",
    ),
    "loops": (
        e.degenerate,
        "yes, by the estimates",
        "benchmarks/a/hybrid/sampled/degenerate",
        0.01,
        "no, by the estimates",
    ),
}


@pytest.mark.parametrize("case", OF_EVALUATIONS)
def test_claims_about_an_evaluation(case: str) -> None:
    measure, holds, path, value, refuted = OF_EVALUATIONS[case]
    assert measure(evaluation()).verdict == holds
    assert measure(changed(path, value)).verdict == refuted
    for part in ("order", "partial", "bridge_seeds", "benchmarks", "seeds"):
        path_of = path.split("/")[0]
        if part == path_of:  # without its part of the evaluation there is no value
            assert measure(evaluation(**{part: {}})) is None


def test_differences_over_seeds_have_the_sign_of_the_row() -> None:
    finding = e.against("bare")(evaluation())
    assert finding is not None
    assert finding.value == "bare − wide: 0.200 [0.190, 0.210] nats"


@pytest.mark.parametrize(
    ("l0", "kl", "expected"),
    [
        (9.25, 0.5, "yes"),  # wide has an L0 of 10
        (3.25, 0.5, "yes"),  # than thin with an L0 of 0.3
        (3.25, 0.305, "yes, not clearly"),
        (3.25, 0.2, "not measurable: L0 differs"),
        (30.5, 0.5, "yes"),
        (30.5, 0.2, "not measurable: L0 differs"),
        (0.125, 0.5, "not measurable: L0 differs"),
    ],
)
def test_groups_of_another_l0_are_compared_with_an_adapter_of_fewer_features(
    l0: float, kl: float, expected: str
) -> None:
    result = evaluation()
    for group, value in zip(result["seeds"]["groups"], (10.0, l0), strict=True):
        group["l0"] = value
    result["faithfulness"]["bare"]["kl"] = interval(kl)
    finding = e.against("bare")(result)
    assert finding is not None
    assert finding.verdict == expected
    assert f" nats at L0 {number(l0)} and 10.0" in finding.value
    assert ("; bare " in finding.value) == (l0 in (3.25, 30.5))


def test_nothing_that_loops_is_not_measurable() -> None:
    result = evaluation()
    for scores in result["benchmarks"]["a"].values():
        scores["sampled"]["degenerate"] = 0.0
    assert e.degenerate(result) == Finding(
        "target 0.0%, hybrid 0.0%, wide 0.0%, thin 0.0%",
        "not measurable: no response degenerates here",
    )


def places(**changes: float) -> dict[str, Any]:
    """Return ``contrast.json`` of sets of which each needs the other."""
    values = {
        ("ablate", "both", False): {"cut": 0.6},
        ("ablate", "both", True): {"cut": 0.05},
        ("only", "both", False): {"change": 0.5},
        ("only", "hesitation", False): {"change": 0.1},
        ("only", "template", False): {"change": 0.02},
        ("onto-target", "both", False): {"cut": 0.2},
    }
    models = []
    for (kind, name, random), numbers in values.items():
        key = f"{kind} {name}{' random' * random}"
        ((measure, value),) = numbers.items()
        arm: dict[str, Any] = {"kind": kind, "set": name, "random": random}
        measured = {measure: interval(changes.get(key, value))}
        models.append({**arm, "name": key, "features": 9, "kinds": {"all": measured}})
    return {"models": models}


@pytest.mark.parametrize(
    ("measure", "key", "value", "refuted"),
    [
        (h.cut("ablate", 0.5), "ablate both", 0.3, "no"),
        (h.cut("ablate", 0.5), "ablate both", 0.495, "no, not clearly"),
        (h.cut("ablate", 0.15, random=True), "ablate both random", 0.5, "no"),
        (h.beyond_bias, "only both", -0.1, "no"),
        (h.interaction, "only hesitation", 0.6, "no"),
        (h.interaction, "only hesitation", 0.24, "no, not clearly"),
        (h.interaction, "only hesitation", 0.225, "yes, not clearly"),
        (h.cut("onto-target", 0.0), "onto-target both", -0.1, "no"),
    ],
)
def test_claims_about_places(measure: Any, key: str, value: float, refuted: str) -> None:
    assert measure(places()).verdict == "yes"
    assert measure(places(**{key: value})).verdict == refuted
    assert measure({"models": []}) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.3, "yes"), (0.255, "yes, not clearly"), (0.245, "no, not clearly"), (0.01, "no")],
)
def test_the_interval_of_an_interaction_decides(value: float, expected: str) -> None:
    measured = {"set": "both", "parts": ["template", "hesitation"], "interaction": interval(value)}
    result = h.interaction({**places(), "interactions": [measured]})
    assert result is not None
    assert result.verdict == expected


def study(
    removed: float = 1.0, accuracy: float = 0.5, template: float = 0.2, added: float = 8.0
) -> dict[str, Any]:
    def arm(kind: str | None, rate: float, **more: Any) -> dict[str, Any]:
        accuracy = more.get("accuracy", interval(0.5))
        scores = {"accuracy": accuracy, "length": interval(40.0)}
        measured = {"hesitations_per_1000": interval(rate), "accuracy": accuracy}
        measured["benchmarks"] = {"first": {**scores, "accuracy": interval(0.5)}, "second": scores}
        return {"kind": kind, "times": 0, "selection": "main", "model": "adapter"} | measured | more

    claim = {"kind": "ablate", "selection": "main", "times": 0, "scale": None}
    holds = "yes" if removed <= 1.5 else "no"
    return {
        "sets": [{"key": "main"}],
        "arms": [
            arm(None, 5.0, selection=""),
            arm("only", 0.1, selection="bias"),
            arm("ablate", removed, accuracy=interval(accuracy)),
            arm("only", added),
            arm("only", template, selection="template"),
        ],
        "claims": [{**claim, "value": interval(1 - removed / 5), "holds": holds}],
    }


def test_claims_about_a_study() -> None:
    assert h.removed(0)(study()) == Finding("reduction 80.0% [79.0, 81.0]", "yes")
    assert h.removed(0)(study(removed=4.0)).verdict == "no"  # type: ignore[union-attr]
    assert h.removed(1)(study()) is None
    cases: list[tuple[Any, dict[str, float]]] = [
        (h.unharmed, {"accuracy": 0.4}),
        (h.unharmed_by_benchmark, {"accuracy": 0.4}),
        (h.added, {"template": 7.0}),
        (h.added, {"added": 4.9}),  # less than the whole adapter
    ]
    assert h.unharmed_by_benchmark(study(accuracy=0.4)).verdict == "no for 1 of 2"  # type: ignore[union-attr]
    for measure, refuting in cases:
        assert measure(study()).verdict.startswith("yes")
        assert measure(study(**refuting)).verdict.startswith("no")


def test_claims_about_the_selection_of_the_paper() -> None:
    """Another set of the same study: removed, it takes all accuracy."""
    result = study()
    assert h.removed(0, h.TEN)(result) is None
    assert h.unharmed(result, h.TEN) is None
    ten = copy.deepcopy(result["arms"][2])
    ten |= {"selection": h.TEN, "accuracy": interval(0.0)}
    result["arms"].append(ten)
    claim = {**result["claims"][0], "selection": h.TEN, "value": interval(0.75)}
    result["claims"].append(claim)
    assert h.removed(0, h.TEN)(result) == Finding("reduction 75.0% [74.0, 76.0]", "yes")
    accuracy = h.unharmed(result, h.TEN)
    assert accuracy is not None
    assert accuracy.verdict == "no"
    assert h.unharmed(result) == h.unharmed(study())


def test_the_claim_about_edges() -> None:
    parts = {"hesitation": {"adapter features": interval(0.125)}}
    assert shares({"shares": parts}) is None
    finding = shares({"shares": {**parts, "other": {"adapter features": interval(0.25)}}})
    assert finding is not None
    assert "hesitation features 12.5% [11.5, 13.5]" in finding.value
    assert "others of their layers 25.0% [24.0, 26.0]" in finding.value


def test_the_published_page_has_every_claim_and_its_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    empty = rows(page({}, {}))
    assert len(empty) == len(CLAIMS)
    assert [(row[0], row[-1]) for row in rows(text)] == [(row[0], row[-1]) for row in empty]
    papers = [claim.paper for claim in CLAIMS if claim.section]
    assert [row[2] for row in rows(text) if len(row) == 6] == papers


def test_what_was_not_run_says_so() -> None:
    claims = [claim for claim in CLAIMS if claim.section]
    with_section = [row for row in rows(page({}, {})) if len(row) == 6]
    for claim, row in zip(claims, with_section, strict=True):
        assert row[3] == claim.without
        assert row[4] == ("–" if claim.source else "needs full scale")
    assert "- not given: eval.json, contrast.json, study.json, shares.json" in page({}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "eval").mkdir(parents=True)
    (tmp_path / "runs" / "eval" / "eval.json").write_text(json.dumps(synthetic_result()))
    return tmp_path / "runs"


def test_the_command_writes_what_the_files_hold(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "paper.md"
    assert main([str(folder), "--out", str(out)]) == 0
    by_claim = {row[0]: row for row in rows(out.read_text(encoding="utf-8"))}
    (order,) = (row for claim, row in by_claim.items() if claim.startswith("Adapters are nearer"))
    assert order[3].startswith("base ")
    assert order[4] == "yes, not clearly"
    (removal,) = (row for claim, row in by_claim.items() if claim.startswith("Removing the set"))
    assert removal[3:5] == ["not run", "–"]
    assert re.search(r"- `eval.json`: .*/eval/eval.json", out.read_text(encoding="utf-8"))


def test_files_of_runs_inside_a_folder_do_not_count(folder: Path) -> None:
    """An evaluation of one of the compared runs, and contrasts and studies of others."""
    for place in ("one/eval/eval", "one/contrast/contrast", "one/study/study", "two/study/study"):
        path = folder / f"{place}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    of_all = folder / "eval" / "eval.json"
    assert find([folder]) == find([folder / "eval"]) == {"eval": of_all}
    assert find([folder / "eval", folder / "one" / "contrast", folder / "one" / "study"]) == {
        "eval": of_all,
        "contrast": folder / "one" / "contrast" / "contrast.json",
        "study": folder / "one" / "study" / "study.json",
    }


def test_make_reproduce_names_the_exact_folders(tmp_path: Path) -> None:
    """A run of ``make reproduce`` with an evaluation of its own must not end it."""
    locks = ("requirements.lock", "requirements-eval.lock")
    for name in ("Makefile", "pyproject.toml", "setup.py", *locks):
        shutil.copy(PAGE.parents[1] / name, tmp_path)
    for place in ("eval", "contrast", "study"):
        for run in ("sparsity-4.3e-3", "dense"):
            path = tmp_path / "runs" / "reproduce" / run / place / f"{place}.json"
            path.parent.mkdir(parents=True)
            path.write_text("{}")
    shown = subprocess.run(
        ["make", "--dry-run", "reproduce"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    (command,) = (line for line in shown.stdout.splitlines() if "reproduce.paper" in line)
    studied = "runs/reproduce/sparsity-4.3e-3"
    folders = f"runs/reproduce/eval {studied}/contrast/ {studied}/study/"
    assert command.endswith(f" {folders} --out runs/reproduce/paper.md")


def _second(folder: Path) -> None:
    (folder / "eval.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_second, r"expected one eval\.json, got .*give narrower folders"),
        (lambda f: (f / "eval" / "eval.json").unlink(), r"expected one of eval\.json, .*got none"),
        (
            lambda f: (f / "eval" / "eval.json").write_text('{"faithfulness": 3}'),
            r"faithfulness.*expected object",
        ),
    ],
)
def test_bad_folders(
    folder: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        main([str(folder), "--out", str(tmp_path / "paper.md")])
    assert not (tmp_path / "paper.md").exists()
    with pytest.raises(UserError, match="expected a folder with results"):
        find([folder / "absent"])
