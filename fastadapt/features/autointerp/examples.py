"""Selection of units (features or neurons), of examples for the describer, and of scored texts.

The describer sees examples of a unit from the store. The description is scored on *held-out*
windows, on which the unit fires, and on *negatives*, on which it is silent. Rules of the selection:

- Held-out windows of a unit share no position of a text, and no equal tokens, with shown windows or
  with each other.
- Held-out and shown windows come from the same sample, so that they are equally strong.
- Negatives are drawn uniformly from all windows of the sampled texts in which the model itself
  (:class:`Activations`) has no active position of the unit, and which overlap or repeat no shown or
  held-out window.
- Each negative has the length of one held-out window, so that length carries no information.
- Each negative contains the start of its text, or the end, exactly if that held-out window does:
  held-out windows are cut off at the ends of texts, and contain a token that begins every text more
  often than random windows. A unit without such a negative for each held-out window is counted and
  not judged.
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

_MIN_AGREEMENT = 0.9  # share of examples; rounding differs by batch near 0 in bfloat16
#: Reasons why a unit is not judged; keys of ``judgements.json``.
REASONS = ("too rare", "too few examples", "no silent text")


class NothingToJudgeError(UserError):
    """No unit of a store has examples enough to be judged."""


@dataclass(frozen=True)
class DetectionCase:
    """A feature or neuron to judge, examples of one sample to show, and shuffled texts to score."""

    unit: Unit
    sample: SampleKind
    shown: tuple[Window, ...]
    texts: tuple[Window, ...]

    @property
    def truth(self) -> tuple[bool, ...]:
        """For each scored text, whether the feature or neuron fires in the text."""
        return tuple(any(window.fires) for window in self.texts)


@dataclass(frozen=True)
class Selection:
    """Cases to judge, and by kind and layer the number of units judged and left out, by reason."""

    cases: list[DetectionCase]
    counts: dict[Kind, list[dict[str, int]]]


def draw(
    store: Store,
    config: DescribeConfig,
    activations: Activations,
    *,
    progress: Progress | None = None,
    stop: Event | None = None,
) -> Selection | None:
    """Draw the units to judge, their shown examples and their scored texts.

    Args:
        store: store of features.
        config: settings of the selection.
        activations: activations of the model that the store was collected from.
        progress: called with the numbers of texts read and to read.
        stop: ends the call early.

    Returns:
        The selection; None if stopped.

    Raises:
        NothingToJudgeError: the store has no unit that can be judged.
        UserError: the store belongs to another model.
    """
    kinds = config.kinds or tuple(store.kinds)
    corpus = Corpus(store, config)
    cases: list[DetectionCase] = []
    counts: dict[Kind, list[dict[str, int]]] = {}
    for done, kind in enumerate(kinds):
        splits, counts[kind] = _splits(store, kind, config)
        by_layer: dict[int, list[int]] = {}
        for unit in splits:
            by_layer.setdefault(unit.layer, []).append(unit.feature)

        def report(n_read: int, total: int, done: int = done) -> None:
            if progress is not None:
                progress(done * total + n_read, len(kinds) * total)

        places: Places = {}
        if by_layer:
            places = activations.places(kind, corpus.tokens, by_layer, progress=report, stop=stop)
        if stop is not None and stop.is_set():
            return None
        fires = {unit: corpus.to_positions(places[unit.layer, unit.feature]) for unit in splits}
        _check_model(store, kind, splits, fires, corpus)
        for unit, split in splits.items():
            unit_cases = _cases(unit, split, fires[unit], corpus, config)
            if len(unit_cases) < len(split):
                counts[kind][unit.layer]["no silent text"] += 1
            else:
                cases += unit_cases
        for layer, count in enumerate(counts[kind]):
            count["judged"] = len({c.unit for c in cases if (c.unit[:2] == (kind, layer))})
    if not cases:
        raise NothingToJudgeError(
            f"{store.folder}: no unit of kind {', '.join(kinds)} can be judged: none is active on "
            f"{config.min_density:g} or more of the tokens with {config.min_shown + config.scored} "
            "examples or more that do not overlap, and has as many negatives; lower "
            "describe.min_density, describe.min_shown or describe.scored. Not judged: "
            f"{_describe(counts)}"
        )
    return Selection(cases, counts)


def _describe(counts: Mapping[Kind, Sequence[Mapping[str, int]]]) -> str:
    return "; ".join(
        f"{sum(count[why] for count in by_layer):,} {kind} units: {why}"
        for kind, by_layer in counts.items()
        for why in REASONS
        if any(count[why] for count in by_layer)
    )


# --- shown and held-out windows -------------------------------------------------------------------

_Split = dict[SampleKind, tuple[list[Window], list[Window]]]  # shown, held out


def _splits(
    store: Store, kind: Kind, config: DescribeConfig
) -> tuple[dict[Unit, _Split], list[dict[str, int]]]:
    """Return units with enough examples of every sample, and by layer how many are left out."""
    n_layers, _ = store.shape(kind)
    splits: dict[Unit, _Split] = {}
    counts = []
    for layer in range(n_layers):
        order, rare = eligible(store, kind, layer, config.min_density, config.seed)
        count = {**dict.fromkeys(REASONS, 0), "too rare": rare}
        taken = 0
        for first in range(0, len(order), config.units):
            chunk = order[first : first + config.units]
            examples = examples_of(store, kind, layer, chunk, config.before, config.after)
            for feature in chunk:
                if taken == config.units:
                    break
                unit = Unit(kind, layer, feature)
                split = _split(unit, examples.get(feature, {}), config)
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
    unit: Unit, examples: Mapping[SampleKind, Sequence[Window]], config: DescribeConfig
) -> _Split | None:
    """Split each sample of a unit's examples into shown and held-out; None if there are too few."""
    split: _Split = {}
    for sample in config.samples:
        windows = examples.get(sample, [])
        rng = _rng(config.seed, unit, sample, 0)
        scored: list[Window] = []
        order = rng.permutation(len(windows))
        for i in order:
            if len(scored) < config.scored and not any(windows[i].overlaps(s) for s in scored):
                scored.append(windows[i])
        unscored = [windows[i] for i in order if not any(windows[i].overlaps(s) for s in scored)]
        if len(scored) < config.scored or len(unscored) < config.min_shown:
            return None
        shown = sorted(unscored[: config.shown], key=lambda window: window.rank)
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
    """Raise ``UserError`` if units do not fire at the store's examples of them in this model."""
    agrees = [
        bool(np.isin(positions, fires[unit]).any())
        for unit, split in splits.items()
        for shown, scored in split.values()
        for positions in corpus.positions_of([*shown, *scored])
    ]
    if sum(agrees) < _MIN_AGREEMENT * len(agrees):
        raise UserError(
            f"{store.folder}: this is not the model that its features were collected from: of "
            f"{len(agrees):,} examples of {kind} units, {sum(agrees):,} fire; collect the features "
            "again"
        )


def _cases(
    unit: Unit, split: _Split, fires: np.ndarray, corpus: Corpus, config: DescribeConfig
) -> list[DetectionCase]:
    """Return a case for each sample; fewer if a held-out window has no negative."""
    cases: list[DetectionCase] = []
    for sample, (shown, scored) in split.items():
        rng = _rng(config.seed, unit, sample, 1)
        active = np.concatenate([fires, *corpus.positions_of([*shown, *scored])])
        texts = list(scored)
        for window in scored:
            excluded = np.concatenate([active, *corpus.positions_of(texts[len(scored) :])])
            free = corpus.sample_negatives(excluded, window, rng)
            negative = next(
                (w for w in free if not any(w.overlaps(o) for o in (*shown, *texts))), None
            )
            if negative is None:
                return cases
            texts.append(negative)
        shuffled = tuple(texts[i] for i in rng.permutation(len(texts)))
        cases.append(DetectionCase(unit, sample, tuple(shown), shuffled))
    return cases
