"""A judge that needs no language model: which tokens, or pairs of tokens, make a unit active.

From the examples that it is shown it learns a rule of one of three forms, each a set of keys: the
token itself; the token and the one before it; the one before it. A key belongs to the rule where
the unit is active at more than half of the places that have it. Which form is taken is decided by
leaving out one example at a time: the rule is learned from the others, and held against where the
unit is active in this one; the form whose places agree best (F1 over all examples) wins, the
simpler one among equals. Where no form finds any place that it had not seen, there is no rule: a
description is worth only what it says of examples that did not make it.

The rule is written as a sentence, and detection reads nothing but that sentence: a text makes the
unit active where the rule holds at any of its tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from threading import Event
from typing import NamedTuple

from fastadapt.errors import UserError
from fastadapt.features.autointerp.questions import (
    Answer,
    Classify,
    Describe,
    Detect,
    Estimate,
    Example,
    Pieces,
    Progress,
    Question,
)

#: Keys that a description names, those of most places first.
MOST_KEYS = 24
NOTHING = "no token and no pair of tokens tells where it fires"

Key = tuple[str, ...]


class Form(NamedTuple):
    """A form of rule: of a place, its key, if it has one; of a key, its words."""

    key: Callable[[Pieces, int], Key | None]
    words: str  # its pieces as JSON strings in the order of the key
    opening: str


FORMS = (
    Form(lambda pieces, at: (pieces[at],), "{}", "fires on "),
    Form(
        lambda pieces, at: (pieces[at], pieces[at - 1]) if at else None,
        "{} after {}",
        "fires on the pair ",
    ),
    Form(lambda pieces, at: (pieces[at - 1],) if at else None, "{}", "fires on whatever follows "),
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class TokenJudge:
    """See the module, and :class:`fastadapt.features.autointerp.questions.Judge`."""

    name = "tokens"
    tells_classes = False

    @property
    def about(self) -> dict[str, str | int | None]:
        """There is nothing behind it."""
        return {"model": None, "endpoint": None, "prompts": None}

    def ask(
        self,
        questions: Sequence[Question],
        *,
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> list[Answer | None]:
        """An answer to each question; None where ``stop`` came first."""
        answers: list[Answer | None] = [None] * len(questions)
        for i, question in enumerate(questions):
            if stop is not None and stop.is_set():
                break
            answers[i] = self.kept(question)
            if progress is not None:
                progress(i + 1, len(questions))
        return answers

    def kept(self, question: Question) -> Answer:
        """The answer: it costs nothing.

        Raises:
            UserError: a class was asked for.
        """
        if isinstance(question, Describe):
            return describe(question.examples)
        if isinstance(question, Detect):
            return detect(question.description, question.texts)
        assert isinstance(question, Classify)
        raise UserError(
            "classes need a judge that is a language model: name one (judge.model) and its "
            "endpoint (judge.base_url)"
        )

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Nothing."""
        return Estimate(0, len(questions), 0, 0, 0.0, "nothing is asked of anybody")


def describe(examples: Sequence[Example]) -> str:
    """The rule that separates active places best, in words."""
    best, chosen = 0.0, None
    for form in FORMS:
        if (agreement := _left_out(form, examples)) > best:
            best, chosen = agreement, form
    if chosen is None:
        return NOTHING
    active = _counts(chosen, examples)[0]
    keys = sorted(_rule(chosen, examples), key=lambda key: (-active[key], key))[:MOST_KEYS]
    named = (
        chosen.words.format(*(json.dumps(piece, ensure_ascii=False) for piece in key))
        for key in keys
    )
    return chosen.opening + ", ".join(named)


def detect(description: str, texts: Iterable[Pieces]) -> tuple[bool, ...]:
    """For each text, whether the rule of the description holds at any of its tokens."""
    form, keys = _read(description)
    if form is None:
        return tuple(False for _ in texts)
    return tuple(any(form.key(text, at) in keys for at in range(len(text))) for text in texts)


def _read(description: str) -> tuple[Form | None, set[Key]]:
    """The rule of a description that this judge has written; none of another."""
    # The longest opening first: one is the beginning of another.
    for form in sorted(FORMS, key=lambda form: -len(form.opening)):
        if description.startswith(form.opening):
            try:
                pieces = [json.loads(piece) for piece in _STRING.findall(description)]
            except ValueError:  # an escape that JSON does not have: no rule of this judge
                return None, set()
            size = form.words.count("{}")
            return form, {tuple(pieces[i : i + size]) for i in range(0, len(pieces), size)}
    return None, set()


def _counts(form: Form, examples: Iterable[Example]) -> tuple[Counter[Key], Counter[Key]]:
    """Of each key, the places at which the unit is active, and all places."""
    active: Counter[Key] = Counter()
    places: Counter[Key] = Counter()
    for example in examples:
        for at, fires in enumerate(example.fires):
            key = form.key(example.pieces, at)
            if key is not None:
                places[key] += 1
                active[key] += fires
    return active, places


def _rule(form: Form, examples: Iterable[Example]) -> set[Key]:
    active, places = _counts(form, examples)
    return {key for key, n in places.items() if 2 * active[key] > n}


def _left_out(form: Form, examples: Sequence[Example]) -> float:
    """F1 of rules on the examples that they were not learned from."""
    active, places = _counts(form, examples)
    right = claimed = wanted = 0
    for example in examples:
        own_active, own_places = _counts(form, [example])
        for at, fires in enumerate(example.fires):
            key = form.key(example.pieces, at)
            wanted += fires
            if key is None:
                continue
            others = places[key] - own_places[key]
            claims = 2 * (active[key] - own_active[key]) > others
            claimed += claims
            right += claims and fires
    return 2 * right / (claimed + wanted) if right else 0.0
