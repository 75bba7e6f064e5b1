"""Recall, precision and ranking of the activity of sets of features, by hand."""

from __future__ import annotations

import pytest
import torch

from fastadapt.evaluation.contrast.places import Place, rows_of, sites_of
from fastadapt.evaluation.contrast.recognition import recognise
from fastadapt.evaluation.statistics import BootstrapConfig

FAST = BootstrapConfig(resamples=200)


def test_a_recognition_by_hand() -> None:
    """Two places of a text share their two matched places; another text has one of each."""
    shared = ((0, 5), (0, 7))
    places = [
        Place((0, 1), "a", shared),
        Place((0, 3), "b", shared),
        Place((1, 2), "a", ((1, 4),)),
    ]
    sites = sites_of(places)
    assert sites == [(0, 1), (0, 3), (0, 5), (0, 7), (1, 2), (1, 4)]
    activity = torch.tensor([[2.0, 0.0, 1.0, 0.0, 0.5, 0.5]]).double()
    got = recognise({"set": activity}, places, rows_of(places, sites), sites, 2, FAST)["set"]
    every, a, b = got["all"], got["a"], got["b"]
    # Active: two of three labelled places; two of three distinct matched places.
    assert every["recall"]["mean"] == pytest.approx(2 / 3)
    assert every["active_matched"]["mean"] == pytest.approx(2 / 3)
    assert every["precision"]["mean"] == pytest.approx(2 / 4)
    assert every["labelled_share"] == 1 / 2
    # Place 1 wins against both; place 2 loses to one and ties with the other; place 3 ties.
    assert every["ranking"]["mean"] == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert (a["recall"]["mean"], b["recall"]["mean"]) == (1, 0)
    assert (a["labelled_share"], b["labelled_share"]) == (2 / 5, 1 / 3)


def test_sets_that_know_the_labels_and_sets_that_do_not() -> None:
    """The control: activity drawn without the labels has the precision and ranking of chance."""
    draw = torch.Generator().manual_seed(0)
    places = [Place((t, 0), "a", tuple((t, p) for p in range(1, 5))) for t in range(400)]
    sites = sites_of(places)
    is_labelled = torch.tensor([p == 0 for _, p in sites]).double()
    knows = is_labelled[None] * (torch.rand(1, len(sites), generator=draw).double() + 1)
    blind = torch.rand(3, len(sites), generator=draw).double().sub(0.5).relu()
    rows = rows_of(places, sites)
    got = recognise({"knows": knows, "blind": blind}, places, rows, sites, 400, FAST)
    for key in ("recall", "precision", "ranking"):
        assert got["knows"]["all"][key]["mean"] == 1
    numbers = got["blind"]["all"]
    for key, chance in (("recall", 0.5), ("precision", 0.2), ("ranking", 0.5)):
        assert numbers[key]["low"] < chance < numbers[key]["high"]
        assert numbers[key]["high"] - numbers[key]["low"] < 0.1


def test_a_set_that_is_never_active_has_no_precision() -> None:
    places = [Place((t, 0), "a", ((t, 1),)) for t in range(3)]
    sites = sites_of(places)
    silent = torch.zeros(1, len(sites), dtype=torch.float64)
    got = recognise({"s": silent}, places, rows_of(places, sites), sites, 3, FAST)["s"]["all"]
    assert got["recall"]["mean"] == 0
    assert got["precision"] == {"mean": None, "low": None, "high": None}
    assert got["ranking"]["mean"] == 0.5
