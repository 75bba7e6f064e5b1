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
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastadapt.io.atomic import disk_errors, locked, make_folder, replacing, sweep_tree
from fastadapt.io.documents import read_json, same
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace
from fastadapt.models.sources.fingerprint import fingerprint
from fastadapt.organism import NAMES
from reproduce.planted.differences import Planted
from reproduce.planted.measure import Measured, Stamp, rules
from reproduce.planted.organisms import SIZES, Role

SETTINGS, RESULT, TABLES, MEASURED = "settings.json", "planted.json", "tables.md", "measured.json"
_LOCK = ".lock"
_FILES = (SETTINGS, RESULT, TABLES)


@dataclass(frozen=True)
class Part:
    """An organism of a seed, and its folder."""

    folder: Path
    seed: int
    role: Role

    @property
    def label(self) -> str:
        """The part in messages."""
        return f"seed {self.seed}, {self.role}"

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Yield whether this process holds the part; another one may be working on it."""
        with ExitStack() as held:
            with disk_errors(self.folder):
                make_folder(self.folder)
                try:
                    held.enter_context(locked(self.folder / _LOCK))
                except BlockingIOError:
                    yield False
                    return
                sweep_tree(self.folder)
            yield True

    def measured(self) -> Measured | None:
        """Return what was measured by the present rules; None if it was by others, or not yet.

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / MEASURED
        if not has_file(path) or read_json(path, Stamp)["rules"] != rules():
            return None
        measured: Measured = read_json(path, Measured)
        return measured


def settings_of(size: str) -> dict[str, Any]:
    """Return what a folder's parts depend on.

    ``training`` has the sizes, the fingerprint of the base, and the SHA-256 of some planted texts
    with their places: parts of others are not mixed. ``measuring`` has that of the rules of
    measuring: parts of others are measured again.
    """
    texts = [(text.words, text.planted) for text in islice(Planted.draw(0).texts("settings"), 100)]
    return {
        "training": {
            "size": size,
            **asdict(SIZES[size]),
            "loss": "response",
            "base": fingerprint(str(NAMES["organism/base"]), None),
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
    workspace = Workspace(folder, "--out", "writing to", _FILES, marker=SETTINGS)
    names = workspace.names()
    foreign = [n for n in names if n not in _FILES and not n.removeprefix("seed").isdecimal()]
    if foreign or (names and SETTINGS not in names):
        raise workspace.foreign("holds files that are not of this benchmark", foreign or names)
    if not names and not is_new:
        raise workspace.refusal("holds no benchmark; leave out --summary to run one")
    path, settings = folder / SETTINGS, settings_of(size)
    with held(folder):
        workspace.sweep()
        before = read_json(path, dict[str, Any]) if has_file(path) else None
        if before is not None and not same(before.get("training"), settings["training"]):
            raise workspace.refusal(
                "holds a benchmark of another size, base or way of training, or of other planted "
                "texts; give the same --size, or a new folder"
            )
        if not same(before, settings):
            write(path, settings)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder's own lock, after waiting for a process that holds it for a moment.

    Raises:
        RunError: the folder cannot be written.
    """
    with ExitStack() as stack, disk_errors(folder):
        make_folder(folder)
        while True:
            try:
                stack.enter_context(locked(folder / _LOCK))
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def parts_of(folder: Path, seeds: Sequence[int], nulls: Sequence[int]) -> list[Part]:
    """Return the parts of seeds, with the nulls of some of them."""
    roles: dict[Role, Sequence[int]] = {"planted": seeds, "null": nulls}
    return [
        Part(folder / f"seed{seed}" / role, seed, role)
        for seed in seeds
        for role, numbers in roles.items()
        if seed in numbers
    ]


def write(path: Path, values: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file."""
    text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    with disk_errors(path), replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")
