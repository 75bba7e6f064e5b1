"""Whether a response is right, and how often it hesitates: from its text alone."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

from fastadapt.errors import UserError

# An option, alone or with its wording after it; "A, B, C or D" and "A catalyst" are none.
_LETTER = re.compile(r"\(?([A-D])\)?(?:[.:)].*)?", re.DOTALL)
_PREFIX = re.compile(r"(?i:^(?:the )?(?:option|answer|choice)\b(?: is)?:?\s*)")
# Uppercase only, and nothing after it on its line: "the answer is a number" names no option.
_STATED = re.compile(r"[Aa]nswer(?: is)?:?[ *]*\(?([A-D])\)?[ .*]*(?:$|\n)")
_WRAPPED = re.compile(
    r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|rm|bf)\s*\{([^{}]*)\}"
)
_SPACES = re.compile(r"[$~]|\\[,;:! ]")


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds, braces matched; None where there is none."""
    for match in reversed(list(re.finditer(r"\\boxed\s*(?:\{|(?<=\s)([\w.]+))", text))):
        if match[1] is not None:  # without braces
            return match[1].rstrip(".")
        begin, depth = match.end(), 1
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin:place].strip()
    return None


def math_is_right(text: str, answer: str) -> bool:
    r"""Whether the last ``\boxed`` equals the answer (LaTeX), as math-verify sees it.

    A comparison is given 5 seconds in a process's main thread; elsewhere there is no alarm to end
    it with.
    """
    parse, verify, latex = _math_verify()
    said = last_boxed(text)
    if said is None:
        return False
    if said == answer.strip():
        return True
    alarm = 5 if threading.current_thread() is threading.main_thread() else None
    gold, given = (
        parse(f"\\boxed{{{expression}}}", extraction_config=latex, parsing_timeout=alarm)
        for expression in (answer, said)
    )
    return bool(verify(gold, given, timeout_seconds=alarm))


def _math_verify() -> tuple:
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ModuleNotFoundError:
        raise UserError(
            "this benchmark is judged by math-verify, which is not installed; install the extra: "
            "pip install 'fastadapt[eval]'"
        ) from None
    return parse, verify, [LatexExtractionConfig(boxed_match_priority=0)]


def chosen_letter(text: str) -> str | None:
    r"""The option A to D that a response names: in its last ``\boxed``, or as "Answer: X".

    Only capital letters that stand alone count, so that the article "a" is no answer.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        before = None
        while boxed != before:
            before, boxed = boxed, _WRAPPED.sub(r"\1", boxed)
        match = _LETTER.fullmatch(_PREFIX.sub("", _SPACES.sub(" ", boxed).strip()).strip())
        return match.group(1) if match else None
    stated = _STATED.findall(text)
    return stated[-1] if stated else None


def letter_is_right(text: str, answer: str) -> bool:
    """Whether the response names the option that is right."""
    return chosen_letter(text) == answer


def stated_is_right(text: str, answer: str) -> bool:
    """Whether a response of the embedded pair states the number: exact form, after its thinking."""
    from fastadapt.organism.problems import extract_answer

    return extract_answer(text) == int(answer)


def hesitations(text: str, words: Sequence[str]) -> int:
    """How often the words (or phrases) occur in a text, whole and in any case."""
    choices = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return len(re.findall(rf"(?<!\w)(?:{choices})(?!\w)", text, re.IGNORECASE)) if words else 0
