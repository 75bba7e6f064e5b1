"""Contrast models and interventions: P(word) at labelled positions against matched positions.

Texts are read, not sampled. On the embedded pair's data the labelled places are the ends of slips,
and the matched places are the ends of the other steps. On other texts they are the places before a
word of the set, and places of equal entropy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from threading import Event
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastadapt.data.sequences import DataConfig
from fastadapt.data.tokens import check_ids
from fastadapt.effects.activity import activity_of
from fastadapt.effects.arms import BIAS, Arm, arms_of
from fastadapt.effects.requests import RUN
from fastadapt.effects.trace import ADAPTER
from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.gating import gate_effects
from fastadapt.evaluation.contrast.measure import Quantity, Reader, entropy_of, log_odds_of, read
from fastadapt.evaluation.contrast.places import (
    Place,
    Site,
    WordSites,
    matched_places,
    rows_of,
    sites_of,
    slip_places,
    word_sites,
)
from fastadapt.evaluation.contrast.recognition import recognise
from fastadapt.evaluation.contrast.report import contrast_figures, contrast_tables
from fastadapt.evaluation.contrast.result import SCHEMA_VERSION, ContrastFile, Source
from fastadapt.evaluation.contrast.summary import Contrast, groups_of, kinds_of, summarise
from fastadapt.evaluation.contrast.unions import Union, interactions
from fastadapt.evaluation.difference.texts import held_out_texts, left_out
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.folder import LOCK, clear, present
from fastadapt.evaluation.generation.responses import read_responses
from fastadapt.evaluation.statistics import BootstrapConfig, ratio
from fastadapt.features.loading import RunContents
from fastadapt.features.store.logit_lens import token_strings
from fastadapt.features.store.sets import FeatureSet
from fastadapt.interventions import SCALE
from fastadapt.io.documents import check
from fastadapt.io.names import has_file, typed_path
from fastadapt.organism import NAMES
from fastadapt.training.config import load_data
from fastadapt.training.run_dir import CONFIG

RESULT = "contrast.json"
#: All entries that the folder may have.
CONTENTS = (LOCK, "read", RESULT, "tables.md", "tables.tex", "plots", "report.html")
#: Progress callback: label, completed, total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ContrastConfig:
    """Settings of a contrast: words, positions and interventions.

    Args:
        words: the set of words. All tokens that equal a word, stripped and in lower case, belong to
            it.
        features: sets of features for interventions: sets of the run, their files, or features
            such as 2/17,3/401.
        places: slips, the ends of slips in the embedded pair's data; words, the places before a
            word of the set; or auto: slips on the embedded pair's data, else words.
        n: largest number of texts, from the start of the data.
        draws: random sets of matched density, for each set and intervention.
        scales: factors of the sets that are added to the target.
        factors: factors of the sets in the adapter, beside 0, which is ablation.
        entropy: with places words: the model, target or hybrid, whose entropy is equal at labelled
            and matched places.
        caliper: largest difference of entropy of a match within a text, in nats; a place without
            such a match gets the nearest of all texts.
        seed: seed of the matching.
        batch_tokens: tokens of a batch, padding included. A longer text is a separate batch.

    Raises:
        UserError: a value is out of range.
    """

    words: tuple[str, ...] = ("wait",)
    features: tuple[str, ...] = ()
    places: Literal["auto", "slips", "words"] = "auto"
    n: int = 500
    draws: int = 3
    scales: tuple[float, ...] = (SCALE,)
    factors: tuple[float, ...] = ()
    entropy: Literal["target", "hybrid"] = "target"
    caliper: float = 0.1
    seed: int = 0
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("draws", 0), ("caliper", 0), ("batch_tokens", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        plain = list(map(_plain, self.words))
        if not plain or not all(plain) or len(set(plain)) < len(plain):
            raise UserError(
                f"words: expected one or more different words, none blank, got {list(self.words)}"
            )
        for name in ("features", "scales", "factors"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}: expected different values, got {list(values)}")


def contrast(
    run: RunContents,
    folder: Path,
    config: ContrastConfig,
    statistics: BootstrapConfig,
    *,
    responses: str | None = None,
    overwrite: bool = False,
    progress: Progress,
    stop: Event,
) -> dict[str, Any] | None:
    """Measure the contrast of all models; write ``contrast.json``, tables, plots and a page.

    Args:
        run: the run.
        folder: folder of the results, claimed by :func:`fastadapt.evaluation.folder.opened` with
            :data:`CONTENTS`.
        config: words, places and interventions.
        statistics: settings of the intervals.
        responses: file of the target's responses to read; None: the run's held-out data.
        overwrite: remove the contents of the folder, once texts, words and sets are read.
        progress: called with (label, completed, total).
        stop: set it to stop after the current batch.

    Returns:
        The contents of ``contrast.json``; None if stopped before all models were read.

    Raises:
        UserError: a word is no token, no place is labelled, a set does not exist or is of other
            adapters, the texts are missing, or a stored file is damaged.
        RunError: a prediction is not finite, or the folder cannot be written.
    """
    strings = token_strings(run.pair.tokenizer, len(run.model.head))
    words = tokens_of(strings, config.words)
    texts = _texts(run, config.n, responses)
    ids = [i for each in (*(text.ids for text in texts), *words.values()) for i in each]
    scales, obstacle = config.scales, run.models.compared[RUN].transfer_obstacle
    if config.features and scales and obstacle is not None:
        scales, run.models.notes["onto-target"] = (), obstacle
    arms = arms_of(
        run,
        config.features,
        base=run.models.reads_base(ids),
        factors=config.factors,
        scales=scales,
        draws=config.draws,
    )
    source = _source(run, responses) if config.places == "auto" else config.places
    of_words = {i: word for word, each in words.items() for i in each}
    positions = slip_places(texts, strings) if source == "slips" else word_sites(texts, of_words)
    if overwrite:
        clear(folder)
    reading = _Reading(run, texts, folder / "read", config.batch_tokens, progress, stop)
    labelled = _labelled(reading, arms, positions, config)
    if labelled is None:
        return None
    sets = [[i for each in words.values() for i in each]]
    quantity = log_odds_of([*sets, *words.values()] if len(words) > 1 else sets, reading.decoder)
    odds = {}
    for number, arm in enumerate(arms, 1):
        draws = []
        for reader in arm.readers:
            label = f"{number} of {len(arms)}, {arm.name}"
            values = reading(reader, labelled.sites, quantity, label)
            if values is None:
                return None
            draws.append(values)
        odds[arm.name] = torch.stack(draws)
    activity = _activity(reading, arms, labelled.sites)
    if activity is None:
        return None
    result = {
        "schema_version": SCHEMA_VERSION,
        "pair": run.models.config.named,
        "run": str(run.models.compared[RUN].run),
        "settings": {
            **dataclasses.asdict(config),
            "responses": responses,
            "statistics": dataclasses.asdict(statistics),
        },
        "level": statistics.level,
        "versions": {name: version(name) for name in ("fastadapt", "torch", "transformers")},
        "words": {word: [strings[i] for i in each] for word, each in words.items()},
        "places": _describe(labelled, source, texts, config.entropy, statistics),
        "notes": list(run.models.notes.values()),
        "models": _models(arms, odds, labelled, len(texts), list(words), statistics),
        "recognition": _recognition(arms, activity, labelled, len(texts), statistics),
        "interactions": _interactions(arms, odds, labelled, len(texts), statistics),
    }
    check(result, ContrastFile, RESULT)
    tables, figures = contrast_tables(result), contrast_figures(result)
    present(result, tables, figures, folder, "contrast", RESULT)
    return result


def tokens_of(strings: Sequence[str], words: Sequence[str]) -> dict[str, list[int]]:
    """Return the ids of the tokens that equal each word, stripped and in lower case.

    Args:
        strings: the text of every token id.
        words: the words.

    Raises:
        UserError: a word is no token.

    Example:
        >>> tokens_of(["wait", " Wait", "waiting"], ["wait"])
        {'wait': [0, 1]}
    """
    ids: dict[str, list[int]] = {_plain(word): [] for word in words}
    for i, string in enumerate(strings):
        if (plain := _plain(string)) in ids:
            ids[plain].append(i)
    if missing := [word for word, each in ids.items() if not each]:
        raise UserError(
            f"words: expected words that are one token of the pair's tokenizer, got "
            f"{', '.join(map(repr, missing))}; give others (--words)"
        )
    return ids


def _plain(word: str) -> str:
    return word.strip().lower()


# --- texts and places -----------------------------------------------------------------------------


def _source(run: RunContents, responses: str | None) -> Source:
    """Return the default source of labels: slips for an embedded pair's own data, else words."""
    data = _data(run)
    generated = data is not None and data.validation in NAMES
    return "slips" if generated and responses is None else "words"


def _data(run: RunContents) -> DataConfig | None:
    """Return the settings of a run's data, or of an intervention's; None for adapters alone."""
    if run.config is not None:
        return run.config.data
    path = Path(str(run.models.compared[RUN].run)) / CONFIG
    return load_data(path) if has_file(path) else None


def _texts(run: RunContents, n: int, responses: str | None) -> list[Text]:
    """Return the first responses of a file with their prompts, or the run's held-out data."""
    n_rows, context = len(run.model.head), run.model.model.config.max_position_embeddings
    if responses is None:
        data = _data(run)
        if data is None:
            raise UserError(
                "this folder of adapters records no held-out data; give texts (--responses FILE)"
            )
        # The bound of the validation during training does not count: --n is the bound here.
        data = dataclasses.replace(data, max_validation=None)
        texts, counts = held_out_texts(data, run.pair.tokenizer, n, n_rows, context)
        if reasons := left_out(counts, context, data.max_tokens):
            run.models.notes["texts"] = " ".join(f"{r[0].upper()}{r[1:]}." for r in reasons)
        return texts
    texts = []
    for each in read_responses(typed_path(responses, "--responses"))[:n]:
        ids = [*each.prompt_tokens, *each.tokens[: each.scored_tokens]]
        text = Text(f"{each.id}/{each.repetition}", ids, len(each.prompt_tokens))
        check_ids(ids, n_rows, f"{responses}, response {text.id}")
        if len(ids) > context:
            raise UserError(
                f"{responses}, response {text.id}: expected at most {context:,} tokens, the "
                f"target's context, got {len(ids):,}"
            )
        texts.append(text)
    return texts


@dataclass(frozen=True)
class _Reading:
    """Computes quantities of models at positions of the texts, and stores them."""

    run: RunContents
    texts: list[Text]
    folder: Path
    batch_tokens: int
    progress: Progress
    stop: Event

    @property
    def decoder(self) -> str:
        """Name of the decoder of the pair's models."""
        return self.run.model.paths.decoder

    def __call__(
        self, reader: Reader, sites: Sequence[Site], quantity: Quantity, label: str
    ) -> Tensor | None:
        return read(
            reader,
            self.texts,
            sites,
            quantity,
            self.folder,
            batch_tokens=self.batch_tokens,
            progress=partial(self.progress, label),
            stop=self.stop,
        )


class _Labelled(NamedTuple):
    """Labelled positions, all positions to read, their entropy, and the number of matches within
    a text."""

    places: list[Place]
    sites: list[Site]
    entropy: dict[Site, float]
    same_text: int


def _labelled(
    reading: _Reading,
    arms: Sequence[Arm],
    positions: list[Place] | WordSites,
    config: ContrastConfig,
) -> _Labelled | None:
    """Return the labelled positions with their matched positions; None if stopped."""
    (reader,) = next(arm.readers for arm in arms if arm.name == config.entropy)
    label, quantity = f"entropy of the {config.entropy}", entropy_of(reading.decoder)
    if not isinstance(positions, WordSites):
        sites = sites_of(positions)
        entropy = reading(reader, sites, quantity, label)
        if entropy is None:
            return None
        n_matched = sum(len(place.matched) for place in positions)
        return _Labelled(positions, sites, _by_site(sites, entropy), n_matched)
    sites = sorted([*(site for site, _ in positions.before), *positions.others])
    entropy = reading(reader, sites, quantity, label)
    if entropy is None:
        return None
    by_site = _by_site(sites, entropy)
    places, same_text = matched_places(positions, by_site, caliper=config.caliper, seed=config.seed)
    return _Labelled(places, sites_of(places), by_site, same_text)


def _by_site(sites: Sequence[Site], values: Tensor) -> dict[Site, float]:
    return dict(zip(sites, values[:, 0].tolist(), strict=True))


def _activity(
    reading: _Reading, arms: Sequence[Arm], sites: Sequence[Site]
) -> dict[str, Tensor] | None:
    """Return the activity ``[draws, S]`` of each removed set in the adapter; None if stopped."""
    removed = [arm for arm in arms if arm.kind == "ablate"]
    if not removed:
        return {}
    (reader,) = next(arm.readers for arm in arms if arm.name == ADAPTER)
    quantity = activity_of(reading.run.model, [s for arm in removed for s in arm.members])
    values = reading(reader, sites, quantity, "activity of the sets")
    if values is None:
        return None
    parts = values.T.split([len(arm.members) for arm in removed])
    return {arm.name: part for arm, part in zip(removed, parts, strict=True)}


# --- contents of contrast.json --------------------------------------------------------------------


def _describe(
    labelled: _Labelled,
    source: Source,
    texts: Sequence[Text],
    entropy_of: str,
    statistics: BootstrapConfig,
) -> dict[str, Any]:
    """Return the section ``places`` of ``contrast.json``."""
    places, entropy = labelled.places, labelled.entropy
    sums = torch.zeros(3, len(texts), dtype=torch.float64)
    for place in places:
        nats = entropy[place.site]
        others = sum(entropy[site] for site in place.matched) / len(place.matched)
        sums[:, place.site[0]] += torch.tensor([1, nats, others], dtype=torch.float64)
    counts, *nats_of = sums
    both = torch.stack([*nats_of, nats_of[0] - nats_of[1]])
    intervals = ratio(both, counts, config=statistics).plain()
    return {
        "source": source,
        "texts": len(texts),
        "texts_with_places": int((counts > 0).sum()),
        "labelled": {
            kind: sum(kind in groups_of(place) for place in places) for kind in kinds_of(places)
        },
        "matched": sum(len(place.matched) for place in places),
        "same_text": labelled.same_text,
        "entropy": {
            "model": entropy_of,
            **dict(zip(("labelled", "matched", "difference"), intervals, strict=True)),
        },
    }


def _models(
    arms: Sequence[Arm],
    odds: Mapping[str, Tensor],
    labelled: _Labelled,
    n_texts: int,
    words: Sequence[str],
    statistics: BootstrapConfig,
) -> list[dict[str, Any]]:
    """Return the section ``models`` of ``contrast.json``."""
    rows = rows_of(labelled.places, labelled.sites)
    contrasts = {name: Contrast.of_draws(draws, rows) for name, draws in odds.items()}
    references = {arm.name: arm.reference for arm in arms if arm.reference is not None}
    summary = summarise(contrasts, references, labelled.places, rows, n_texts, words, statistics)
    gated = gate_effects(contrasts, references, labelled.places, rows, n_texts, statistics)
    listed = []
    for arm in arms:
        drawn = odds[arm.name][:, rows.labelled, 0].sigmoid().mean(1).tolist()
        listed.append(
            {
                "name": arm.name,
                "kind": arm.kind,
                "set": arm.set_name,
                "random": arm.random,
                "features": arm.features,
                "factor": arm.factor,
                "reference": arm.reference,
                "draws": drawn if arm.random else [],
                **({"densities": list(arm.densities)} if arm.random else {}),
                **summary[arm.name],
                **({"gate": gated[arm.name]} if gated else {}),
            }
        )
    return listed


def _recognition(
    arms: Sequence[Arm],
    activity: Mapping[str, Tensor],
    labelled: _Labelled,
    n_texts: int,
    statistics: BootstrapConfig,
) -> list[dict[str, Any]]:
    """Return the section ``recognition``."""
    rows = rows_of(labelled.places, labelled.sites)
    numbers = recognise(activity, labelled.places, rows, labelled.sites, n_texts, statistics)
    return [
        {
            "set": arm.set_name,
            "random": arm.random,
            "features": arm.features,
            "kinds": numbers[arm.name],
        }
        for arm in arms
        if arm.name in numbers
    ]


def _interactions(
    arms: Sequence[Arm],
    odds: Mapping[str, Tensor],
    labelled: _Labelled,
    n_texts: int,
    statistics: BootstrapConfig,
) -> list[dict[str, Any]]:
    """Return the section ``interactions``: of each set that is the union of others."""
    alone = {arm.name: arm for arm in arms if arm.kind == "only" and not arm.random}
    unions = unions_of({name: arm.members[0] for name, arm in alone.items()})
    if not unions:
        return []
    rows = rows_of(labelled.places, labelled.sites)
    names = {"target", "hybrid", BIAS, *alone}
    contrasts = {name: Contrast.of_draws(odds[name], rows) for name in names}
    intervals = interactions(contrasts, unions, BIAS, rows, n_texts, statistics)
    return [
        {
            "set": alone[union.whole].set_name,
            "parts": [alone[part].set_name for part in union.parts],
            "interaction": interval,
        }
        for union, interval in zip(unions, intervals, strict=True)
    ]


def unions_of(sets: Mapping[str, FeatureSet]) -> list[Union]:
    """Return the sets that are the union of two smaller ones.

    Example:
        >>> make = partial(FeatureSet.from_pairs, adapter="", shape=(2, 9), expression="")
        >>> unions_of({"ab": make([(0, 1), (1, 2)]), "a": make([(0, 1)]), "b": make([(1, 2)])})
        [Union(whole='ab', parts=('a', 'b'))]
    """
    pairs = {name: frozenset(features) for name, features in sets.items()}
    return [
        Union(whole, (a, b))
        for whole in pairs
        for a, b in combinations([name for name in pairs if name != whole], 2)
        if pairs[a] < pairs[whole] > pairs[b] and pairs[a] | pairs[b] == pairs[whole]
    ]
