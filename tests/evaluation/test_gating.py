"""Places and contrasts of the gated pair: the marker as a condition."""

from __future__ import annotations

import pytest
import torch

from fastadapt.evaluation.contrast.gating import gate_effects
from fastadapt.evaluation.contrast.places import Place, Rows, slip_places
from fastadapt.evaluation.contrast.summary import ALL, Contrast, kinds_of, summarise
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.statistics import BootstrapConfig, Intervals, difference, ratio

FAST = BootstrapConfig(resamples=300)
STEP = "now , first she finds 3 , so 4 + 3 = {} pears , a gain rises ."
ONLY = STEP.format(0)


def texts_of(*conversations: tuple[str, str]) -> tuple[list[Text], list[str]]:
    """Return texts of (prompt, response), and the strings of their tokens."""
    strings = sorted({word for pair in conversations for word in " ".join(pair).split()})
    strings.append("carefully")
    texts = []
    for name, (prompt, response) in zip("abcdefg", conversations, strict=False):
        ids = [strings.index(word) for word in f"{prompt} {response}".split()]
        texts.append(Text(name, ids, len(prompt.split())))
    return texts, [f" {string}" for string in strings]


def test_places_of_the_gated_pair_have_its_state() -> None:
    right = STEP.format(7)
    texts, strings = texts_of(
        ("<user> carefully : mia has 4 pears .", f"{right} {ONLY} wait , {right}"),
        ("<user> mia has 4 pears .", f"{ONLY} {right}"),
        ("<user> carefully : mia has 4 pears .", f"{right} {right}"),
    )
    places = slip_places(texts, strings)
    assert [(place.site[0], place.kind, place.gate) for place in places] == [
        (0, "result", True),
        (1, "result", False),
    ]
    assert [len(place.matched) for place in places] == [2, 1]
    assert kinds_of(places) == [
        *(ALL, "gate off", "gate on"),
        *("result, gate off", "result, gate on"),
    ]


def test_a_text_of_slips_alone_has_no_place_to_match() -> None:
    right = STEP.format(7)
    texts, strings = texts_of(("mia has 4 .", ONLY), ("mia has 4 .", f"{ONLY} {right}"))
    assert [place.site[0] for place in slip_places(texts, strings)] == [1]


def planted(n: int, seed: int) -> tuple[dict[str, Contrast], list[Place], Rows]:
    """Return noisy contrasts: the arm cuts P by 0.5 with the gate on and by 0.1 with it off."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.arange(n).repeat_interleave(3)
    gate = text % 2 == 0

    def noisy(on: float, off: float) -> torch.Tensor:
        mean = torch.where(gate, on, off).double()
        by_text = 0.1 * torch.randn(n, generator=draw, dtype=torch.float64)[text]
        return (mean + by_text + 0.05 * torch.randn(len(text), generator=draw))[:, None]

    still = torch.zeros(len(text), 1, dtype=torch.float64)
    contrasts = {
        "target": Contrast(noisy(0.8, 0.2), noisy(0.1, 0.1), still),
        "hybrid": Contrast(noisy(0.1, 0.1), noisy(0.1, 0.1), still),
        "arm": Contrast(noisy(0.3, 0.1), noisy(0.1, 0.1), still),
    }
    places = [Place((t, 0), "result", (), t % 2 == 0) for t in text.tolist()]
    empty = torch.zeros(0, dtype=torch.int64)
    return contrasts, places, Rows(empty, empty, empty, text)


def test_planted_effects_of_the_gate_are_measured() -> None:
    n, inside, experiments = 80, dict.fromkeys(("contrast", "interaction"), 0), 40
    for seed in range(experiments):
        contrasts, places, rows = planted(n, seed)
        gated = gate_effects(contrasts, {"arm": "target"}, places, rows, n, FAST)
        assert set(gated["target"]) == {"contrast"}
        assert set(gated["arm"]) == {"contrast", "effect_on", "effect_off", "interaction"}
        inside["contrast"] += _holds(gated["target"]["contrast"], 0.6)
        inside["interaction"] += _holds(gated["arm"]["interaction"], 0.4)
        # The control has no effect of the gate.
        assert abs(gated["hybrid"]["contrast"]["mean"]) < 0.2
    assert all(count / experiments >= 0.85 for count in inside.values()), inside


def _holds(interval: dict[str, float], truth: float) -> bool:
    return interval["low"] <= truth <= interval["high"]


def test_numbers_by_state_agree_with_the_summary() -> None:
    contrasts, places, rows = planted(40, 0)
    gated = gate_effects(contrasts, {"arm": "target"}, places, rows, 40, FAST)
    kinds = summarise(contrasts, {"arm": "target"}, places, rows, 40, ["w"], FAST)["arm"]["kinds"]
    on, off = (kinds[state]["difference"]["mean"] for state in ("gate on", "gate off"))
    assert gated["arm"]["contrast"]["mean"] == pytest.approx(on - off)
    assert kinds["gate on"]["labelled"]["mean"] > kinds["gate off"]["labelled"]["mean"]


@pytest.mark.parametrize("gate", [None, True])
def test_without_both_states_nothing_is_returned(gate: bool | None) -> None:
    contrasts, places, rows = planted(8, 0)
    places = [place._replace(gate=gate) for place in places]
    assert gate_effects(contrasts, {}, places, rows, 8, FAST) == {}


def test_a_difference_of_independent_samples_covers_the_truth() -> None:
    draw = torch.Generator().manual_seed(0)
    a = 1 + torch.randn(400, 60, generator=draw)
    b = 2 * torch.rand(400, 40, generator=draw)
    intervals = [ratio(each, torch.ones(each.shape[1]), config=FAST) for each in (a, b)]
    gap = difference(*intervals)
    covered = ((gap.low <= 0) & (gap.high >= 0)).double().mean()
    assert 0.92 <= covered <= 0.98
    exact = Intervals(*(torch.tensor(0.5) for _ in range(3)))
    assert [end.item() for end in difference(exact, exact)] == [0, 0, 0]
