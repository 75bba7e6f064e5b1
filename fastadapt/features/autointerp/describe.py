"""Let a judge describe features or neurons, and score the descriptions by detection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

from fastadapt.features.autointerp.activations import Activations
from fastadapt.features.autointerp.detection import score, summarise
from fastadapt.features.autointerp.examples import DetectionCase, Selection, draw
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

#: Progress callback (label, completed, total).
PartProgress = Callable[[str, int, int], None]


def describe(
    store: Store,
    judge: Judge,
    config: DescribeConfig,
    activations: Activations,
    *,
    progress: PartProgress | None = None,
    approve: Callable[[Estimate], bool] | None = None,
    stop: Event | None = None,
) -> dict[str, Any] | None:
    """Let a judge describe features or neurons; score the descriptions on texts not shown to it.

    Rows of other judges stay in the tables; earlier rows of this judge are replaced. The tables are
    written after the last answer. Paid answers are cached at once, so that a second call with the
    same settings resumes.

    Args:
        store: store of features, locked during the call.
        judge: describer and detector.
        config: settings of the selection and the scores.
        activations: activations of the model that the store was collected from.
        progress: progress callback (label, completed, total).
        approve: called with the estimated cost before the first paid call; if it returns False, no
            call is made.
        stop: ends the call early; cached answers stay.

    Returns:
        The result as written to ``judgements.json``; None if stopped or not approved.

    Raises:
        UserError: the store has no unit to judge, or lacks a table.
        RunError: the judge cannot be reached, or too many of its answers are invalid.
    """
    with writing(store.folder):
        check_addable(store, judge.name)  # before calls are paid for
        selection = draw(
            store, config, activations, progress=_part(progress, "reading texts"), stop=stop
        )
        if selection is None:
            return None
        vocabulary = Vocabulary(store)
        questions = [
            DescribeQuestion(tuple(vocabulary.example(window) for window in case.shown))
            for case in selection.cases
        ]
        if approve is not None:
            estimate = judge.estimate(_all_questions(judge, selection, questions, vocabulary))
            if estimate.calls and not approve(estimate):
                return None
        descriptions = judge.ask(questions, progress=_part(progress, "describing"), stop=stop)
        if _stopped(stop):
            return None
        described = [
            (case, text)
            for case, text in zip(selection.cases, descriptions, strict=True)
            if isinstance(text, str)
        ]
        detections = judge.ask(
            [_detect(case, text, vocabulary) for case, text in described],
            progress=_part(progress, "detecting"),
            stop=stop,
        )
        if _stopped(stop):
            return None
        return _write(store, judge, config, selection, described, detections)


def _part(progress: PartProgress | None, label: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(label, done, total)


def _stopped(stop: Event | None) -> bool:
    return stop is not None and stop.is_set()


def _detect(case: DetectionCase, description: str, vocabulary: Vocabulary) -> DetectQuestion:
    return DetectQuestion(description, tuple(vocabulary.pieces(text.tokens) for text in case.texts))


def _all_questions(
    judge: Judge,
    selection: Selection,
    descriptions: Sequence[DescribeQuestion],
    vocabulary: Vocabulary,
) -> list[DescribeQuestion | DetectQuestion]:
    """Return all questions, to estimate costs; descriptions not yet known have maximum length."""
    questions: list[DescribeQuestion | DetectQuestion] = list(descriptions)
    for case, question in zip(selection.cases, descriptions, strict=True):
        known = judge.cached_answer(question)
        text = known if isinstance(known, str) else "x" * DESCRIPTION_LETTERS
        questions.append(_detect(case, text, vocabulary))
    return questions


def _write(
    store: Store,
    judge: Judge,
    config: DescribeConfig,
    selection: Selection,
    described: Sequence[tuple[DetectionCase, str]],
    detections: Sequence[Answer | None],
) -> dict[str, Any]:
    descriptions: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in selection.counts}
    scores: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in selection.counts}
    for (case, text), answer in zip(described, detections, strict=True):
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
        for kind in selection.counts
    }
    for kind in selection.counts:
        add_rows(store, "descriptions", kind, judge.name, descriptions[kind])
        add_rows(store, "scores", kind, judge.name, scores[kind])
    result = {
        "judge": judge.about,
        "settings": dataclasses.asdict(config),
        "level": config.statistics.level,
        "units": selection.counts,
        "invalid": {
            "descriptions": len(selection.cases) - len(described),
            "detections": len(described) - sum(map(len, scores.values())),
        },
        "detection": detection,
    }
    write_judgements(store, judge.name, "described", result)
    return result
