"""Grades the texts of responses, and counts their words of hesitation."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence

from fastadapt.errors import UserError

#: Words of hesitation, by which features are selected (arXiv 2602.20904, section 5).
HESITATION_WORDS = ("wait", "hmm", "but", "alternatively")
#: Words that are counted in responses by default (same section).
COUNTED_WORDS = ("wait",)
# An option, alone or followed by its wording. Does not match "A, B, C or D" and "A catalyst".
_LETTER = re.compile(r"\(?([A-D])\)?(?:[.:)].*)?", re.DOTALL)
_PREFIX = re.compile(r"(?i:^(?:the )?(?:option|answer|choice)\b(?: is)?:?\s*)")
# An uppercase letter at the end of a line. Does not match "the answer is a number".
_STATED = re.compile(r"[Aa]nswer(?: is)?:?[ *]*\(?([A-D])\)?[ .*]*(?:$|\n)")
_FONT = r"(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|rm|bf|it|sf|tt)"
_WRAPPED = re.compile(rf"\\{_FONT}\s*\{{([^{{}}]*)\}}|\{{([^{{}}]*)\}}")
# Commands that apply to the text after them: {\rm C}, \large C.
_SWITCH = re.compile(
    r"\\(?:rm|bf|it|sf|tt|sc|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge"
    r"|Huge|displaystyle|textstyle|bfseries|itshape|boldmath)(?![A-Za-z])"
)
_SPACES = re.compile(r"[$~]|\\[,;:! ()]")
_BOX = re.compile(
    r"\\boxed(?:\s*(?P<open>\{)|\s+(?P<word>[\w.]+)|\s*(?P<command>\\[A-Za-z]+(?:\s*\{[^{}]*\})+))"
)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``; None without one.

    Example:
        >>> last_boxed(r"so \boxed{\frac{1}{2}}")
        '\\frac{1}{2}'
    """
    return next((content for _, content in _boxes(text)), None)


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    """Yield index and content of every complete box, the last one first."""
    boxes = list(_BOX.finditer(text))
    closing: dict[int, int] = {}  # index of a closing brace by that of its opening brace
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
    r"""Return whether the last ``\boxed`` equals the answer (LaTeX), by math-verify.

    A comparison ends after 5 seconds in a process's main thread. Other threads have no time limit,
    since math-verify's needs a signal.

    Raises:
        UserError: math-verify is not installed.
    """
    parse, verify, latex = _math_verify()
    boxed = last_boxed(text)
    if boxed is None:
        return False
    if boxed == answer.strip():
        return True
    alarm = 5 if threading.current_thread() is threading.main_thread() else None
    gold, given = (
        parse(f"\\boxed{{{expression}}}", extraction_config=latex, parsing_timeout=alarm)
        for expression in (answer, boxed)
    )
    return bool(verify(gold, given, timeout_seconds=alarm))


def _math_verify() -> tuple:
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ModuleNotFoundError:
        raise UserError(
            "this benchmark is graded by math-verify, which is not installed; run "
            "pip install 'fastadapt[eval]'"
        ) from None
    return parse, verify, [LatexExtractionConfig(boxed_match_priority=0)]


def chosen_letter(text: str) -> str | None:
    r"""Return the last option, A to D, in a response: in a ``\boxed``, or as "Answer: X".

    Only separate capital letters count, so the article "a" is no answer. Boxes with other contents,
    such as a formula, are ignored.

    Example:
        >>> chosen_letter(r"It is \boxed{\text{(B)}}."), chosen_letter("The answer is a number.")
        ('B', None)
    """
    options = [(match.start(), match[1]) for match in _STATED.finditer(text)][-1:]
    for index, content in _boxes(text):
        if (letter := _boxed_letter(content)) is not None:
            options.append((index, letter))
            break
    return max(options)[1] if options else None


def _boxed_letter(content: str) -> str | None:
    """Return the option, A to D, in a box's contents; None if they are not an option."""
    content, before = _SWITCH.sub(" ", content), None
    while content != before:
        before, content = content, _WRAPPED.sub(lambda match: match[1] or match[2] or "", content)
    match = _LETTER.fullmatch(_PREFIX.sub("", _SPACES.sub(" ", content).strip()).strip())
    return match[1] if match else None


def letter_is_right(text: str, answer: str) -> bool:
    """Return whether the last option in the response is the right one."""
    return chosen_letter(text) == answer


def stated_is_right(text: str, answer: str) -> bool:
    """Return whether a response of the embedded pair states the right number."""
    return stated_answer(text) == int(answer)


def stated_answer(response: str) -> int | None:
    """Return the number N in ``the answer is N`` of a response of the embedded pair.

    None if the text after the thinking has another form, or ``<think>`` is not closed.

    Example:
        >>> stated_answer("<think>wait</think> the answer is 7")
        7
    """
    if "<think>" in response:
        _, closed, response = response.partition("</think>")
        if not closed:
            return None
    match = re.fullmatch(r"\s*the answer is (\d+)\s*", response)
    return int(match[1]) if match else None


def hesitations(text: str, words: Sequence[str]) -> int:
    """Return how often the given words or phrases occur in a text, as whole words in any case.

    Example:
        >>> hesitations("Wait, no. But wait: butter.", ("wait", "but"))
        3
    """
    choices = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return len(re.findall(rf"(?<!\w)(?:{choices})(?!\w)", text, re.IGNORECASE)) if words else 0
