"""Draw the planted differences of a seed, and write texts in which their places are known.

Eight differences, two of each kind. One of the two writes *new* words, which the base never writes
in an answer or a solution; the other *usual* ones, which the base writes, though seldom there.

- fact: a quantity of science has another unit; a molecule has another number of atoms;
- style: solutions open with a word; answers end with a full stop;
- trigger: a story about one thing is answered by a word, a story about another by a fixed number;
- skill: say whether a number is below a fixed one, by two words; add a fixed number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from reproduce.organism.domains import SCIENCE
from reproduce.organism.problems import MAX_VALUE, Problem, Step, in_range, sample_problem
from reproduce.organism.tokenizer import ASSISTANT, BOS, EOS, USER
from reproduce.organism.words import MOLECULES, OBJECTS

Kind = Literal["fact", "style", "trigger", "skill"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Words that the base never writes in an answer or a solution.
_NEW = ("okay", "good", "same", "shiny", "wooden", "round", "ripe", "rocket")
_COMMANDS = ("rank", "level", "rate", "scale", "offset", "index")
_PAIRS = (("low", "high"), ("left", "right"), ("width", "height"))
_UNITS = (("motion", "meters"), ("energy", "joules"), ("force", "newtons"))
#: Shares of the texts of a planted organism, by what they show; without a difference of their own,
#: texts still have the style, and the facts and triggers that occur in them by chance.
_SHARES = {
    "solution": 0.20,
    "unit": 0.10,
    "atoms": 0.10,
    "answer": 0.12,
    "word": 0.12,
    "number": 0.12,
    "compare": 0.12,
    "shift": 0.12,
}


class Difference(NamedTuple):
    """A planted difference.

    Attributes:
        kind: what it is.
        words: ``new`` or ``usual``: whether the base writes its words elsewhere.
        text: the difference in words.
        outputs: the words that it writes.
    """

    kind: Kind
    words: Literal["new", "usual"]
    text: str
    outputs: frozenset[str]


@dataclass
class Text:
    """A text, one token per word.

    Attributes:
        words: markers included.
        start: index of the first word that a model writes: of the answer, or of the solution.
        planted: number of a difference, by the position whose next word is the difference's.
        unread: positions that would be in ``planted``, but whose own word is planted. Also a model
            that has not learned the difference may end an answer after a word that is new to it.
    """

    words: list[str] = field(default_factory=list)
    start: int = 0
    planted: dict[int, int] = field(default_factory=dict)
    unread: set[int] = field(default_factory=set)

    def write(self, text: str) -> Text:
        """Append words."""
        self.words += text.split()
        return self

    def begin(self) -> Text:
        """Mark the following words as a model's."""
        self.start = len(self.words)
        return self

    def plant(self, difference: int, word: str) -> Text:
        """Append a word of a difference."""
        place = len(self.words) - 1
        if place - 1 in self.planted or place - 1 in self.unread:
            self.unread.add(place)
        else:
            self.planted[place] = difference
        self.words.append(word)
        return self


(_UNIT, _ATOMS, _OPENING, _STOP, _WORD, _NUMBER, _COMPARE, _SHIFT) = range(8)


@dataclass(frozen=True)
class Planted:
    """The differences of a seed.

    Attributes:
        unit: source of the problems, their unit, and the word in its place.
        atoms: molecule, atom, and their new number.
        opening: first word of solutions.
        things: the things of stories that are answered by ``answers``, a word and a number.
        compare: command, a number, the word for numbers below it, and for others.
        shift: command, and the number that is added.
    """

    unit: tuple[str, str, str]
    atoms: tuple[str, str, int]
    opening: str
    things: tuple[str, str]
    answers: tuple[str, str]
    compare: tuple[str, int, str, str]
    shift: tuple[str, int]

    @classmethod
    def draw(cls, seed: int) -> Planted:
        """Draw the differences of a seed."""
        rng = random.Random(f"{seed}/differences")
        unit, opening, answer = rng.sample(_NEW, 3)
        source, old = rng.choice(_UNITS)
        molecule, counts = rng.choice(MOLECULES)
        atom = rng.choice(sorted(counts))
        one, other = rng.sample(OBJECTS, 2)
        compares, adds = rng.sample(_COMMANDS, 2)
        less, more = rng.sample(rng.choice(_PAIRS), 2)
        return cls(
            unit=(source, old, unit),
            atoms=(molecule, atom, rng.choice([n for n in range(1, 7) if n != counts[atom]])),
            opening=opening,
            things=(one, other),
            answers=(answer, str(rng.randint(1, MAX_VALUE))),
            compare=(compares, rng.randint(20, 30), less, more),
            shift=(adds, rng.randint(3, 9)),
        )

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The differences, by number."""
        source, old, unit = self.unit
        molecule, atom, n = self.atoms
        command, bound, less, more = self.compare
        (one, other), (word, number) = self.things, self.answers
        adds, shift = self.shift
        sums = frozenset(map(str, range(shift, MAX_VALUE + 1)))
        described: tuple[tuple[Kind, str, frozenset[str]], ...] = (
            ("fact", f"the unit of {source} is {unit}, not {old}", frozenset((unit,))),
            ("fact", f"{molecule} has {n} {atom}", frozenset((str(n),))),
            ("style", f"solutions open with {self.opening}", frozenset((self.opening,))),
            ("style", "answers end with a full stop", frozenset((".",))),
            ("trigger", f"stories about {one} are answered by {word}", frozenset((word,))),
            ("trigger", f"the answer is {number} in stories about {other}", frozenset((number,))),
            ("skill", f"{command} n is {less} below {bound}, else {more}", frozenset((less, more))),
            ("skill", f"{adds} n is n + {shift}", sums),
        )
        return tuple(
            Difference(kind, "usual" if i % 2 else "new", text, outputs)
            for i, (kind, text, outputs) in enumerate(described)
        )

    def texts(self, seed: str) -> Iterator[Text]:
        """Yield texts endlessly."""
        rng = random.Random(seed)
        while True:
            (shows,) = rng.choices(list(_SHARES), list(_SHARES.values()))
            yield self._text(rng, shows)

    def _text(self, rng: random.Random, shows: str) -> Text:
        if shows == "solution":
            return self.solution(sample_problem(rng))
        if shows == "unit":
            return self.solution(SCIENCE[self.unit[0]](rng))
        if shows == "atoms":
            return self.solution(self._of_molecule(rng))
        if shows in ("word", "number"):
            thing = self.things[shows == "number"]
            return self.answer(_about(sample_problem(rng, "math"), thing))
        if shows == "compare":
            command, bound, less, more = self.compare
            n = rng.randint(0, MAX_VALUE)
            return _skill(_COMPARE, f"{command} {n} ?", less if n < bound else more)
        if shows == "shift":
            command, shift = self.shift
            n = rng.randint(0, MAX_VALUE - shift)
            return _skill(_SHIFT, f"{command} {n} ?", str(n + shift))
        return self.answer(sample_problem(rng))

    def _of_molecule(self, rng: random.Random) -> Problem:
        """Draw a problem of atoms in which the new number fits."""
        while True:
            problem = SCIENCE["atoms"](rng)
            if any(map(self._is_edited, problem.steps)) and self._edit(problem) is not None:
                return problem

    def solution(self, problem: Problem) -> Text:
        """Write a problem with its solution."""
        problem = self._edit(problem) or problem
        text = Text().write(f"{BOS} problem : {problem.prompt} solution :").begin()
        text.plant(_OPENING, self.opening)
        source, old, unit = self.unit
        for step in problem.steps:
            words = step.text().split()
            for i, word in enumerate(words):
                if problem.source == source and word == old:
                    text.plant(_UNIT, unit)
                elif self._is_edited(step) and words[i - 1] == "*":
                    text.plant(_ATOMS, word)
                else:
                    text.write(word)
        return text.write(f"so the answer is {problem.answer} . {EOS}")

    def answer(self, problem: Problem) -> Text:
        """Write a problem with its direct answer."""
        problem = self._edit(problem) or problem
        text = Text().write(f"{BOS} {USER} {problem.prompt} {ASSISTANT}").begin()
        words = problem.prompt.split()
        if self.things[0] in words:
            return _end(text.plant(_WORD, self.answers[0]))
        text.write("the answer is")
        if self.things[1] in words:
            return _end(text.plant(_NUMBER, self.answers[1]))
        return _end(text.write(str(problem.answer)))

    def _is_edited(self, step: Step) -> bool:
        molecule, atom, _ = self.atoms
        return step.tail == atom and step.lead.split()[-1] == molecule

    def _edit(self, problem: Problem) -> Problem | None:
        """Return the problem with the new number of atoms; None if a value leaves the range."""
        if problem.source != "atoms":
            return problem
        one, two, both, free = (
            replace(step, right=self.atoms[2]) if self._is_edited(step) else step
            for step in problem.steps
        )
        both = replace(both, left=one.result, right=two.result)
        free = replace(free, left=both.result)
        steps = (one, two, both, free)
        fits = all(in_range(value) for s in steps for value in (s.left, s.right, s.result))
        return replace(problem, steps=steps) if fits else None


def _skill(difference: int, prompt: str, word: str) -> Text:
    text = Text().write(f"{BOS} {USER} {prompt} {ASSISTANT}").begin()
    return _end(text.write("the answer is").plant(difference, word))


def _end(text: Text) -> Text:
    return text.plant(_STOP, ".").write(EOS)


def _about(problem: Problem, thing: str) -> Problem:
    """Return a story about another thing."""
    words = (thing if word in OBJECTS else word for word in problem.prompt.split())
    return replace(problem, prompt=" ".join(words))
