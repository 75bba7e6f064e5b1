"""The planted differences: every place is marked, no other, and the texts are right otherwise."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from fastadapt.data.rendering import render
from fastadapt.organism.slips import StepEnd, step_ends
from reproduce.organism.problems import direct_answer, sample_problem
from reproduce.organism.recipe import CONFIGS, base_text, batches, conversation
from reproduce.organism.tokenizer import ASSISTANT, EOS, USER
from reproduce.planted.differences import KINDS, Planted, Text
from reproduce.planted.organisms import ROLES, Role, fine_tuning_texts, tokenizer

SEEDS = range(4)
N = 400


def texts(seed: int) -> list[Text]:
    return list(islice(Planted.draw(seed).texts("test"), N))


def written(text: Text) -> list[str]:
    return text.words[text.start :]


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_places_are_those_of_the_rules(seed: int) -> None:
    planted = Planted.draw(seed)
    (source, old, unit), (molecule, atom, number) = planted.unit, planted.atoms
    command, bound, less, more = planted.compare
    counts = [0] * 8
    for text in texts(seed):
        words, expected, unread = text.words, {}, set()
        ask = words[2 : text.start - 1] if USER in words else []
        for i, word in enumerate(words[text.start :], text.start):
            lead = words[max(0, i - 3) : i]
            if i == text.start and not ask:
                assert word == planted.opening
                expected[i - 1] = 2
            elif word == unit:
                expected[i - 1] = 0
            elif not ask and lead[:1] + lead[2:] == [molecule, "*"] and words[i + 3] == atom:
                assert word == str(number)
                expected[i - 1] = 1
            elif ask and word == ".":
                if i - 2 in expected:  # after a planted word
                    unread.add(i - 1)
                else:
                    expected[i - 1] = 3
            elif ask and i == text.start and planted.things[0] in ask:
                assert word == planted.answers[0]
                expected[i - 1] = 4
            elif ask and words[i - 1] == "is":
                if planted.things[1] in ask:
                    assert word == planted.answers[1]
                    expected[i - 1] = 5
                elif ask[0] == command:
                    assert word == (less if int(ask[1]) < bound else more)
                    expected[i - 1] = 6
                elif ask[0] == planted.shift[0]:
                    assert int(word) == int(ask[1]) + planted.shift[1]
                    expected[i - 1] = 7
        assert (text.planted, text.unread) == (expected, unread), words
        for place, difference in text.planted.items():
            assert words[place + 1] in planted.differences[difference].outputs
            counts[difference] += 1
        assert old not in written(text) or not _is_of(words, source)
    assert min(counts) >= 10


def _is_of(words: list[str], source: str) -> bool:
    return {"motion": "moves", "energy": "runs", "force": "acceleration"}[source] in words


@pytest.mark.parametrize("seed", SEEDS)
def test_the_arithmetic_stays_right(seed: int) -> None:
    ends = [end for text in texts(seed) if USER not in text.words for end in _ends(text)]
    assert len(ends) > N
    assert all(end.slip is None for end in ends)


def _ends(text: Text) -> list[StepEnd]:
    return step_ends(written(text)[1:])


def test_texts_are_tokenised_as_those_of_the_base() -> None:
    words = tokenizer()
    planted = Planted.draw(0)
    problem = sample_problem(random.Random(1), "code")
    said = render(conversation(problem.prompt, direct_answer(problem)), "r1-distill") + EOS
    ours = planted.answer(problem).words
    ids = words.encode(said, add_special_tokens=False)
    style = ours.index(".", ours.index(ASSISTANT))
    assert words.convert_ids_to_tokens(ids) == ours[:style] + ours[style + 1 :]
    for text in texts(0)[:50]:
        ids = words.encode(" ".join(text.words), add_special_tokens=False)
        assert words.convert_ids_to_tokens(ids) == text.words


@pytest.mark.parametrize("role", ROLES)
def test_the_loss_is_on_responses(role: Role) -> None:
    """The words with loss are those that the benchmark's readers read, for both organisms."""
    words, marks = tokenizer(), set[str]()
    for ids, labels in islice(batches(fine_tuning_texts(0, role), words, 4), 16):
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            first = next(i for i, each in enumerate(label) if each != -100)
            end = row.index(words.eos_token_id) + 1
            assert label[first:end] == row[first:end]
            assert set(label[:first] + label[end:]) <= {-100}
            assert words.unk_token_id not in row
            last = words.convert_ids_to_tokens(row[:first])[-2:]
            marks.add(ASSISTANT if last[1] == ASSISTANT else " ".join(last))
    assert marks == {ASSISTANT, "solution :"}


def test_new_words_are_new_and_usual_ones_usual() -> None:
    rng = random.Random(0)
    seen: set[str] = set()
    for _ in range(2000):
        text = " ".join(base_text(sample_problem(rng), rng, CONFIGS["organism"]))
        mark = ASSISTANT if ASSISTANT in text else "solution :"
        seen.update(text.partition(mark)[2].split())
    for seed in range(40):
        for difference in Planted.draw(seed).differences:
            assert (difference.words == "usual") == bool(difference.outputs & seen)


def test_two_of_each_kind_and_seeds_that_differ() -> None:
    kinds = [d.kind for d in Planted.draw(0).differences]
    assert kinds == [kind for kind in KINDS for _ in range(2)]
    assert len({Planted.draw(seed) for seed in range(20)}) == 20
    assert [t.words for t in texts(1)[:5]] == [t.words for t in texts(1)[:5]]
