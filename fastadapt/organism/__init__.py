"""The embedded pair: a small model organism of reasoning fine-tuning.

Names that a configuration may use in place of a path: ``organism/target`` and ``organism/base``
(models), ``organism/train`` and ``organism/validation`` (conversations). See ``README.md`` in this
folder for what the pair is and how it was measured.
"""

from __future__ import annotations

from pathlib import Path

from fastadapt.errors import UserError

FOLDER = Path(__file__).resolve().parent
NAMES = {
    "organism/target": FOLDER / "target",
    "organism/base": FOLDER / "base",
    "organism/train": FOLDER / "data" / "train.jsonl",
    "organism/validation": FOLDER / "data" / "validation.jsonl",
}


#: Questions of the pair's benchmarks: held-out test problems, and worked ones for few-shot prompts.
QUESTIONS = FOLDER / "data" / "questions.jsonl"


def resolve(name: str) -> str:
    """The path behind a name of the embedded pair; any other string is returned unchanged.

    Raises:
        UserError: a name under ``organism/`` that does not exist.
    """
    if name in NAMES:
        return str(NAMES[name])
    if name.startswith("organism/"):
        raise UserError(f"unknown part of the embedded pair {name!r}: one of {sorted(NAMES)}")
    return name
