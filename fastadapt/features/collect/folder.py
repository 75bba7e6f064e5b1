"""The folder that features are collected into: whose it is, and what was begun there.

::

    collecting/facts.json          what is collected, from what, with which settings
    collecting/texts.parquet       the texts, see fastadapt.features.collect.texts
    collecting/state.safetensors   what was collected so far

and, at the end, a store (:mod:`fastadapt.features.schema`). Of one shard of several, ``collecting``
stays, for :func:`fastadapt.features.collect.merge`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadapt.errors import RunError, UserError
from fastadapt.features.schema import KINDS, MANIFEST, SHARED, TABLES
from fastadapt.features.store import LOCK
from fastadapt.files import replacing

WORK = "collecting"
FACTS, TEXTS, STATE = "facts.json", "texts.parquet", "state.safetensors"

#: What may be there without features: that of others, and what :func:`clear` leaves.
_BESIDE = {LOCK, "sets", "calls", "site"}

Facts = dict[str, Any]


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        UserError: it does, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder or a new name")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found - _BESIDE and not found & {MANIFEST, WORK}:
        raise UserError(
            f"{folder} is not empty and holds no features (it holds "
            f"{', '.join(sorted(found)[:3])}); nothing in it was touched: give a new folder"
        )


def read_facts(folder: Path) -> Facts | None:
    """What was begun there; None if nothing was.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / WORK / FACTS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Note what is collected.

    Raises:
        RunError: it cannot be written.
    """
    try:
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        with replacing(folder / WORK / FACTS) as staged:
            staged.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from error


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two accounts of what is collected differ, in words; empty where they do not."""
    told = []
    for key in now:
        old, new = then.get(key), json.loads(json.dumps(now[key]))
        if isinstance(new, dict) and isinstance(old, dict):
            told += [f"{k}: {new[k]!r}, was {old.get(k)!r}" for k in new if new[k] != old.get(k)]
        elif new != old:
            told.append(f"{key}: {new!r}, was {old!r}")
    return "; ".join(told)


def clear(folder: Path) -> None:
    """Remove what was collected there and what was made of it; sets and judges' answers stay.

    Raises:
        RunError: it cannot be removed.
    """
    try:
        (folder / MANIFEST).unlink(missing_ok=True)  # first: without it there is no store
        for name in SHARED:
            (folder / f"{name}.parquet").unlink(missing_ok=True)
        for kind in KINDS:
            for name in TABLES:
                (folder / kind / f"{name}.parquet").unlink(missing_ok=True)
            if (folder / kind).is_dir() and not any((folder / kind).iterdir()):
                (folder / kind).rmdir()
        clear_work(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from error


def clear_work(folder: Path) -> None:
    """Remove what only collecting needs."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
