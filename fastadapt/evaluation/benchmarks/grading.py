"""Whether a response is right, and how often it hesitates: from its text alone."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence

from fastadapt.errors import UserError

#: Words of hesitation counted by default (arXiv 2602.20904, section 5).
HESITATION_WORDS = ("wait", "hmm", "but", "alternatively")
# An option, alone or with its wording after it; "A, B, C or D" and "A catalyst" are none.
_LETTER = re.compile(r"\(?([A-D])\)?(?:[.:)].*)?", re.DOTALL)
_PREFIX = re.compile(r"(?i:^(?:the )?(?:option|answer|choice)\b(?: is)?:?\s*)")
# Uppercase only, and nothing after it on its line: "the answer is a number" names no option.
_STATED = re.compile(r"[Aa]nswer(?: is)?:?[ *]*\(?([A-D])\)?[ .*]*(?:$|\n)")
_FONT = r"(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|rm|bf|it|sf|tt)"
_WRAPPED = re.compile(rf"\\{_FONT}\s*\{{([^{{}}]*)\}}|\{{([^{{}}]*)\}}")
# Commands that hold for what follows them: {\rm C}, \large C.
_SWITCH = re.compile(
    r"\\(?:rm|bf|it|sf|tt|sc|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge"
    r"|Huge|displaystyle|textstyle|bfseries|itshape|boldmath)(?![A-Za-z])"
)
_SPACES = re.compile(r"[$~]|\\[,;:! ()]")
_BOX = re.compile(
    r"\\boxed(?:\s*(?P<open>\{)|\s+(?P<word>[\w.]+)|\s*(?P<command>\\[A-Za-z]+(?:\s*\{[^{}]*\})+))"
)


def last_boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{...}`` holds, braces matched; None where there is none."""
    return next((content for _, content in _boxes(text)), None)


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """Place and content of every complete box, the last first."""
    boxes = list(_BOX.finditer(text))
    closing: dict[int, int] = {}  # by the place of an opening brace
    opened: list[int] = []
    for brace in re.finditer("[{}]", text) if boxes else ():
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    for box in reversed(boxes):
        if box["open"] is None:
            yield box.start(), (box["word"] or box["command"]).rstrip(".")
        elif (end := closing.get(box.start("open"))) is not None:
            yield box.start(), text[box.end() : end].strip()


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
    r"""The option A to D that a response names last: in a ``\boxed``, or as "Answer: X".

    Only capital letters that stand alone count, so that the article "a" is no answer. A box that
    holds something else, such as a formula, names no option and hides none.
    """
    named = [(match.start(), match[1]) for match in _STATED.finditer(text)][-1:]
    for place, content in _boxes(text):
        if (letter := _boxed_letter(content)) is not None:
            named.append((place, letter))
            break
    return max(named)[1] if named else None


def _boxed_letter(content: str) -> str | None:
    """The option that a box names; None where it holds anything else."""
    content, before = _SWITCH.sub(" ", content), None
    while content != before:
        before, content = content, _WRAPPED.sub(lambda match: match[1] or match[2] or "", content)
    match = _LETTER.fullmatch(_PREFIX.sub("", _SPACES.sub(" ", content).strip()).strip())
    return match[1] if match else None


def letter_is_right(text: str, answer: str) -> bool:
    """Whether the response names the option that is right."""
    return chosen_letter(text) == answer


def stated_is_right(text: str, answer: str) -> bool:
    """Whether a response of the embedded pair states the number: exact form, after its thinking."""
    return stated_answer(text) == int(answer)


def stated_answer(response: str) -> int | None:
    """Return the number that a response of the embedded pair states: ``the answer is N``.

    None where the response has another form, or opens ``<think>`` without closing it.
    """
    if "<think>" in response:
        _, closed, response = response.partition("</think>")
        if not closed:
            return None
    match = re.fullmatch(r"\s*the answer is (\d+)\s*", response)
    return int(match[1]) if match else None


def hesitations(text: str, words: Sequence[str]) -> int:
    """How often the words (or phrases) occur in a text, whole and in any case."""
    choices = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return len(re.findall(rf"(?<!\w)(?:{choices})(?!\w)", text, re.IGNORECASE)) if words else 0
