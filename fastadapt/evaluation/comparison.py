"""Everything that `fastadapt eval` measures of runs, in a folder that it can be gone on with in.

Each part is kept under a fingerprint of all that it depends on: what is there already is not
measured again, and what belongs to other settings is never taken for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.run_all import ask, asked_of, counts_of
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig, require_questions
from fastadapt.evaluation.benchmarks.scores import summarise_benchmarks
from fastadapt.evaluation.faithfulness.outputs import OutputConfig, measure_output
from fastadapt.evaluation.faithfulness.partial_replacement import (
    Partial,
    PartialConfig,
    measure_partial,
)
from fastadapt.evaluation.faithfulness.summary import (
    order,
    partial_gaps,
    summarise_output,
    summarise_partial,
)
from fastadapt.evaluation.faithfulness.target_texts import TextsConfig, target_texts
from fastadapt.evaluation.faithfulness.texts import Text, answer_starts, batch_of, batches_of
from fastadapt.evaluation.folder import PARTS, Part, kept_part, write
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.generation.throughput import SpeedConfig, measure_speed
from fastadapt.evaluation.models_under_test import Students
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.models.self_check import check_traversal

SCHEMA_VERSION = 1
#: Told what is being done, how much of it is done, and how much there is.
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, and how.

    Args:
        texts: what students are compared on.
        sampling: of these texts, and of the benchmarks.
        outputs: output faithfulness.
        partial: partial replacement.
        speed: of generation.
        benchmarks: questions; with ``few_shot`` base and hybrid are asked with examples as well, at
            temperature 0 and at that of ``sampling``. ``sampling`` and ``family`` of theirs are not
            settings here: they are those above and the runs'.
        statistics: intervals.
    """

    texts: TextsConfig = field(default_factory=TextsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    outputs: OutputConfig = field(default_factory=OutputConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    benchmarks: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    statistics: BootstrapConfig = field(default_factory=BootstrapConfig)


@dataclass(frozen=True)
class Comparison:
    """Runs opened for an evaluation, and the folder of it.

    Attributes:
        students: the runs, their base and hybrid.
        folder: of the evaluation, held by :func:`opened`.
        config: what is measured.
        tell: called as work is done.
        stop: set it to end after the batch at hand.
    """

    students: Students
    folder: Path
    config: EvalConfig
    tell: Tell
    stop: Event

    def run(self, parts: Sequence[Part]) -> dict[str, Any] | None:
        """Measure what was not measured before, and write ``eval.json``, tables and plots.

        Returns:
            The contents of ``eval.json``; None if told to stop before everything was measured.
        """
        if not parts:
            raise UserError(f"--parts: expected some of {', '.join(PARTS)}, got none")
        if "benchmarks" in parts:  # what is missing there is told before hours are spent here
            require_questions(asked_of(self.students, self.config.benchmarks, self.config.sampling))
        found: dict[str, Any] = {}
        if {"outputs", "partial"} & set(parts):
            texts = target_texts(
                self.students,
                self.config.texts,
                self.config.sampling,
                self.folder / "texts",
                progress=partial(self.tell, "texts of the target"),
                stop=self.stop,
            )
            if not self.stop.is_set():
                first = batch_of(texts, batches_of(texts, self.config.outputs.batch_tokens)[0])
                check_traversal(self.students.model, first.to(self.students.model.device))
            if "outputs" in parts and not self.stop.is_set():
                found |= self._outputs(texts)
            if "partial" in parts and not self.stop.is_set():
                found |= self._partial(texts[: self.config.texts.n_partial])
            found["texts"] = self._told_of(texts)
        if "speed" in parts and not self.stop.is_set():
            found["speed"] = measure_speed(
                self.students,
                self.folder / "speed.json",
                self.config.speed,
                progress=partial(self.tell, "speed of generation"),
                stop=self.stop,
            )
        if "benchmarks" in parts and not self.stop.is_set():
            found |= self._benchmarks()
        if self.stop.is_set():
            return None
        result = {**self._about(), **found}
        for part in set(PARTS) - set(parts):
            result |= kept_part(self.folder, part, result)
        result["students"] = self._cards(result.get("faithfulness", {}))
        write(result, self.folder)
        return result

    # --- the parts --------------------------------------------------------------------------------

    def _outputs(self, texts: list[Text]) -> dict[str, Any]:
        students = self.students
        measured = measure_output(
            students,
            texts,
            self.folder / "outputs",
            config=self.config.outputs,
            progress=partial(self.tell, "outputs"),
            stop=self.stop,
        )
        if self.stop.is_set():
            return {}
        answers = answer_starts(texts, students.tokenizer)
        told = summarise_output(measured, texts, answers, self.config.statistics)
        ranked = [name for name in self._ranking(told) if name in measured]
        return {
            "faithfulness": told,
            "order": order(measured, ranked, self.config.statistics),
        }

    def _ranking(self, told: Mapping[str, Any]) -> list[str]:
        """From the furthest to the nearest, as arXiv 2602.20904 found them.

        Base, hybrid, adapters from sparse to dense, skyline; the ablations have no place in it.
        """
        all_of_them = self.students.students
        sweep = [n for n, s in all_of_them.items() if s.kind == "transcoder" and not s.variant]
        sweep.sort(key=lambda name: told[name]["l0"])
        skylines = [n for n, s in all_of_them.items() if s.kind == "mlp"]
        skylines.sort(
            key=lambda name: told[name]["top1_error"]["mean"]
        )  # of several rates, the best
        return ["base", "hybrid", *sweep, *skylines[:1]]

    def _partial(self, texts: list[Text]) -> dict[str, Any]:
        measured = measure_partial(
            self.students,
            texts,
            self.folder / "partial",
            config=self.config.partial,
            progress=partial(self.tell, "partial replacement"),
            stop=self.stop,
        )
        if self.stop.is_set():
            return {}
        return {
            "partial": summarise_partial(measured, self.config.statistics),
            "bridge": self._bridge(measured),
        }

    def _bridge(self, measured: Mapping[str, Partial]) -> list[dict[str, Any]]:
        """Adapters without the bridge against those of the same sparsity with it, paired by text.

        Where only the last layers are replaced, these get inputs that no replaced layer has made:
        what target→adapter trains for.
        """
        students = [s for s in self.students.students.values() if s.kind == "transcoder"]
        return [
            {
                "without": ablated.name,
                "with": whole.name,
                "last": partial_gaps(
                    measured[ablated.name], measured[whole.name], "last", self.config.statistics
                ),
            }
            for ablated in students
            for whole in students
            if (ablated.variant, whole.variant) == ("no-bridge", "")
            and ablated.sparsity == whole.sparsity
        ]

    def _benchmarks(self) -> dict[str, Any]:
        asked = asked_of(self.students, self.config.benchmarks, self.config.sampling)
        results = ask(self.students, asked, self.folder / "benchmarks", self.tell, self.stop)
        if self.stop.is_set():
            return {}
        return {
            "benchmarks": summarise_benchmarks(results, self.config.statistics),
            "benchmark_counts": counts_of(results),
        }

    # --- what is written --------------------------------------------------------------------------

    def _told_of(self, texts: Sequence[Text]) -> dict[str, int]:
        return {
            "n": len(texts),
            "n_partial": min(len(texts), self.config.texts.n_partial),
            "predicted": sum(len(text.ids) - 1 for text in texts),
        }

    def _about(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "pair": self.students.config.named,
            "settings": dataclasses.asdict(self.config),
            "level": self.config.statistics.level,
            "fingerprints": {
                name: self.students.fingerprint(name)
                for name in ("target", *self.students.students)
            },
            "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        }

    def _cards(self, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is said of each student; L0 as measured here, or else on its run's held-out data."""
        return [
            {
                **student.plain(),
                "l0": measured.get(name, {}).get("l0") or student.l0,
                "variant": student.variant,
                "what": student.what,
            }
            for name, student in self.students.students.items()
        ]
