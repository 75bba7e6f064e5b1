"""The output folder of the benchmark, which several processes may fill at once.

::

    settings.json      what all parts depend on
    seedN/ROLE/        a part: an organism, its adapters and measured.json, under a lock of its own
    planted.json       all counts
    tables.md          the tables

The folder's own lock is held for settings and results alone, for a moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastadapt.io.workspace import Workspace
from fastadapt.models.sources.fingerprint import fingerprint
from fastadapt.organism import NAMES
from reproduce import parts
from reproduce.parts import SETTINGS, TABLES
from reproduce.planted.differences import Planted
from reproduce.planted.measure import Measured, rules
from reproduce.planted.organisms import SIZES, Role, adapter_settings

RESULT = "planted.json"


@dataclass(frozen=True)
class Part(parts.Part):
    """An organism of a seed, and its folder."""

    seed: int
    role: Role

    @property
    def label(self) -> str:
        """The part in messages."""
        return f"seed {self.seed}, {self.role}"

    def measured(self) -> Measured | None:
        """Return what was measured by the present rules; None if it was by others, or not yet.

        Raises:
            UserError: the file is damaged.
        """
        measured: Measured | None = parts.read_measured(self.folder, Measured, rules())
        return measured


def settings_of(size: str) -> dict[str, Any]:
    """Return what a folder's parts depend on.

    ``training`` has the sizes, the fingerprint of the base, and SHA-256 of the settings of the
    adapters, and of some planted texts with their places: parts of others are not mixed.
    ``measuring`` has that of the rules of measuring: parts of others are measured again.
    """
    texts = [(text.words, text.planted) for text in islice(Planted.draw(0).texts("settings"), 100)]
    return {
        "training": {
            "size": size,
            **asdict(SIZES[size]),
            "loss": "response",
            "base": fingerprint(str(NAMES["organism/base"]), None),
            "adapters": adapter_settings(SIZES[size]),
            "texts": hashlib.sha256(repr(texts).encode()).hexdigest(),
        },
        "measuring": rules(),
    }


def open_folder(folder: Path, size: str, *, is_new: bool = True) -> None:
    """Write the settings of a new folder, or check those of an older one.

    Args:
        folder: the output folder.
        size: name of the sizes.
        is_new: whether the folder may be new.

    Raises:
        UserError: the folder has other files, or parts that depend on other settings; or it has
            none, and may not be new.
    """
    files = (SETTINGS, RESULT, TABLES)
    parts.open_folder(
        Workspace(folder, "--out", "writing to", files, marker=SETTINGS),
        settings_of(size),
        is_part=lambda name: name.removeprefix("seed").isdecimal(),
        clash="holds a benchmark of another size, base or way of training, of other planted texts, "
        "or of a version that did not record the settings of its adapters; give the same --size, "
        "or a new folder",
        is_new=is_new,
    )


def parts_of(folder: Path, seeds: Sequence[int], nulls: Sequence[int]) -> list[Part]:
    """Return the parts of seeds, with the nulls of some of them."""
    roles: dict[Role, Sequence[int]] = {"planted": seeds, "null": nulls}
    return [
        Part(folder / f"seed{seed}" / role, seed, role)
        for seed in seeds
        for role, numbers in roles.items()
        if seed in numbers
    ]
