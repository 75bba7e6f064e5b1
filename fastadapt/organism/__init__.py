"""The embedded pair: a small model organism of reasoning fine-tuning, shipped with its recipe.

Names that a configuration may use in place of a path: ``organism/target`` and ``organism/base``
(models), ``organism/train`` and ``organism/validation`` (conversations). See ``README.md`` in this
folder for what the pair is and how it was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastadapt.errors import UserError

FOLDER = Path(__file__).resolve().parent
NAMES = {
    "organism/target": FOLDER / "target",
    "organism/base": FOLDER / "base",
    "organism/train": FOLDER / "data" / "train.jsonl",
    "organism/validation": FOLDER / "data" / "validation.jsonl",
}


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


def build(
    out: str | Path, *, seed: int = 0, progress: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Rebuild data, tokenizer, base and target into ``out``; see ``recipe.build``."""
    from fastadapt.organism import recipe

    return recipe.build(Path(out), seed=seed, progress=progress)


def check(folder: str | Path = FOLDER) -> dict[str, Any]:
    """Measure the pair in ``folder`` against its acceptance bounds; see ``acceptance.check``."""
    from fastadapt.organism import acceptance

    return acceptance.check(Path(folder))
