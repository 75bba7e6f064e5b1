"""Runs all parts of an evaluation for a set of runs. An interrupted evaluation can be resumed.

Each part is stored under a fingerprint of the models, texts and settings that it depends on. Stored
results with the same fingerprint are reused; results of other settings are ignored.
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
from fastadapt.evaluation.benchmarks.run_all import (
    checked_modes,
    complete_config,
    count_texts,
    run_models,
)
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig
from fastadapt.evaluation.benchmarks.scores import (
    Results,
    summarise_benchmarks,
    summarise_groups,
)
from fastadapt.evaluation.faithfulness.outputs import OutputConfig, measure_output
from fastadapt.evaluation.faithfulness.partial_replacement import (
    PartialConfig,
    measure_partial,
)
from fastadapt.evaluation.faithfulness.prompts import family_of
from fastadapt.evaluation.faithfulness.summary import (
    order,
    output_groups,
    partial_gaps,
    partial_groups,
    summarise_output,
    summarise_partial,
)
from fastadapt.evaluation.faithfulness.target_texts import TextsConfig, check_texts, target_texts
from fastadapt.evaluation.faithfulness.texts import Text, answer_starts, batch_of, batches_of
from fastadapt.evaluation.folder import PARTS, Part, clear, read_part, write
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.generation.throughput import SpeedConfig, measure_speed
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.evaluation.runs import ComparedModel, seed_groups
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.models.self_check import check_traversal

SCHEMA_VERSION = 1
#: Largest difference of the L0 of two adapters that are compared at equal L0, as a share.
SAME_L0 = 0.1
#: Progress callback: label, completed, total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvalConfig:
    """Settings of an evaluation.

    Args:
        texts: the texts on which models are compared.
        sampling: sampling of the texts and of the benchmarks' responses.
        outputs: output faithfulness.
        partial: partial replacement.
        speed: speed of generation.
        benchmarks: benchmarks. With ``few_shot``, the base and the hybrid are also evaluated with
            examples, at temperature 0 and at the temperature of ``sampling``. Its own ``sampling``
            and ``family`` are ignored: the sampling is the one above, the family that of the runs.
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
    """An evaluation of runs, with its results in a folder.

    Attributes:
        models: the runs, their base and their hybrid.
        folder: folder of the evaluation, claimed by :func:`fastadapt.evaluation.folder.opened`.
        config: settings.
        progress: called with (label, completed, total).
        stop: set it to stop after the current batch.
    """

    models: ModelSet
    folder: Path
    config: EvalConfig
    progress: Progress
    stop: Event

    def run(self, parts: Sequence[Part], *, overwrite: bool = False) -> dict[str, Any] | None:
        """Measure the named parts of the evaluation, and write ``eval.json``, tables and plots.

        Args:
            parts: names of the parts. ``eval.json`` keeps other parts that were measured with the
                same models and settings.
            overwrite: remove the contents of the folder, once models and prompts are read.

        Returns:
            The contents of ``eval.json``; None if stopped before everything was measured.

        Raises:
            UserError: ``parts`` is empty, data or a package is missing, a prompt is longer than a
                model's context, or a stored result is damaged.
        """
        if not parts:
            raise UserError(f"--parts: expected one or more of {', '.join(PARTS)}, got none")
        if "benchmarks" in parts:  # fail before the other parts take hours
            checked_modes(self.models, self._benchmark_config())
        reads_texts = not {"outputs", "partial"}.isdisjoint(parts)
        if overwrite:
            if reads_texts:
                check_texts(self.models, self.config.texts)
            for name in self.models.runs:
                self.models.adapters(name)
            clear(self.folder)
        sections: dict[str, Any] = {}
        if reads_texts:
            texts = target_texts(
                self.models,
                self.config.texts,
                self.config.sampling,
                self.folder / "texts",
                progress=partial(self.progress, "texts of the target"),
                stop=self.stop,
            )
            if not self.stop.is_set():
                first = batch_of(texts, batches_of(texts, self.config.outputs.batch_tokens)[0])
                check_traversal(self.models.model, first.to(self.models.model.device))
            if "outputs" in parts and not self.stop.is_set():
                sections |= self._outputs(texts)
            if "partial" in parts and not self.stop.is_set():
                sections |= self._partial(texts[: self.config.texts.n_partial])
            sections["texts"] = self._text_counts(texts)
        if "speed" in parts and not self.stop.is_set():
            sections["speed"] = measure_speed(
                self.models,
                self.folder / "speed.json",
                self.config.speed,
                progress=partial(self.progress, "speed of generation"),
                stop=self.stop,
            )
        if "benchmarks" in parts and not self.stop.is_set():
            sections |= self._benchmarks()
        if self.stop.is_set():
            return None
        result = {**self._about(), **sections}
        if self.models.notes:
            result["notes"] = self.models.notes
        for part in set(PARTS) - set(parts):
            result |= read_part(self.folder, part, result)
        result["students"] = self._cards(result.get("faithfulness", {}))
        write(result, self.folder)
        return result

    # --- the parts --------------------------------------------------------------------------------

    def _outputs(self, texts: list[Text]) -> dict[str, Any]:
        measured = measure_output(
            self.models,
            texts,
            self.folder / "outputs",
            config=self.config.outputs,
            progress=partial(self.progress, "outputs"),
            stop=self.stop,
        )
        if self.stop.is_set():
            return {}
        answers = answer_starts(texts, self.models.tokenizer, family_of(self.models))
        summary = summarise_output(measured, texts, answers, self.config.statistics)
        ranked = [name for name in self._ranking(summary) if name in measured]
        groups = self._groups
        return {
            "faithfulness": summary,
            "order": order(measured, ranked, self.config.statistics),
            **({"seeds": output_groups(measured, groups, self._level)} if groups else {}),
        }

    def _ranking(self, summary: Mapping[str, Any]) -> list[str]:
        """Return names in the expected order, farthest from the target first (arXiv 2602.20904).

        The order is base, hybrid, adapters from sparse to dense, best fine-tuned MLPs. Ablations
        are left out.
        """
        compared = self.models.compared.items()
        repeated = {name for first, *others in self._groups.values() for name in others}
        sweep = [n for n, m in compared if m.kind == "transcoder" and not m.variant]
        sweep = [name for name in sweep if name not in repeated]
        sweep.sort(key=lambda name: summary[name]["l0"])
        skylines = [n for n, m in compared if m.kind == "mlp"]
        skylines.sort(key=lambda name: summary[name]["top1_error"]["mean"])
        return ["base", "hybrid", *sweep, *skylines[:1]]

    def _partial(self, texts: list[Text]) -> dict[str, Any]:
        measured = measure_partial(
            self.models,
            texts,
            self.folder / "partial",
            config=self.config.partial,
            progress=partial(self.progress, "partial replacement"),
            stop=self.stop,
        )
        if self.stop.is_set():
            return {}
        groups = self._groups
        pairs = self._bridged_pairs()
        return {
            "partial": summarise_partial(measured, self.config.statistics),
            "bridge": [
                {
                    "without": bare,
                    "with": whole,
                    "last": partial_gaps(
                        measured[bare], measured[whole], "last", self.config.statistics
                    ),
                }
                for bare, whole in pairs
            ],
            "bridge_seeds": [
                {
                    "without": bare,
                    "with": whole,
                    "last": partial_groups(
                        [measured[run] for run in groups[bare]],
                        [measured[run] for run in groups[whole]],
                        "last",
                        self._level,
                    ),
                }
                for bare, whole in pairs
                if bare in groups and whole in groups
            ],
        }

    def _bridged_pairs(self) -> list[tuple[str, str]]:
        """Return pairs of adapters trained without and with the bridge, alike in λ or in L0.

        When only the last layers are replaced, their inputs come from layers of the target. The
        bridge trains adapters for such inputs (target→adapter). Of runs that differ by their seed
        only, the first stands for all.
        """
        repeated = {name for first, *others in self._groups.values() for name in others}
        adapters = [
            m
            for m in self.models.compared.values()
            if m.kind == "transcoder" and m.name not in repeated
        ]
        return [
            (bare.name, whole.name)
            for bare in adapters
            for whole in adapters
            if (bare.variant, whole.variant) == ("no-bridge", "") and alike(bare, whole)
        ]

    @property
    def _groups(self) -> dict[str, list[str]]:
        """Groups of runs that differ only by their seed, by the name of the first run."""
        return seed_groups(self.models.compared.values())

    @property
    def _level(self) -> float:
        return self.config.statistics.level

    def _benchmarks(self) -> dict[str, Any]:
        config, folder = self._benchmark_config(), self.folder / "benchmarks"
        results = run_models(self.models, config, folder, self.progress, self.stop)
        if self.stop.is_set():
            return {}
        return {
            "benchmarks": summarise_benchmarks(
                results, self.config.statistics, words=config.hesitation_words
            ),
            "benchmark_counts": count_texts(results),
            **({"benchmark_seeds": answers} if (answers := self._answers(results)) else {}),
        }

    def _answers(self, results: Results) -> dict[str, Any]:
        groups = self._groups
        return summarise_groups(results, groups, self._level) if groups else {}

    def _benchmark_config(self) -> BenchmarkConfig:
        return complete_config(self.models, self.config.benchmarks, self.config.sampling)

    # --- other sections of eval.json --------------------------------------------------------------

    def _text_counts(self, texts: Sequence[Text]) -> dict[str, int]:
        return {
            "n": len(texts),
            "n_partial": min(len(texts), self.config.texts.n_partial),
            "predicted": sum(len(text.ids) - 1 for text in texts),
        }

    def _about(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "pair": self.models.config.named,
            "settings": dataclasses.asdict(self.config),
            "level": self.config.statistics.level,
            "fingerprints": {
                name: self.models.fingerprint(name) for name in ("target", *self.models.compared)
            },
            "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        }

    def _cards(self, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return facts of each model. L0 is that of this evaluation, else of the training run."""
        return [
            {
                **dataclasses.asdict(model),
                "l0": measured.get(name, {}).get("l0") or model.l0,
                "variant": model.variant,
                "what": model.description,
            }
            for name, model in self.models.compared.items()
        ]


def alike(first: ComparedModel, second: ComparedModel) -> bool:
    """Return whether two adapters were trained with one sparsity and k, or have about one L0."""
    names = ("activation", "penalty", "penalty_scale")
    if any(getattr(first, name) != getattr(second, name) for name in names):
        return False
    if (first.sparsity, first.k) == (second.sparsity, second.k):
        return True
    if not first.l0 or not second.l0:
        return False
    return abs(first.l0 - second.l0) <= SAME_L0 * max(first.l0, second.l0)
