"""Runs all measurements of a pair's difference and writes them; resumes an interrupted run.

::

    parts/           KL and top-1 agreement of every hybrid, per position of the texts
    generated/       answers of every hybrid to questions, with their grades
    where.json       all results, with intervals
    tables.md, tables.tex, plots/*.png, report.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.data.sequences import DataConfig
from fastadapt.data.templates import auto_format
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import (
    BenchmarkConfig,
    check_prompts,
    default_tasks,
)
from fastadapt.evaluation.difference.generation import answer
from fastadapt.evaluation.difference.measure import DifferenceConfig, Measured, measure
from fastadapt.evaluation.difference.parts import TwoModels
from fastadapt.evaluation.difference.positions import profile, widest
from fastadapt.evaluation.difference.report import difference_figures, difference_tables
from fastadapt.evaluation.difference.result import SCHEMA_VERSION, WhereFile, verdict
from fastadapt.evaluation.difference.shares import summarise
from fastadapt.evaluation.difference.texts import held_out_texts, left_out, typed_text
from fastadapt.evaluation.difference.weights import weight_changes
from fastadapt.evaluation.faithfulness.texts import Text, regions_of
from fastadapt.evaluation.folder import LOCK, clear, present
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.io.documents import check
from fastadapt.models.pair import PairConfig
from fastadapt.models.sources.pair_sources import Sources
from fastadapt.organism import resolve

RESULT = "where.json"
#: All entries that the folder may have.
CONTENTS = (
    LOCK,
    "parts",
    "generated",
    RESULT,
    "tables.md",
    "tables.tex",
    "plots",
    "report.html",
)
#: Progress callback: label, completed, total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class WhereConfig:
    """Settings of the measurement of where a pair differs.

    Args:
        where: texts, positions and memory.
        statistics: intervals.
        sampling: with ``--generate``: sampling of the answers.
        benchmarks: with ``--generate``: the questions. ``sampling`` and ``family`` in it are
            ignored: the sampling is the one above, the family that of the data.
    """

    where: DifferenceConfig = field(default_factory=DifferenceConfig)
    statistics: BootstrapConfig = field(default_factory=BootstrapConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    benchmarks: BenchmarkConfig = field(default_factory=BenchmarkConfig)


@dataclass(frozen=True)
class WhereRequest:
    """Request of :func:`locate`: a pair of models, texts to compare them on, and settings.

    Attributes:
        pair: the pair.
        data: source of the texts and chat format; None with ``text`` and without ``generate``.
        text: the only text to measure, or a file that holds it; None: the held-out data.
        generate: whether every hybrid answers questions.
        config: settings.
    """

    pair: PairConfig
    data: DataConfig | None
    text: str | None = None
    generate: bool = False
    config: WhereConfig = field(default_factory=WhereConfig)

    def __post_init__(self) -> None:
        if self.data is None and (self.text is None or self.generate):
            other = "" if self.generate else ", or one (--text)"
            raise UserError(f"data.validation is missing: give the texts (--data){other}")

    def questions(self, tokenizer: Any) -> BenchmarkConfig:
        """Return the settings of the questions, with sampling, family and default tasks.

        Args:
            tokenizer: tokenizer of the pair, for the family "auto".
        """
        assert self.data is not None
        given = self.config.benchmarks
        return replace(
            given,
            tasks=given.tasks or default_tasks(resolve(self.pair.target)),
            family=auto_format.resolve(self.data.family, tokenizer),
            sampling=self.config.sampling,
        )


def locate(
    request: WhereRequest,
    folder: Path,
    progress: Progress,
    stop: Event,
    *,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Measure where target and base differ; write ``where.json``, tables, plots and a page.

    Args:
        request: what to measure.
        folder: folder of the results, claimed by :func:`fastadapt.evaluation.folder.opened` with
            :data:`CONTENTS`.
        progress: called with (label, completed, total).
        stop: set it to stop after the current batch.
        overwrite: remove the contents of the folder, once models and texts are read.

    Returns:
        The contents of ``where.json``; None if stopped before everything was measured.

    Raises:
        UserError: the models are not a pair, texts or questions are missing, or a stored result is
            damaged.
        RunError: a prediction is not finite, or the folder cannot be written.
    """
    if request.generate:  # fail before the other measurements take minutes
        sources = Sources.find(request.pair)
        config, _ = sources.configs()
        tokenizer = sources.tokenizer()
        check_prompts(tokenizer, request.questions(tokenizer), config, "target")
    models = TwoModels.load(request.pair)
    texts = _texts(request, models)
    weights = ModelSet(models.pair.config, {}, {}).fingerprint("target")
    fingerprint = f"{weights} {models.pair.target.config._attn_implementation}"
    if overwrite:
        clear(folder)
    measured = measure(
        models,
        texts,
        folder / "parts",
        fingerprint,
        config=request.config.where,
        progress=partial(progress, "hybrids"),
        stop=stop,
    )
    if measured is None:
        return None
    changes = weight_changes(
        models,
        with_ranks=request.config.where.ranks,
        progress=partial(progress, "weights"),
        stop=stop,
    )
    answers = None
    if request.generate and not stop.is_set():
        answers = answer(
            models,
            request.questions(models.pair.tokenizer),
            folder / "generated",
            fingerprint,
            request.config.statistics,
            progress=lambda name, *counts: progress(f"answers, {name}", *counts),
            stop=stop,
        )
    if stop.is_set():
        return None
    result = _result(request, models, texts, measured, changes)
    if answers is not None:
        result["generation"] = answers
    check(result, WhereFile, RESULT)
    tables, figures = difference_tables(result), difference_figures(result)
    present(result, tables, figures, folder, "difference", RESULT)
    return result


def _texts(request: WhereRequest, models: TwoModels) -> list[Text]:
    tokenizer, both = models.pair.tokenizer, (models.pair.target, models.base)
    n_rows = models.pair.target.get_input_embeddings().weight.shape[0]
    longest = min(model.config.max_position_embeddings for model in both)
    if request.text is not None:
        return [typed_text(request.text, tokenizer, n_rows, longest)]
    assert request.data is not None
    n = request.config.where.n
    texts, counts = held_out_texts(request.data, tokenizer, n, n_rows, longest)
    models.notes.extend(left_out(counts, longest, request.data.max_tokens))
    return texts


def _result(
    request: WhereRequest,
    models: TwoModels,
    texts: list[Text],
    measured: Measured,
    changes: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the contents of ``where.json``, without answers to benchmarks' questions."""
    statistics = request.config.statistics
    family = None if request.data is None else request.data.family
    regions = regions_of(texts, models.pair.tokenizer, family)
    sections = summarise(measured, models.parts, regions, statistics)
    settings = {
        **dataclasses.asdict(request.config),
        "data": None if request.data is None else dataclasses.asdict(request.data),
    }
    source = "text" if request.data is None or request.text else request.data.validation
    result = {
        "schema_version": SCHEMA_VERSION,
        "pair": models.pair.config.named,
        "settings": settings,
        "level": statistics.level,
        "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        "parts": list(models.parts),
        "notes": models.notes,
        "texts": {"source": source, "n": len(texts), "predicted": len(measured.text)},
        "verdict": verdict(sections, list(models.parts)),
        **sections,
        "weights": changes,
        "positions": widest(models, measured, texts, request.config.where.positions),
    }
    if request.text is not None:
        result["profile"] = profile(models, measured, texts[0])
    return result
