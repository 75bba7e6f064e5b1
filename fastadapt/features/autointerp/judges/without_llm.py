"""Judge without a language model: a rule over tokens, or pairs of tokens, that predicts activity.

A rule is a set of keys of one of three forms: the token; the token and its predecessor; the
predecessor. A key belongs to the rule if the unit is active at more than half of the positions with
this key. Leave-one-out over the examples chooses the form: the rule of the other examples predicts
the active positions of the one left out, and the form with the highest F1 over all examples wins
(the simpler form on ties). If no form predicts an active position, the unit has no rule.

The description states the rule as a sentence. Detection reads only that sentence: the unit is
active in a text if the rule holds at any of its tokens.
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
    ClassifyQuestion,
    DescribeQuestion,
    DetectQuestion,
    Estimate,
    Example,
    Pieces,
    Progress,
    Question,
)

#: Maximum number of keys in a description; keys of most active positions come first.
MOST_KEYS = 24
NOTHING = "no token and no pair of tokens tells where it fires"

Key = tuple[str, ...]


class Form(NamedTuple):
    """Kind of token rule: which tokens its keys consist of, and the wording of its description.

    Attributes:
        key: returns the key at a position of a text; None without one.
        words: format of a key, filled with its pieces as JSON strings in the order of the key.
        opening: first words of the description.
    """

    key: Callable[[Pieces, int], Key | None]
    words: str
    opening: str


FORMS = (
    Form(lambda pieces, i: (pieces[i],), "{}", "fires on "),
    Form(
        lambda pieces, i: (pieces[i], pieces[i - 1]) if i else None,
        "{} after {}",
        "fires on the pair ",
    ),
    Form(lambda pieces, i: (pieces[i - 1],) if i else None, "{}", "fires on whatever follows "),
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class TokenJudge:
    """Judge by token rules; see :class:`fastadapt.features.autointerp.questions.Judge`."""

    name = "tokens"
    can_classify = False

    @property
    def about(self) -> dict[str, str | int | None]:
        """Facts for ``judgements.json``: null for model, endpoint and prompts."""
        return {"model": None, "endpoint": None, "prompts": None}

    def ask(
        self,
        questions: Sequence[Question],
        *,
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> list[Answer | None]:
        """Answer each question; None where ``stop`` was set before."""
        answers: list[Answer | None] = [None] * len(questions)
        for i, question in enumerate(questions):
            if stop is not None and stop.is_set():
                break
            answers[i] = self.cached_answer(question)
            if progress is not None:
                progress(i + 1, len(questions))
        return answers

    def cached_answer(self, question: Question) -> Answer:
        """Return the answer, computed at no cost.

        Raises:
            UserError: the question asks for a class.
        """
        if isinstance(question, DescribeQuestion):
            return describe(question.examples)
        if isinstance(question, DetectQuestion):
            return detect(question.description, question.texts)
        assert isinstance(question, ClassifyQuestion)
        raise UserError(
            "the judge 'tokens' cannot classify: name a language model (judge.model) and its "
            "endpoint (judge.base_url)"
        )

    def estimate(self, questions: Sequence[Question]) -> Estimate:
        """Return an estimate of no calls, since this judge sends none."""
        return Estimate(0, len(questions), 0, 0, 0.0, "no language model")


def describe(examples: Sequence[Example]) -> str:
    """Describe the rule that predicts active positions best."""
    best_f1, chosen = 0.0, None
    for form in FORMS:
        if (f1 := _leave_one_out_f1(form, examples)) > best_f1:
            best_f1, chosen = f1, form
    if chosen is None:
        return NOTHING
    active = _counts(chosen, examples)[0]
    keys = sorted(_rule(chosen, examples), key=lambda key: (-active[key], key))[:MOST_KEYS]
    listed = (
        chosen.words.format(*(json.dumps(piece, ensure_ascii=False) for piece in key))
        for key in keys
    )
    return chosen.opening + ", ".join(listed)


def detect(description: str, texts: Iterable[Pieces]) -> tuple[bool, ...]:
    """Return for each text whether the rule of the description holds at any of its tokens."""
    form, keys = _parse(description)
    if form is None:
        return tuple(False for _ in texts)
    return tuple(any(form.key(text, i) in keys for i in range(len(text))) for text in texts)


def _parse(description: str) -> tuple[Form | None, set[Key]]:
    """Parse a description written by this judge; return None and no keys for any other text."""
    # Longest opening first: "fires on " begins the other openings too.
    for form in sorted(FORMS, key=lambda form: -len(form.opening)):
        if description.startswith(form.opening):
            try:
                pieces = [json.loads(piece) for piece in _STRING.findall(description)]
            except ValueError:  # an invalid JSON escape: not written by this judge
                return None, set()
            size = form.words.count("{}")
            return form, {tuple(pieces[i : i + size]) for i in range(0, len(pieces), size)}
    return None, set()


def _counts(form: Form, examples: Iterable[Example]) -> tuple[Counter[Key], Counter[Key]]:
    """Count, for each key, the positions with the key that are active, and all of them."""
    active: Counter[Key] = Counter()
    positions: Counter[Key] = Counter()
    for example in examples:
        for i, fires in enumerate(example.fires):
            key = form.key(example.pieces, i)
            if key is not None:
                positions[key] += 1
                active[key] += fires
    return active, positions


def _rule(form: Form, examples: Iterable[Example]) -> set[Key]:
    active, positions = _counts(form, examples)
    return {key for key, n in positions.items() if 2 * active[key] > n}


def _leave_one_out_f1(form: Form, examples: Sequence[Example]) -> float:
    """Return F1 over all examples, each predicted by the rule fitted to the other examples."""
    active, positions = _counts(form, examples)
    n_right = n_predicted = n_active = 0
    for example in examples:
        active_here, positions_here = _counts(form, [example])
        for i, fires in enumerate(example.fires):
            key = form.key(example.pieces, i)
            n_active += fires
            if key is None:
                continue
            others = positions[key] - positions_here[key]
            predicted = 2 * (active[key] - active_here[key]) > others
            n_predicted += predicted
            n_right += predicted and fires
    return 2 * n_right / (n_predicted + n_active) if n_right else 0.0
