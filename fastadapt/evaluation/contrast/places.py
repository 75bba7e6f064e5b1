"""Find the positions of texts at which models are compared: labelled ones, and matched ones.

A place is the index of a token in a text, at which a model predicts the next token. Labelled places
are followed by a word of the set in a text (or, on the embedded pair, by a correction). Matched
places could carry the word as well, but do not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.evaluation.contrast.matching import Candidates, match
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.organism.slips import GATE, is_gated, step_ends

#: Index of a text, and of a token in it.
Site = tuple[int, int]


class Place(NamedTuple):
    """A labelled position with its matched positions.

    Attributes:
        site: the labelled position.
        kind: kind of the slip, or the word that the text has next.
        matched: the matched positions, one or more.
        gate: on the gated pair, whether the prompt has the marker by which slips are corrected.
    """

    site: Site
    kind: str
    matched: tuple[Site, ...]
    gate: bool | None = None


def slip_places(texts: Sequence[Text], strings: Sequence[str]) -> list[Place]:
    """Return the ends of slips in an embedded pair's texts, each with the text's right steps.

    Args:
        texts: conversations with responses of the pair's generator. A text with slips alone has
            no place.
        strings: the text of every token id.

    Raises:
        UserError: a response is not of the generator, or no response has a slip.
    """
    places = []
    has_gate = GATE in {string.strip() for string in strings}
    for t, text in enumerate(texts):
        start = text.prompt_length
        prompt = [strings[i].strip() for i in text.ids[:start]]
        try:
            ends = step_ends([strings[i].strip() for i in text.ids[start:]])
        except UserError as error:
            raise UserError(
                f"text {text.id} does not have the form of the embedded pair's texts: {error}; "
                "pass --places words to select positions by words"
            ) from None
        right = tuple((t, start + end.position) for end in ends if end.slip is None)
        places += [
            Place(
                (t, start + end.position), end.slip, right, is_gated(prompt) if has_gate else None
            )
            for end in ends
            if end.slip is not None and right
        ]
    if not places:
        raise UserError(
            f"no slip in {len(texts):,} texts, so no position is labelled; give more texts (--n), "
            "or pass --places words"
        )
    return places


class WordSites(NamedTuple):
    """Positions of texts, by whether a word of the set follows.

    Attributes:
        before: positions whose next token is a word of the set, with the word.
        others: positions in responses whose own token precedes a word of the set elsewhere, and
            whose next token is no such word.
    """

    before: list[tuple[Site, str]]
    others: list[Site]


def word_sites(texts: Sequence[Text], words: Mapping[int, str]) -> WordSites:
    """Return the positions before a word of the set, and others at which such a word could follow.

    Args:
        texts: conversations.
        words: the word of each token id of the set.

    Raises:
        UserError: no response has a word of the set.
    """
    responses = list(_predicting(texts))
    before = [(site, words[after]) for site, _, after in responses if after in words]
    if not before:
        raise UserError(
            f"none of {len(texts):,} responses contains one of the words "
            f"{', '.join(sorted(set(words.values())))}, so there is no position to compare; give "
            "more texts (--n), other texts (--responses) or other words (--words)"
        )
    preceding = {token for _, token, after in responses if after in words}
    others = [s for s, token, after in responses if token in preceding and after not in words]
    return WordSites(before, others)


def _predicting(texts: Sequence[Text]) -> Iterator[tuple[Site, int, int]]:
    """Yield each position that predicts a token of a response, its token and the next one."""
    for t, text in enumerate(texts):
        for start, end in text.responses():
            for p in range(max(0, start - 1), end - 1):
                yield (t, p), text.ids[p], text.ids[p + 1]


def matched_places(
    sites: WordSites, entropy: Mapping[Site, float], *, caliper: float, seed: int
) -> tuple[list[Place], int]:
    """Match each position before a word with another position of nearly equal entropy.

    Args:
        sites: the positions.
        entropy: entropy at each position, in nats.
        caliper, seed: see :func:`fastadapt.evaluation.contrast.matching.match`.

    Returns:
        The places, and the number of those that are matched within their text.

    Raises:
        UserError: there are too few other places.
    """
    before = [site for site, _ in sites.before]
    chosen, same = match(
        *(
            Candidates(np.array([t for t, _ in each]), np.array([entropy[site] for site in each]))
            for each in (before, sites.others)
        ),
        caliper=caliper,
        seed=seed,
    )
    places = [
        Place(site, word, (sites.others[i],))
        for (site, word), i in zip(sites.before, chosen.tolist(), strict=True)
    ]
    return places, int(same.sum())


def sites_of(places: Collection[Place]) -> list[Site]:
    """Return all positions to measure, labelled and matched, sorted and each once."""
    return sorted({site for place in places for site in (place.site, *place.matched)})


class Rows(NamedTuple):
    """Rows of N labelled positions and their C matched positions in the measured values.

    Attributes:
        labelled: int64 ``[N]``, rows of the labelled positions.
        matched: int64 ``[C]``, rows of the matched positions.
        owner: int64 ``[C]``, the labelled position that each matched one belongs to.
        text: int64 ``[N]``, text of each labelled position.
    """

    labelled: Tensor
    matched: Tensor
    owner: Tensor
    text: Tensor


def rows_of(places: Sequence[Place], sites: Sequence[Site]) -> Rows:
    """Return the rows that ``places`` have in values measured at ``sites``."""
    row = {site: i for i, site in enumerate(sites)}
    owners = [(i, site) for i, place in enumerate(places) for site in place.matched]
    return Rows(
        torch.tensor([row[place.site] for place in places]),
        torch.tensor([row[site] for _, site in owners]),
        torch.tensor([i for i, _ in owners]),
        torch.tensor([place.site[0] for place in places]),
    )
