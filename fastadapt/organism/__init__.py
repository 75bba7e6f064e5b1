"""The embedded pairs: small model organisms of reasoning fine-tuning.

A configuration may use these names in place of paths: ``organism/target`` and ``organism/base``
(models), ``organism/train`` and ``organism/validation`` (conversations). Those of the gated pair
begin with ``organism/gated/``. ``README.md`` in this folder and in ``gated`` describe the pairs and
their measurements.
"""

from __future__ import annotations

from pathlib import Path

from fastadapt.errors import UserError

FOLDER = Path(__file__).resolve().parent
GATED_FOLDER = FOLDER / "gated"
NAMES = {
    "organism/target": FOLDER / "target",
    "organism/base": FOLDER / "base",
    "organism/real": FOLDER / "real",
    "organism/train": FOLDER / "data" / "train.jsonl",
    "organism/validation": FOLDER / "data" / "validation.jsonl",
    "organism/gated/target": GATED_FOLDER / "target",
    "organism/gated/base": GATED_FOLDER / "base",
    "organism/gated/train": GATED_FOLDER / "data" / "train.jsonl",
    "organism/gated/validation": GATED_FOLDER / "data" / "validation.jsonl",
}
#: Questions of the pair's benchmarks: test problems, and solved problems for few-shot prompts.
QUESTIONS = FOLDER / "data" / "questions.jsonl"
#: The same of the gated pair.
GATED_QUESTIONS = GATED_FOLDER / "data" / "questions.jsonl"


def resolve(name: str) -> str:
    """Return the path of a name of the embedded pair; return any other string unchanged.

    Raises:
        UserError: the name begins with ``organism/``, but is not one of ``NAMES``.

    Example:
        >>> resolve("Qwen/QwQ-32B")
        'Qwen/QwQ-32B'
        >>> Path(resolve("organism/base")).name
        'base'
    """
    if name in NAMES:
        return str(NAMES[name])
    if name.startswith("organism/"):
        raise UserError(
            f"unknown part of the embedded pair {name!r}; expected one of {', '.join(NAMES)}"
        )
    return name
