"""Descriptions of units, scored by detection: ``descriptions.parquet`` and ``scores.parquet``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

from fastadapt.features.autointerp.activations import Activations
from fastadapt.features.autointerp.detection import score, summarise
from fastadapt.features.autointerp.examples import Case, Drawn, draw
from fastadapt.features.autointerp.judgements import add_rows, check_addable, write_judgements
from fastadapt.features.autointerp.judges.prompts import DESCRIPTION_LETTERS
from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.questions import (
    Answer,
    DescribeQuestion,
    DetectQuestion,
    Estimate,
    Judge,
)
from fastadapt.features.autointerp.units import Vocabulary
from fastadapt.features.store.schema import Kind
from fastadapt.features.store.store import Store, writing
from fastadapt.reporting.rendering import require_drawing

Tell = Callable[[str, int, int], None]


def describe(
    store: Store,
    judge: Judge,
    config: DescribeConfig,
    activations: Activations,
    *,
    tell: Tell | None = None,
    approve: Callable[[Estimate], bool] | None = None,
    stop: Event | None = None,
) -> dict[str, Any] | None:
    """Let a judge describe units, and score what it wrote on texts that it was not shown.

    What other judges wrote stays in the tables, and what this one wrote before is replaced.
    Nothing is written before everything is answered, but each answer that cost a call is kept at
    once: another call with the same settings goes on from there.

    Args:
        store: of features; held for the length of the call.
        judge: who describes and detects.
        config: which units, and how they are scored.
        activations: of the model that the store was collected from.
        tell: called with what is being done, how much of it is done, and how much there is.
        approve: asked before the first call that costs, with what all of them will; if it says no,
            nothing is called.
        stop: ends the call early; what was answered is kept.

    Returns:
        What :func:`write_judgements` writes of it; None if stopped or not approved.

    Raises:
        UserError: the store has no unit to judge, or lacks what is needed.
        RunError: the judge cannot be reached, or too many of its answers are not valid.
    """
    require_drawing()
    with writing(store.folder):
        check_addable(store, judge.name)  # before calls are paid for
        drawn = draw(store, config, activations, progress=_part(tell, "reading texts"), stop=stop)
        if drawn is None:
            return None
        vocabulary = Vocabulary(store)
        asked = [
            DescribeQuestion(tuple(vocabulary.example(window) for window in case.shown))
            for case in drawn.cases
        ]
        if approve is not None:
            estimate = judge.estimate(_ahead(judge, drawn, asked, vocabulary))
            if estimate.calls and not approve(estimate):
                return None
        descriptions = judge.ask(asked, progress=_part(tell, "describing"), stop=stop)
        if _stopped(stop):
            return None
        described = [
            (case, text)
            for case, text in zip(drawn.cases, descriptions, strict=True)
            if isinstance(text, str)
        ]
        told = judge.ask(
            [_detect(case, text, vocabulary) for case, text in described],
            progress=_part(tell, "detecting"),
            stop=stop,
        )
        if _stopped(stop):
            return None
        return _write(store, judge, config, drawn, described, told)


def _part(tell: Tell | None, what: str) -> Callable[[int, int], None] | None:
    if tell is None:
        return None
    return lambda done, total: tell(what, done, total)


def _stopped(stop: Event | None) -> bool:
    return stop is not None and stop.is_set()


def _detect(case: Case, description: str, vocabulary: Vocabulary) -> DetectQuestion:
    return DetectQuestion(description, tuple(vocabulary.pieces(text.tokens) for text in case.texts))


def _ahead(
    judge: Judge, drawn: Drawn, asked: Sequence[DescribeQuestion], vocabulary: Vocabulary
) -> list[DescribeQuestion | DetectQuestion]:
    """All questions, with a description of the most letters where it is still to be written."""
    questions: list[DescribeQuestion | DetectQuestion] = list(asked)
    for case, question in zip(drawn.cases, asked, strict=True):
        known = judge.cached_answer(question)
        text = known if isinstance(known, str) else "x" * DESCRIPTION_LETTERS
        questions.append(_detect(case, text, vocabulary))
    return questions


def _write(
    store: Store,
    judge: Judge,
    config: DescribeConfig,
    drawn: Drawn,
    described: Sequence[tuple[Case, str]],
    told: Sequence[Answer | None],
) -> dict[str, Any]:
    descriptions: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in drawn.counts}
    scores: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in drawn.counts}
    for (case, text), answer in zip(described, told, strict=True):
        unit = case.unit
        descriptions[unit.kind].append(
            {
                "layer": unit.layer,
                "feature": unit.feature,
                "variant": case.sample,
                "description": text,
                "judge": judge.name,
                "shown": [window.rank for window in case.shown],
            }
        )
        if isinstance(answer, tuple):
            scores[unit.kind].append(score(case, judge.name, answer))
    detection = {
        kind: {
            sample: summarise(
                [row for row in scores[kind] if row["variant"] == sample],
                store.shape(kind)[0],
                config.statistics,
            )
            for sample in config.samples
        }
        for kind in drawn.counts
    }
    for kind in drawn.counts:
        add_rows(store, "descriptions", kind, judge.name, descriptions[kind])
        add_rows(store, "scores", kind, judge.name, scores[kind])
    result = {
        "judge": judge.about,
        "settings": dataclasses.asdict(config),
        "level": config.statistics.level,
        "units": drawn.counts,
        "invalid": {
            "descriptions": len(drawn.cases) - len(described),
            "detections": len(described) - sum(map(len, scores.values())),
        },
        "detection": detection,
    }
    write_judgements(store, judge.name, "described", result)
    return result
