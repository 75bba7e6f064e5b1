"""The study of a run, in a folder that it can be gone on with in."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.evaluation.benchmarks.run_all import complete_config
from fastadapt.evaluation.benchmarks.runner import (
    BenchmarkConfig,
    BenchmarkResult,
    require_questions,
    run_benchmarks,
    summarize,
)
from fastadapt.evaluation.benchmarks.scores import MEAN, SAMPLED, summarise_benchmarks
from fastadapt.evaluation.folder import present
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.selection import alive
from fastadapt.features.store.sets import FeatureSet
from fastadapt.features.store.store import Store
from fastadapt.interventions import scale_features
from reproduce.study.conditions import PARTS, RUN, Arm, StudyConfig, arms_of, select
from reproduce.study.report import claims, figures, tables

SCHEMA_VERSION = 1
#: Everything that is ever in the folder of a study.
CONTENTS = (
    ".lock",
    "benchmarks",
    "study.json",
    "tables.md",
    "tables.tex",
    "plots",
    "report.html",
)


@dataclass(frozen=True)
class Study:
    """A run opened for the study, and the folder of it.

    Attributes:
        students: the run, under the name ``RUN``.
        store: of its features.
        folder: of the study, held by :func:`fastadapt.evaluation.folder.opened`.
        config: what is done.
        tell: called with (what, done, wanted).
        stop: set it to end after the batch at hand.
    """

    students: ModelSet
    store: Store
    folder: Path
    config: StudyConfig
    tell: Callable[[str, int, int], None]
    stop: Event

    def run(self) -> dict[str, Any] | None:
        """Ask every arm that was not asked before; write ``study.json``, tables, plots, page.

        Returns:
            The contents of ``study.json``; None if told to stop before everything was asked.

        Raises:
            UserError: something needed is not installed, or a selection is empty.
        """
        asked = complete_config(self.students, self.config.benchmarks, self.config.sampling)
        require_questions(asked)
        sets = select(self.store, self.config)
        arms = arms_of(self.store, sets, self.config)
        results: dict[tuple[Any, ...], list[dict[str, BenchmarkResult]]] = {}
        for number, arm in enumerate(arms):
            found = self._ask(arm, asked, f"{number + 1} of {len(arms)}, {arm.name}")
            if self.stop.is_set():
                return None
            results.setdefault(arm.group, []).append(found)
        result = self._about(sets, asked)
        result["arms"] = self._measured(arms, results)
        result["claims"] = claims(result)
        present(result, tables(result), figures(result), self.folder, "study", "study.json")
        return result

    @contextmanager
    def _generating(self, arm: Arm) -> Iterator[Any]:
        if arm.features is None or arm.kind is None:
            with self.students.generating(arm.model) as model:
                yield model
            return
        onto = arm.kind == "onto-target"
        features = ~arm.features if arm.kind == "only" else arm.features
        factor = 0.0 if arm.scale is None else arm.scale
        with (
            self.students.generating(RUN) as model,
            scale_features(
                self.students.model, features, factor, onto="target" if onto else "base"
            ),
        ):
            yield model

    def _ask(self, arm: Arm, asked: BenchmarkConfig, told: str) -> dict[str, BenchmarkResult]:
        sha256 = self.students.fingerprint(arm.model if arm.kind is None else RUN)
        if arm.features is not None:
            changed = (sha256, arm.kind, arm.scale, arm.features.digest())
            sha256 = hashlib.sha256(repr(changed).encode()).hexdigest()
        with self._generating(arm) as model:
            return run_benchmarks(
                model,
                self.students.tokenizer,
                asked,
                self.folder / "benchmarks" / f"{arm.name}-{asked.fingerprint(sha256)[:16]}",
                source={"model": arm.name, "sha256": sha256},
                progress=partial(self.tell, told),
                stop=self.stop,
            )

    # --- what is written --------------------------------------------------------------------------

    def _measured(
        self,
        arms: list[Arm],
        results: Mapping[tuple[Any, ...], list[dict[str, BenchmarkResult]]],
    ) -> list[dict[str, Any]]:
        """Of each group of arms its numbers, over all draws together, and of each draw."""
        config, measured = self.config.statistics, []
        for group, draws in results.items():
            first = next(arm for arm in arms if arm.group == group)
            tasks = list(draws[0])
            told = summarise_benchmarks(
                {
                    "all": {SAMPLED: {task: pooled(task, draws) for task in tasks}},
                    **{str(i): {SAMPLED: draw} for i, draw in enumerate(draws)},
                },
                config,
            )[MEAN if len(tasks) > 1 else tasks[0]]
            numbers = told["all"][SAMPLED]
            wanted = ("hesitations_per_1000", "length", "accuracy", "truncated", "degenerate")
            measured.append(
                {
                    **{key: getattr(first, key) for key in ("model", "kind", "selection", "times")},
                    "scale": first.scale,
                    "features": 0 if first.features is None else len(first.features),
                    **{key: numbers[key] for key in wanted},
                    "draws": [
                        {key: told[str(i)][SAMPLED][key] for key in wanted[:3]}
                        for i in range(len(draws))
                    ],
                }
            )
        return measured

    def _about(self, sets: Mapping[str, FeatureSet], asked: BenchmarkConfig) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "pair": self.students.config.named,
            "run": dataclasses.asdict(self.students.compared[RUN]),
            "settings": {
                **dataclasses.asdict(self.config),
                "benchmarks": dataclasses.asdict(asked),
            },
            "level": self.config.statistics.level,
            "features": {
                "adapter": self.store.manifest["adapter"],
                "total": self.store.shape("adapter")[0] * self.store.shape("adapter")[1],
                "alive": len(alive(self.store)),
            },
            "sets": [
                {
                    "key": key,
                    "name": features.name,
                    "part": key in PARTS,
                    "size": len(features),
                    "per_layer": features.per_layer(),
                    "made": features.expression,
                    "sha256": features.digest(),
                }
                for key, features in sets.items()
            ],
            "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        }


def pooled(task: str, draws: list[dict[str, BenchmarkResult]]) -> BenchmarkResult:
    """The responses of several models as repetitions of one."""
    of = [draw[task] for draw in draws]
    rows = [
        dataclasses.replace(row, repetition=row.repetition + i * of[0].repetitions)
        for i, result in enumerate(of)
        for row in result.rows
    ]
    return summarize(task, rows)
