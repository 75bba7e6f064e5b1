"""Let a judge classify features or neurons; write ``classes.parquet`` and the shares by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

import torch

from fastadapt.errors import UserError
from fastadapt.evaluation.statistics import BootstrapConfig, ratio
from fastadapt.features.autointerp.describe import PartProgress
from fastadapt.features.autointerp.judgements import add_rows, check_addable, write_judgements
from fastadapt.features.autointerp.judges.settings import ClassifyConfig
from fastadapt.features.autointerp.questions import (
    ClassifyQuestion,
    Estimate,
    Judge,
    UnitClass,
    class_names,
)
from fastadapt.features.autointerp.units import Unit, Vocabulary, Window, eligible, examples_of
from fastadapt.features.store.schema import Kind
from fastadapt.features.store.store import Store, writing


def classify(
    store: Store,
    judge: Judge,
    config: ClassifyConfig,
    *,
    progress: PartProgress | None = None,
    approve: Callable[[Estimate], bool] | None = None,
    stop: Event | None = None,
) -> dict[str, Any] | None:
    """Let a judge classify units (features or neurons) by their examples and logit lens.

    Arguments, cached answers and replaced rows are as in
    :func:`fastadapt.features.autointerp.describe.describe`.

    Returns:
        The result as written to ``judgements.json``; None if stopped or not approved.

    Raises:
        UserError: the judge cannot classify, or the store has no unit to judge or no logit lens.
        RunError: the judge cannot be reached, or too many of its answers are invalid.
    """
    if not judge.can_classify:
        raise UserError(
            f"the judge {judge.name!r} cannot classify: name a language model (judge.model) and "
            "its endpoint (judge.base_url)"
        )
    with writing(store.folder):
        check_addable(store, judge.name)  # before calls are paid for
        units, questions, counts = _questions(store, config)
        if approve is not None:
            estimate = judge.estimate(questions)
            if estimate.calls and not approve(estimate):
                return None
        answers = judge.ask(
            questions,
            progress=None
            if progress is None
            else lambda done, total: progress("classifying", done, total),
            stop=stop,
        )
        if stop is not None and stop.is_set():
            return None
        rows: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in counts}
        for unit, answer in zip(units, answers, strict=True):
            if isinstance(answer, UnitClass):
                rows[unit.kind].append(
                    {
                        "layer": unit.layer,
                        "feature": unit.feature,
                        "judge": judge.name,
                        "class": answer.name,
                        "subclass": answer.subclass,
                        "reason": answer.reason,
                    }
                )
        for kind, of_kind in rows.items():
            add_rows(store, "classes", kind, judge.name, of_kind)
        result = {
            "judge": judge.about,
            "settings": dataclasses.asdict(config),
            "level": config.statistics.level,
            "units": counts,
            "invalid": len(units) - sum(map(len, rows.values())),
            "shares": {
                kind: shares(of_kind, store.shape(kind)[0], config.statistics)
                for kind, of_kind in rows.items()
            },
        }
        write_judgements(store, judge.name, "classified", result)
    return result


def _questions(
    store: Store, config: ClassifyConfig
) -> tuple[list[Unit], list[ClassifyQuestion], dict[Kind, list[dict[str, int]]]]:
    """Return units to classify, a question for each, and by layer how many are judged or not."""
    vocabulary = Vocabulary(store)
    units: list[Unit] = []
    questions: list[ClassifyQuestion] = []
    counts: dict[Kind, list[dict[str, int]]] = {}
    for kind in config.kinds or tuple(store.kinds):
        counts[kind] = []
        for layer in range(store.shape(kind)[0]):
            order, rare = eligible(store, kind, layer, config.min_density, config.seed)
            drawn = order[: config.units]
            examples = examples_of(store, kind, layer, drawn, config.before, config.after)
            lens = {
                row["feature"]: row
                for row in store.read("lens", kind, layer=layer, features=drawn).to_pylist()
            }
            before = len(units)
            for feature in drawn:
                samples = examples.get(feature, {})
                windows: list[Window] = []
                for window in [*samples.get("top", [])[: config.top], *samples.get("uniform", [])]:
                    full = len(windows) == config.top + config.uniform
                    if not full and not any(window.overlaps(other) for other in windows):
                        windows.append(window)
                if len(windows) < config.min_shown:
                    continue
                units.append(Unit(kind, layer, feature))
                questions.append(
                    ClassifyQuestion(
                        tuple(vocabulary.example(window) for window in windows),
                        tuple(lens[feature]["promoted_tokens"]),
                        tuple(lens[feature]["suppressed_tokens"]),
                    )
                )
            judged = len(units) - before
            counts[kind].append(
                {"too rare": rare, "too few examples": len(drawn) - judged, "judged": judged}
            )
    if not units:
        raise UserError(
            f"{store.folder}: no unit to classify: no feature or neuron is active on at least "
            f"{config.min_density:g} of the tokens and has {config.min_shown} examples or more; "
            "lower classify.min_density or classify.min_shown"
        )
    return units, questions, counts


def shares(
    rows: Sequence[dict[str, Any]], n_layers: int, config: BootstrapConfig
) -> dict[str, Any]:
    """Return the share of each class and subclass over all units judged, and by layer.

    Args:
        rows: rows of ``CLASSES`` of one kind and judge.
        n_layers: number of layers of the model.

    Returns:
        ``shares``, an interval for each of :func:`class_names`; ``units``; ``layers`` with the same
        keys.
    """
    by_layer = [[row for row in rows if row["layer"] == layer] for layer in range(n_layers)]
    return {**_shares(rows, config), "layers": [_shares(in_layer, config) for in_layer in by_layer]}


def _shares(rows: Sequence[dict[str, Any]], config: BootstrapConfig) -> dict[str, Any]:
    intervals = {}
    for key in class_names():
        if not rows:
            intervals[key] = {"mean": None, "low": None, "high": None}
            continue
        name, _, subclass = key.partition(": ")
        hits = [float(row["class"] == name and subclass in ("", row["subclass"])) for row in rows]
        sums = torch.tensor(hits, dtype=torch.float64)
        counts = torch.ones_like(sums)
        intervals[key] = ratio(sums, counts, bounds=(0.0, 1.0), config=config).plain()
    return {"shares": intervals, "units": len(rows)}
