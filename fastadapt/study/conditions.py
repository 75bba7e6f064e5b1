"""Define what the study compares: selected sets, random controls, and the models of each arm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.statistics import BootstrapConfig
from fastadapt.features.store.selection import (
    alive,
    matched,
    on_template,
    preceding,
    promoting,
)
from fastadapt.features.store.sets import FeatureSet
from fastadapt.features.store.store import Store
from fastadapt.interventions import KINDS, SCALE, Kind

RUN = "adapter"  #: the run's name among the models
PARTS = ("hesitation", "template")  #: keys of the sets with one kind of features
BEFORE = "before"  #: key of the main selection with the features before words of hesitation
BIAS = "bias"  #: key of the arm without any feature: the hybrid with ``b_dec``


@dataclass(frozen=True)
class ArmsConfig:
    """Settings of a study's comparison: sets of features, interventions, random controls.

    Args:
        tops: numbers of most promoted tokens that count, one selection each. The first selection
            is the main one; its two kinds of features are also studied separately.
        share: least fraction of a template feature's strongest examples at one position of the
            template.
        times: sizes of the random sets, as multiples of the selected set's size.
        draws: number of random sets of each size.
        scales: scales of the main selection's transfer; -0.5 is measured for every set.
        parts: interventions that are measured with each kind of features alone. Removal of a kind
            has random controls, too.
        before: whether features before words of hesitation are removed together with the main
            selection (arXiv 2602.20904, footnote 6).

    Raises:
        UserError: a value is out of range.
    """

    tops: tuple[int, ...] = (1, 10)
    share: float = 0.8
    times: tuple[int, ...] = (1, 10)
    draws: int = 3
    scales: tuple[float, ...] = (-0.25, -0.5, -0.75, -1.0)
    parts: tuple[Kind, ...] = KINDS
    before: bool = False

    def __post_init__(self) -> None:
        for name in ("tops", "times"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise UserError(
                    f"study.{name}: expected one or more distinct numbers above 0, got {values}"
                )
        if not 0 < self.share <= 1:
            raise UserError(f"study.share: expected more than 0, at most 1, got {self.share}")
        if self.draws < 1:
            raise UserError(f"study.draws: expected 1 or more, got {self.draws}")


#: What arXiv 2602.20904 compares: the ten most promoted tokens, a random set of ten times the size,
#: each kind of features added alone, and the removal of the features before hesitation.
PAPER = ArmsConfig(
    tops=(10,), times=(10,), draws=1, scales=(-0.5, -1.0), parts=("only",), before=True
)


@dataclass(frozen=True)
class StudyConfig:
    """Settings of a study.

    Args:
        study: what is compared.
        benchmarks: questions; the pair's benchmarks if none is named. ``sampling`` below and the
            run's family replace its ``sampling`` and ``family``.
        sampling: sampling of the responses.
        statistics: settings of the intervals.
    """

    study: ArmsConfig = field(default_factory=ArmsConfig)
    benchmarks: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    statistics: BootstrapConfig = field(default_factory=BootstrapConfig)


@dataclass(frozen=True)
class Arm:
    """One model with one intervention.

    Attributes:
        model: the model: ``target``, ``hybrid`` or the run.
        kind: the intervention; None for the unchanged model.
        selection: key of the selected set.
        times: size of a random set as a multiple of the selected set's; 0 for the selected set.
        seed: seed of a random set.
        scale: scale of a transfer.
        features: the set of features.
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
        """Key of the arm's group: all random draws of one size form a group."""
        return self.model, self.kind, self.selection, self.times, self.scale

    @property
    def name(self) -> str:
        """Name of the arm's folder."""
        if self.kind is None:
            return self.model
        draw = f"-random{self.times}x-{self.seed}" if self.times else ""
        scale = "" if self.scale is None else f"{self.scale:+g}"
        return f"{self.kind}{scale}-{self.selection}{draw}"


def select(store: Store, config: StudyConfig) -> dict[str, FeatureSet]:
    """Return the selected sets by key, with descriptive names, the main selection first.

    Raises:
        UserError: a set is empty.
    """
    template, living = on_template(store, config.study.share), alive(store)
    words = config.benchmarks.hesitation_words
    hesitation = {top: promoting(store, words, top) for top in config.study.tops}
    sets = {
        f"top{top}": replace(features | template, name=f"hesitation (top {top}) + template")
        for top, features in hesitation.items()
    }
    main = config.study.tops[0]
    sets["hesitation"] = replace(hesitation[main], name=f"hesitation (top {main}) alone")
    sets["template"] = replace(template, name="template alone")
    if config.study.before:
        preceded = preceding(store, words, config.study.share)
        name = f"hesitation (top {main}) + template + before hesitation"
        sets[BEFORE] = replace(sets[f"top{main}"] | preceded, name=name)
    return {key: replace(s & living, name=s.name).not_empty() for key, s in sets.items()}


def arms_of(
    store: Store, sets: Mapping[str, FeatureSet], config: StudyConfig, *, transfer: bool = True
) -> list[Arm]:
    """Return all arms, the unchanged models first, then the hybrid with ``b_dec`` alone.

    Args:
        store: the store of the run's features.
        sets: the selected sets, see :func:`select`.
        config: settings of the study.
        transfer: whether features are added to the target, too.
    """
    nothing = replace(next(iter(sets.values())), features=(), expression="no feature", name="")
    unchanged = [Arm(model) for model in ("target", "hybrid", RUN)]
    bias = Arm(RUN, "only", BIAS, features=nothing)
    changed = _changed(store, sets, config)
    return [*unchanged, bias, *(a for a in changed if transfer or a.kind != "onto-target")]


def _changed(store: Store, sets: Mapping[str, FeatureSet], config: StudyConfig) -> Iterator[Arm]:
    living, main = alive(store), next(iter(sets))
    for key, features in sets.items():
        times = () if key == BEFORE else config.study.times
        draws = {
            (n, seed): matched(store, features, n, seed)
            for n in _sizes(len(features), len(living - features), times)
            for seed in range(config.study.draws)
        }
        for kind in _kinds(key, config.study):
            onto = kind == "onto-target"
            model = "target" if onto else RUN
            scales = dict.fromkeys((*config.study.scales, SCALE)) if key == main else (SCALE,)
            for scale in scales if onto else (None,):
                yield Arm(model, kind, key, scale=scale, features=features)
            # Sets with one kind of features have random controls for removal only.
            controls = draws if kind == "ablate" or key not in PARTS else {}
            for (n, seed), others in controls.items():
                yield Arm(model, kind, key, n, seed, SCALE if onto else None, others)


def _kinds(key: str, config: ArmsConfig) -> tuple[Kind, ...]:
    """Return the interventions on a set."""
    if key == BEFORE:
        return ("ablate",)
    return config.parts if key in PARTS else KINDS


def _sizes(size: int, others: int, times: tuple[int, ...]) -> list[int]:
    """Return the sizes of random sets, as multiples of a set of ``size`` features.

    Multiples above 1 use at most half of the ``others`` features, since larger draws would mostly
    share their features.
    """
    most = max(others // 2 // size, min(1, others // size))
    return list(dict.fromkeys(min(n, most) for n in times if most))
