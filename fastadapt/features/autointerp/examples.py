"""Which units are judged, what the describer sees of each, and which texts are scored.

A unit that a judge describes is shown some of the examples that the store has of it. The
description is then scored on other texts: *held out* ones, on which the unit fires, and *silent*
ones, on which it does not. What makes the score honest:

- no held-out window shares a token of a text with one that was shown, or repeats its tokens, nor
  do two held-out ones of a unit;
- held-out and shown examples are drawn from the same sample, so one is as strong as the other;
- a silent window is drawn with equal chance from all stretches of the corpus' sampled texts in
  which the unit is active at no token, as the model itself says (:class:`Activations`), and which
  neither share a token with a window that was shown or held out nor repeat its tokens;
- each silent window is as long as a held-out one, so that length tells nothing;
- and it touches the start of its text, or the end, exactly where that one does, so that what texts
  begin and end with tells nothing: held-out windows are cut off there, and have a token that begins
  every text far more often than stretches drawn without regard to it. A unit without such a silent
  window for each held-out one is not judged, and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np

from fastadapt.errors import UserError
from fastadapt.features.autointerp.activations import Activations, Places
from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.negatives import Corpus
from fastadapt.features.autointerp.questions import Progress
from fastadapt.features.autointerp.units import Unit, Window, eligible, examples_of
from fastadapt.features.store.schema import KINDS, SAMPLES, Kind, SampleKind
from fastadapt.features.store.store import Store

_AGREE = 0.9  # of examples; other batches round otherwise, which moves those near 0 in bfloat16
#: Why a unit is not judged.
REASONS = ("too rare", "too few examples", "no silent text")


@dataclass(frozen=True)
class Case:
    """A unit as one sample of its examples shows it; ``texts`` are the scored ones, shuffled."""

    unit: Unit
    sample: SampleKind
    shown: tuple[Window, ...]
    texts: tuple[Window, ...]

    @property
    def truth(self) -> tuple[bool, ...]:
        """For each scored text, whether the unit fires there."""
        return tuple(any(window.fires) for window in self.texts)


@dataclass(frozen=True)
class Drawn:
    """The cases of all kinds; by kind and layer, how many units are judged, or why they are not."""

    cases: list[Case]
    counts: dict[Kind, list[dict[str, int]]]


def draw(
    store: Store,
    config: DescribeConfig,
    activations: Activations,
    *,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> Drawn | None:
    """The units that are judged, what is shown of each, and what is scored.

    Args:
        store: of features.
        config: of the draw.
        activations: of the model that the store was collected from.
        progress: told of the texts that the model has read, of those that it will.
        stop: ends the call early.

    Returns:
        None if stopped.

    Raises:
        UserError: the store has no unit that can be judged.
    """
    kinds = config.kinds or tuple(store.kinds)
    corpus = Corpus(store, config)
    cases: list[Case] = []
    counts: dict[Kind, list[dict[str, int]]] = {}
    for done, kind in enumerate(kinds):
        splits, counts[kind] = _splits(store, kind, config)
        by_layer: dict[int, list[int]] = {}
        for unit in splits:
            by_layer.setdefault(unit.layer, []).append(unit.feature)

        def told(read: int, of: int, done: int = done) -> None:
            if progress is not None:
                progress(done * of + read, len(kinds) * of)

        places: Places = {}
        if by_layer:
            places = activations.places(kind, corpus.tokens, by_layer, progress=told, stop=stop)
        if stop is not None and stop.is_set():
            return None
        fires = {unit: corpus.along(places[unit.layer, unit.feature]) for unit in splits}
        _check_model(store, kind, splits, fires, corpus)
        for unit, split in splits.items():
            some = _cases(unit, split, fires[unit], corpus, config)
            if len(some) < len(split):
                counts[kind][unit.layer]["no silent text"] += 1
            else:
                cases += some
        for layer, count in enumerate(counts[kind]):
            count["judged"] = len({c.unit for c in cases if (c.unit[:2] == (kind, layer))})
    if not cases:
        raise UserError(
            f"{store.folder}: no unit to judge: none of {', '.join(kinds)} is active on at least "
            f"{config.min_density:g} of the tokens (describe.min_density) with "
            f"{config.min_shown + config.scored} examples or more that do not overlap, and silent "
            f"elsewhere; it has {_words(counts)}"
        )
    return Drawn(cases, counts)


def _words(counts: Mapping[Kind, Sequence[Mapping[str, int]]]) -> str:
    return "; ".join(
        f"{sum(count[why] for count in of_kind):,} {kind} units: {why}"
        for kind, of_kind in counts.items()
        for why in REASONS
        if any(count[why] for count in of_kind)
    )


# --- what is shown, and what is held out ----------------------------------------------------------

_Split = dict[SampleKind, tuple[list[Window], list[Window]]]  # shown, held out


def _splits(
    store: Store, kind: Kind, config: DescribeConfig
) -> tuple[dict[Unit, _Split], list[dict[str, int]]]:
    """Units with enough examples of every sample, and by layer how many were not taken and why."""
    n_layers, _ = store.shape(kind)
    splits: dict[Unit, _Split] = {}
    counts = []
    for layer in range(n_layers):
        order, rare = eligible(store, kind, layer, config.min_density, config.seed)
        count = {**dict.fromkeys(REASONS, 0), "too rare": rare}
        taken = 0
        for first in range(0, len(order), config.units):
            some = order[first : first + config.units]
            held = examples_of(store, kind, layer, some, config.before, config.after)
            for feature in some:
                if taken == config.units:
                    break
                unit = Unit(kind, layer, feature)
                split = _split(unit, held.get(feature, {}), config)
                if split is None:
                    count["too few examples"] += 1
                else:
                    splits[unit] = split
                    taken += 1
            if taken == config.units:
                break
        counts.append(count)
    return splits, counts


def _split(
    unit: Unit, held: Mapping[SampleKind, Sequence[Window]], config: DescribeConfig
) -> _Split | None:
    """Shown and held-out examples of each sample; None where there are too few."""
    split: _Split = {}
    for sample in config.samples:
        windows = held.get(sample, [])
        rng = _rng(config.seed, unit, sample, 0)
        scored: list[Window] = []
        order = rng.permutation(len(windows))
        for i in order:
            if len(scored) < config.scored and not any(windows[i].meets(s) for s in scored):
                scored.append(windows[i])
        rest = [windows[i] for i in order if not any(windows[i].meets(s) for s in scored)]
        if len(scored) < config.scored or len(rest) < config.min_shown:
            return None
        shown = sorted(rest[: config.shown], key=lambda window: window.rank)
        split[sample] = shown, scored
    return split


def _rng(seed: int, unit: Unit, sample: SampleKind, use: int) -> np.random.Generator:
    place = [KINDS.index(unit.kind), unit.layer, unit.feature, SAMPLES.index(sample)]
    return np.random.default_rng([seed, *place, use])


def _check_model(
    store: Store,
    kind: Kind,
    splits: Mapping[Unit, _Split],
    fires: Mapping[Unit, np.ndarray],
    corpus: Corpus,
) -> None:
    """Refuse a model that is silent where the store has kept that its units fire."""
    told = [
        bool(np.isin(taken, fires[unit]).any())
        for unit, split in splits.items()
        for shown, scored in split.values()
        for taken in corpus.taken([*shown, *scored])
    ]
    if sum(told) < _AGREE * len(told):
        raise UserError(
            f"{store.folder}: this is not the model that its features were collected from: of "
            f"{len(told):,} examples of {kind} units, it fires on {sum(told):,}"
        )


def _cases(
    unit: Unit, split: _Split, fires: np.ndarray, corpus: Corpus, config: DescribeConfig
) -> list[Case]:
    """A case for each sample; fewer where the unit has no silent window for each held-out one."""
    cases: list[Case] = []
    for sample, (shown, scored) in split.items():
        rng = _rng(config.seed, unit, sample, 1)
        active = np.concatenate([fires, *corpus.taken([*shown, *scored])])
        texts = list(scored)
        for window in scored:
            taken = np.concatenate([active, *corpus.taken(texts[len(scored) :])])
            free = corpus.silent(taken, window, rng)
            found = next((w for w in free if not any(w.meets(o) for o in (*shown, *texts))), None)
            if found is None:
                return cases
            texts.append(found)
        shuffled = tuple(texts[i] for i in rng.permutation(len(texts)))
        cases.append(Case(unit, sample, tuple(shown), shuffled))
    return cases
