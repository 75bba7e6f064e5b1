"""Run the study of a run in an output folder, resumably."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.evaluation.benchmarks.run_all import complete_config
from fastadapt.evaluation.benchmarks.runner import (
    BenchmarkConfig,
    BenchmarkResult,
    check_prompts,
    read_rows,
    response_keys,
    run_benchmarks,
    summarize,
)
from fastadapt.evaluation.benchmarks.scores import (
    MEAN,
    SAMPLED,
    recovered_hesitation,
    summarise_benchmarks,
)
from fastadapt.evaluation.folder import present
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.selection import alive, density_shares
from fastadapt.features.store.sets import FeatureSet
from fastadapt.features.store.store import Store
from fastadapt.interventions import scale_features
from fastadapt.io.names import has_file
from fastadapt.study.conditions import BIAS, PARTS, RUN, Arm, StudyConfig, arms_of, select
from fastadapt.study.report import claims, figures, tables

SCHEMA_VERSION = 1
#: Entries of a study's output folder.
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
class Cost:
    """Cost of a study: arms, and responses to sample.

    Attributes:
        arms: number of arms.
        measured: number of arms whose responses are complete.
        responses: responses of the other arms that are not graded yet.
        max_new_tokens: largest number of tokens of a response.
        note: which arms are left out, and why; empty if none is.
    """

    arms: int
    measured: int
    responses: int
    max_new_tokens: int
    note: str = ""

    @property
    def words(self) -> str:
        """The cost in words."""
        words = (
            f"{self.arms} arms, {self.measured} of them measured; {self.responses:,} responses to "
            f"sample, each of at most {self.max_new_tokens:,} tokens."
        )
        return f"{words}\n{self.note}" if self.note else words


@dataclass(frozen=True)
class Study:
    """A run opened for the study, and the output folder.

    Attributes:
        students: the run, with the name ``RUN``.
        store: the store of the run's features.
        folder: the output folder, opened by :func:`fastadapt.evaluation.folder.opened`.
        config: settings of the study.
        progress: called with (label, completed, total).
        stop: event that ends the study after the current batch.
    """

    students: ModelSet
    store: Store
    folder: Path
    config: StudyConfig
    progress: Callable[[str, int, int], None]
    stop: Event

    def check(self) -> None:
        """Check that the study can be run, and load the models, without reading its folder.

        Raises:
            UserError: a required package is not installed, data is missing, a prompt is longer than
                the context, a selection is empty, or a model cannot be read.
        """
        sizes = self.students.sizes("target")
        check_prompts(self.students.tokenizer, self._benchmarks(), sizes, "target")
        arms_of(self.store, select(self.store, self.config), self.config)
        self.students.adapters(RUN)

    def cost(self) -> Cost:
        """Return the numbers of arms, in all and measured, and of responses still to sample.

        Raises:
            UserError: a required package is not installed, a selection is empty, or a file of
                graded responses is damaged.
        """
        benchmarks = self._benchmarks()
        keys = response_keys(benchmarks)
        arms = self._arms(select(self.store, self.config))
        missing = [
            sum(
                len(required - _graded(folder / f"{task}.rows.jsonl"))
                for task, required in keys.items()
            )
            for folder in (self._folder(arm, benchmarks) for arm in arms)
        ]
        max_new_tokens = self.config.sampling.max_new_tokens
        note = self.students.compared[RUN].transfer_obstacle or ""
        return Cost(len(arms), missing.count(0), sum(missing), max_new_tokens, note)

    def run(self) -> dict[str, Any] | None:
        """Run the benchmarks of missing arms; write ``study.json``, tables, plots and page.

        Returns:
            The contents of ``study.json``; None if stopped before all arms were measured.

        Raises:
            UserError: a required package is not installed, or a selection is empty.
        """
        benchmarks = self._benchmarks()
        response_keys(benchmarks)  # fails before the first arm if questions are missing
        sets = select(self.store, self.config)
        arms = self._arms(sets)
        results: dict[tuple[Any, ...], list[dict[str, BenchmarkResult]]] = {}
        for number, arm in enumerate(arms):
            label = f"{number + 1} of {len(arms)}, {arm.name}"
            measured = self._run_arm(arm, benchmarks, label)
            if self.stop.is_set():
                return None
            results.setdefault(arm.group, []).append(measured)
        result = self._describe(sets, benchmarks)
        result["arms"] = self._summarise_arms(arms, results, sets)
        result["claims"] = claims(result)
        present(result, tables(result), figures(result), self.folder, "study", "study.json")
        return result

    def _arms(self, sets: Mapping[str, FeatureSet]) -> list[Arm]:
        transfer = self.students.compared[RUN].transfer_obstacle is None
        return arms_of(self.store, sets, self.config, transfer=transfer)

    def _benchmarks(self) -> BenchmarkConfig:
        return complete_config(self.students, self.config.benchmarks, self.config.sampling)

    @cached_property
    def _weights(self) -> dict[str, str]:
        """SHA-256 of the weights of each model."""
        return {name: self.students.fingerprint(name) for name in ("target", "hybrid", RUN)}

    def _sha256(self, arm: Arm) -> str:
        """Return the SHA-256 of all that an arm's model depends on."""
        sha256 = self._weights[arm.model if arm.kind is None else RUN]
        if arm.features is None:
            return sha256
        changed = (sha256, arm.kind, arm.scale, arm.features.digest())
        return hashlib.sha256(repr(changed).encode()).hexdigest()

    def _folder(self, arm: Arm, benchmarks: BenchmarkConfig) -> Path:
        digest = benchmarks.fingerprint(self._sha256(arm))[:16]
        return self.folder / "benchmarks" / f"{arm.name}-{digest}"

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

    def _run_arm(
        self, arm: Arm, benchmarks: BenchmarkConfig, label: str
    ) -> dict[str, BenchmarkResult]:
        with self._generating(arm) as model:
            return run_benchmarks(
                model,
                self.students.tokenizer,
                benchmarks,
                self._folder(arm, benchmarks),
                source={"model": arm.name, "sha256": self._sha256(arm)},
                progress=partial(self.progress, label),
                stop=self.stop,
            )

    # --- contents of study.json -------------------------------------------------------------------

    def _summarise_arms(
        self,
        arms: list[Arm],
        results: Mapping[tuple[Any, ...], list[dict[str, BenchmarkResult]]],
        sets: Mapping[str, FeatureSet],
    ) -> list[dict[str, Any]]:
        """Return each group's results, over all draws and for each draw."""
        config, measured = self.config.statistics, []
        (bias,) = (a.group for a in arms if a.selection == BIAS)
        floor, ceiling = results[bias][0], results[Arm(RUN).group][0]
        for group, draws in results.items():
            members = [arm for arm in arms if arm.group == group]
            first = members[0]
            drawn = [arm.features for arm in members if arm.times and arm.features is not None]
            shares = density_shares(self.store, sets[first.selection], drawn) if drawn else []
            tasks = list(draws[0])
            whole = {task: pooled(task, draws) for task in tasks}
            summary = summarise_benchmarks(
                {
                    "all": {SAMPLED: whole},
                    **{str(i): {SAMPLED: draw} for i, draw in enumerate(draws)},
                },
                config,
                words=self.config.benchmarks.hesitation_words,
            )
            by_benchmark = {task: summary[task]["all"][SAMPLED] for task in tasks}
            summary = summary[MEAN if len(tasks) > 1 else tasks[0]]
            numbers = summary["all"][SAMPLED]
            keys = (
                *("hesitations_per_1000", "length", "accuracy"),
                *("by_word", "truncated", "degenerate"),
            )
            measured.append(
                {
                    **{key: getattr(first, key) for key in ("model", "kind", "selection", "times")},
                    "scale": first.scale,
                    "features": 0 if first.features is None else len(first.features),
                    **{key: numbers[key] for key in keys},
                    "benchmarks": {
                        task: {key: scores[key] for key in keys[:3]}
                        for task, scores in by_benchmark.items()
                    },
                    "beyond_bias": (
                        recovered_hesitation(whole, floor, ceiling, config)
                        if first.kind == "only" and first.selection != BIAS
                        else None
                    ),
                    "draws": [
                        {
                            **{key: summary[str(i)][SAMPLED][key] for key in keys[:3]},
                            **({"density": shares[i]} if shares else {}),
                        }
                        for i in range(len(draws))
                    ],
                }
            )
        return measured

    def _describe(
        self, sets: Mapping[str, FeatureSet], benchmarks: BenchmarkConfig
    ) -> dict[str, Any]:
        """Return the settings, the sets and the versions."""
        obstacle = self.students.compared[RUN].transfer_obstacle
        return {
            "schema_version": SCHEMA_VERSION,
            "pair": self.students.config.named,
            "run": dataclasses.asdict(self.students.compared[RUN]),
            "settings": {
                **dataclasses.asdict(self.config),
                "benchmarks": dataclasses.asdict(benchmarks),
            },
            "level": self.config.statistics.level,
            "notes": [] if obstacle is None else [obstacle],
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


def _graded(path: Path) -> set[tuple[str, int]]:
    """Return question and repetition of the graded responses in a file; none without a file."""
    return {(row.question, row.repetition) for row in read_rows(path)} if has_file(path) else set()


def pooled(task: str, draws: list[dict[str, BenchmarkResult]]) -> BenchmarkResult:
    """Return the responses of several models as repetitions of one model."""
    results = [draw[task] for draw in draws]
    rows = [
        dataclasses.replace(row, repetition=row.repetition + i * results[0].repetitions)
        for i, result in enumerate(results)
        for row in result.rows
    ]
    return summarize(task, rows)
