"""What the study compares: selected sets, random ones beside them, every model that is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.features.store.selection import alive, matched, promoting, standing_at
from fastadapt.features.store.sets import FeatureSet
from fastadapt.features.store.store import Store
from fastadapt.interventions import KINDS, SCALE, Kind

RUN = "adapter"  #: the name of the run among the models that are asked
PARTS = ("hesitation", "template")  #: keys of the kinds of features alone


@dataclass(frozen=True)
class StudyConfig:
    """What is selected, switched and asked.

    Args:
        tops: selections of both kinds of features, by how many of the most promoted tokens count;
            of the first, which is the main one, the kinds are switched apart as well.
        share: of the strongest examples that stand at the template's markers.
        times: sizes of the random sets, as multiples of the selected one.
        draws: random sets of each size.
        scales: of the transfer of the main selection; -0.5 is measured of everything.
        benchmarks: questions; the pair's own where none is named. Its ``sampling`` and ``family``
            are not settings here: they are that below and the run's.
        sampling: of the responses.
        statistics: intervals.
    """

    tops: tuple[int, ...] = (1, 10)
    share: float = 0.8
    times: tuple[int, ...] = (1, 10)
    draws: int = 3
    scales: tuple[float, ...] = (-0.25, -0.5, -0.75, -1.0)
    benchmarks: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    statistics: BootstrapConfig = field(default_factory=BootstrapConfig)

    def __post_init__(self) -> None:
        for name in ("tops", "times"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise UserError(f"{name}: expected distinct numbers of 1 or more, got {values}")
        if self.draws < 1:
            raise UserError(f"draws: expected 1 or more, got {self.draws}")


@dataclass(frozen=True)
class Arm:
    """One model that is asked.

    Attributes:
        model: that is changed: ``target``, ``hybrid`` or the run.
        kind: the intervention; None for the model as it is.
        selection: its key.
        times: of a random set, how many times as many; 0 is the selected set.
        seed: of the draw.
        scale: of a transfer.
        features: the set.
    """

    model: str
    kind: Kind | None = None
    selection: str = ""
    times: int = 0
    seed: int = 0
    scale: float | None = None
    features: FeatureSet | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """What the draws of one size share."""
        return self.model, self.kind, self.selection, self.times, self.scale

    @property
    def name(self) -> str:
        """That of its folder."""
        if self.kind is None:
            return self.model
        drawn = f"-random{self.times}x-{self.seed}" if self.times else ""
        scale = "" if self.scale is None else f"{self.scale:+g}"
        return f"{self.kind}{scale}-{self.selection}{drawn}"


def select(store: Store, config: StudyConfig) -> dict[str, FeatureSet]:
    """The selected sets by their keys, the main one first, each named in words.

    Raises:
        UserError: one of them is empty.
    """
    template, living = standing_at(store, share=config.share), alive(store)
    words = config.benchmarks.hesitation_words
    hesitation = {top: promoting(store, words, top) for top in config.tops}
    sets = {
        f"top{top}": replace(of | template, name=f"hesitation (top {top}) + template")
        for top, of in hesitation.items()
    }
    main = config.tops[0]
    alone = (hesitation[main], f"hesitation (top {main}) alone"), (template, "template alone")
    sets |= {key: replace(of, name=name) for key, (of, name) in zip(PARTS, alone, strict=True)}
    return {key: replace(of & living, name=of.name).not_empty() for key, of in sets.items()}


def arms_of(store: Store, sets: Mapping[str, FeatureSet], config: StudyConfig) -> list[Arm]:
    """Every model that is asked, the unchanged ones first."""
    return [*(Arm(model) for model in ("target", "hybrid", RUN)), *_changed(store, sets, config)]


def _changed(store: Store, sets: Mapping[str, FeatureSet], config: StudyConfig) -> Iterator[Arm]:
    living, main = alive(store), next(iter(sets))
    for key, features in sets.items():
        drawn = {
            (n, seed): matched(store, features, n, seed)
            for n in _sizes(len(features), len(living - features), config.times)
            for seed in range(config.draws)
        }
        for kind in KINDS:
            onto = kind == "onto-target"
            model = "target" if onto else RUN
            swept = dict.fromkeys((*config.scales, SCALE)) if key == main else (SCALE,)
            for scale in swept if onto else (None,):
                yield Arm(model, kind, key, scale=scale, features=features)
            # Of a kind of features alone, removal is where its random sets are asked for.
            beside = drawn if kind == "ablate" or key not in PARTS else {}
            for (n, seed), others in beside.items():
                yield Arm(model, kind, key, n, seed, SCALE if onto else None, others)


def _sizes(size: int, others: int, times: tuple[int, ...]) -> list[int]:
    """Multiples of a set that random ones are drawn of.

    As many as there are if they exist; more only up to half of the others, beyond which draws are
    the same features again.
    """
    most = max(others // 2 // size, min(1, others // size))
    return list(dict.fromkeys(min(n, most) for n in times if most))
