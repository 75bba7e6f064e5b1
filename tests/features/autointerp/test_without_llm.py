"""Rules from examples, their texts, and parsing of the texts."""

from __future__ import annotations

import pytest

from fastadapt.errors import UserError
from fastadapt.features.autointerp.judges.without_llm import (
    MOST_KEYS,
    NOTHING,
    TokenJudge,
    describe,
    detect,
)
from fastadapt.features.autointerp.questions import (
    ClassifyQuestion,
    DescribeQuestion,
    DetectQuestion,
    Example,
)


def example(text: str) -> Example:
    """Return an example whose words in capitals are active."""
    words = text.split()
    pieces = tuple(f" {word.lower()}" for word in words)
    return Example(pieces, tuple(word.isupper() for word in words))


def rule_of(*texts: str) -> str:
    return describe([example(text) for text in texts])


def test_one_token() -> None:
    assert rule_of("a b WAIT c", "d WAIT e WAIT", "f g WAIT") == 'fires on " wait"'


def test_several_tokens_are_sorted_by_frequency() -> None:
    description = rule_of("a WAIT b HMM", "c WAIT HMM", "d WAIT e HMM f WAIT")
    assert description == 'fires on " wait", " hmm"'


def test_a_pair_of_which_neither_token_alone_predicts() -> None:
    description = rule_of("so THE a the so b", "the so THE so c", "so d the so THE", "the so THE")
    assert description == 'fires on the pair " the" after " so"'


def test_the_token_after_a_token() -> None:
    description = rule_of("so A b c", "a d so E b", "c so F e", "b so D f", "f so C")
    assert description == 'fires on whatever follows " so"'


def test_examples_without_a_common_token_give_no_rule() -> None:
    assert rule_of("a B c", "b c D e", "E f a") == NOTHING
    assert rule_of("a B c") == NOTHING  # one example is not enough
    assert describe([]) == NOTHING


def test_keys_must_be_active_in_most_occurrences() -> None:
    assert rule_of("THE the the", "the THE the", "the the THE the") == NOTHING


def test_unreliable_keys_are_left_out_of_a_rule() -> None:
    assert rule_of("WAIT the a THE", "the WAIT the b", "c WAIT the the") == 'fires on " wait"'


def test_rules_of_any_tokens_are_parsed_from_their_text() -> None:
    odd = ('"', "\\", ", ", ' after "', "\n", "fires on ", "é", "]")
    for piece in odd:
        examples = [Example(("x", piece, "y"), (False, True, False))] * 2
        description = describe(examples)
        assert detect(description, [("x", piece), ("y",), ("x", "y")]) == (True, False, False)
        examples = [
            Example((piece, "x", "y", "x", piece), (False, True, False, False, False)),
            Example(("y", "x", piece, "x", "y", "x", piece), (False,) * 3 + (True,) + (False,) * 3),
        ]
        description = describe(examples)
        assert description.startswith("fires on the pair")
        assert detect(description, [(piece, "x"), ("x", piece), ("y", "x")]) == (True, False, False)


def test_other_descriptions_and_empty_rules_predict_nothing() -> None:
    for text in (NOTHING, "words of doubt", ""):
        assert detect(text, [("a",), ()]) == (False, False)


def test_a_long_rule_has_its_most_frequent_keys() -> None:
    words = [f"W{i}" for i in range(40)]
    description = rule_of(" ".join(words), " ".join(words), " ".join([*words, *words[:5]]))
    assert description.count('"') == 2 * MOST_KEYS
    for i in range(5):
        assert f'" w{i}"' in description


def test_the_judge_answers_in_order_and_refuses_classes() -> None:
    judge = TokenJudge()
    shown = DescribeQuestion((example("a WAIT"), example("WAIT b")))
    detect_question = DetectQuestion('fires on " wait"', ((" wait",), (" no",)))
    assert judge.ask([shown, detect_question]) == ['fires on " wait"', (True, False)]
    assert judge.estimate([shown]).calls == 0
    with pytest.raises(UserError, match=r"judge\.model"):
        judge.ask([ClassifyQuestion((), (), ())])
