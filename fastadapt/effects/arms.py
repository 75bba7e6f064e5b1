"""The models of a comparison of interventions: the pair, the run, and changes of sets of features.

==================  =========================================  =========
kind                model                                      reference
==================  =========================================  =========
target, base        the models of the pair
hybrid              the target with the base's MLPs
adapter             the run: the hybrid with the adapter
bias                the hybrid with the adapter's ``b_dec``
ablate              the adapter without a set                  adapter
only                the hybrid with a set, and with ``b_dec``  bias
scale               the adapter with a set scaled              adapter
onto-target         the target with a set added, scaled        target
==================  =========================================  =========

Each kind of change has a control: the same change of random features of matched density.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastadapt.adapter.files import adapter_digest
from fastadapt.effects.requests import RUN, factors_of
from fastadapt.effects.trace import ADAPTER
from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.measure import Reader
from fastadapt.evaluation.contrast.result import ModelKind
from fastadapt.features.loading import RunContents
from fastadapt.features.store.selection import density_shares, matched
from fastadapt.features.store.sets import FeatureSet, Pair
from fastadapt.interventions import scale_features

BIAS = "bias"  # name of the model with no feature


@dataclass(frozen=True)
class Arm:
    """One model of the comparison, or several with random features that are pooled.

    Attributes:
        name: name of the model.
        kind: see the table above.
        readers: the model, or one model per draw of random features.
        reference: name of the model that it is compared with.
        set_name: the set of features that is changed, or that random features are drawn like.
        features: number of features of the set.
        random: whether random features are changed.
        factor: factor of the features.
        members: the features that are changed, one set per reader.
        densities: density of each random set as a share of the set's, see
            :func:`fastadapt.features.store.selection.density_shares`.
    """

    name: str
    kind: ModelKind
    readers: tuple[Reader, ...]
    reference: str | None = None
    set_name: str | None = None
    features: int | None = None
    random: bool = False
    factor: float | None = None
    members: tuple[FeatureSet, ...] = ()
    densities: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class _Change:
    """An intervention: its kind, the factor of the features, and the model to compare with."""

    kind: ModelKind
    factor: float
    reference: str

    def name(self, features: str) -> str:
        """Return the name of the model in which ``features`` are changed."""
        if self.kind == "scale":
            return f"{features} × {self.factor:g}"
        if self.kind == "onto-target":
            return f"target + {features} × {self.factor:g}"
        return f"{self.kind} {features}"


@contextmanager
def _changed(
    run: RunContents, features: FeatureSet, factor: float, onto: Literal["base", "target"]
) -> Iterator[Any]:
    # The features are scaled second: a run's adapters are set when its model is entered.
    with (
        run.models.generating(RUN) as model,
        scale_features(run.model, features, factor, onto=onto),
    ):
        yield model


def arms_of(
    run: RunContents,
    sets: Sequence[str],
    *,
    base: bool,
    factors: Sequence[float],
    scales: Sequence[float],
    draws: int,
) -> list[Arm]:
    """Return the models of a comparison, those without an intervention first.

    Args:
        run: the run.
        sets: sets of features, as in :func:`fastadapt.effects.requests.factors_of`.
        base: whether the base is one of the models.
        factors: factors of each set in the adapter, beside 0.
        scales: factors of each set on the target.
        draws: number of random sets of matched density for each set and change.

    Raises:
        UserError: the run has no features, a set does not exist, is empty or is of other adapters,
            or random sets are drawn and no features were collected.
    """
    source = _Source(run)
    arms = [source.unchanged("target", "target")]
    arms += [source.unchanged("base", "base")] * base
    arms += [source.unchanged("hybrid", "hybrid"), source.unchanged(ADAPTER, "adapter")]
    if run.model.n_features:
        reader = source.reader(_Change("only", 0.0, BIAS), source.feature_set({}, BIAS))
        arms.append(Arm(BIAS, "bias", (reader,), features=0))
    elif sets:
        raise UserError("features: this run trained no transcoders, so it has no features")
    changes = [_Change("ablate", 0.0, ADAPTER), _Change("only", 0.0, BIAS)]
    changes += [_Change("scale", factor, ADAPTER) for factor in factors]
    changes += [_Change("onto-target", scale, "target") for scale in scales]
    for name in sets:
        features = source.feature_set(factors_of(run, (name,)), name)
        groups: dict[str, tuple[list[FeatureSet], list[float | None]]] = {name: ([features], [])}
        if draws:
            groups[f"random like {name}"] = source.drawn(features, draws)
        for change in changes:
            for label, (members, densities) in groups.items():
                arms.append(
                    Arm(
                        change.name(label),
                        change.kind,
                        tuple(source.reader(change, each) for each in members),
                        change.reference,
                        name,
                        len(features),
                        label != name,
                        change.factor,
                        tuple(members),
                        tuple(densities),
                    )
                )
    return arms


class _Source:
    """The run whose features are changed; its files are hashed once."""

    def __init__(self, run: RunContents) -> None:
        self._run = run
        #: The models of the pair depend on the same files.
        self._sha256 = {RUN: run.models.fingerprint(RUN), "": run.models.fingerprint("target")}
        self._adapter = adapter_digest(run.models.folder(RUN))

    def unchanged(self, name: str, kind: ModelKind) -> Arm:
        """Return the arm of an unchanged model: one of the pair, or the run's replacement model."""
        model = RUN if name == ADAPTER else name
        sha256 = self._sha256[RUN if model == RUN else ""]
        opened = partial(self._run.models.generating, model)
        return Arm(name, kind, (Reader(name, f"{name} {sha256}", opened),))

    def feature_set(self, pairs: Iterable[Pair], name: str) -> FeatureSet:
        """Return the features ``pairs`` of the run's adapter as a :class:`FeatureSet`."""
        shape = (self._run.model.n_layers, self._run.model.n_features)
        return FeatureSet.from_pairs(pairs, adapter=self._adapter, shape=shape, expression=name)

    def drawn(
        self, features: FeatureSet, draws: int
    ) -> tuple[list[FeatureSet], list[float | None]]:
        """Draw random sets of matching density outside ``features``; also return their density as
        a share of that of ``features``."""
        store = self._run.store
        if store is None:
            raise UserError(
                "random sets are drawn from collected features: run fastadapt features collect "
                "first, or pass --draws 0"
            )
        sets = [matched(store, features, 1, seed) for seed in range(draws)]
        return sets, density_shares(store, features, sets)

    def reader(self, change: _Change, features: FeatureSet) -> Reader:
        """Return a reader of the model in which ``features`` are changed."""
        changed = ~features if change.kind == "only" else features
        onto: Literal["base", "target"] = "target" if change.kind == "onto-target" else "base"
        facts = (self._sha256[RUN], change.kind, change.factor, features.digest())
        digest = hashlib.sha256(repr(facts).encode()).hexdigest()
        opened = partial(_changed, self._run, changed, change.factor, onto)
        return Reader(f"{change.kind}-{digest[:16]}", digest, opened)
