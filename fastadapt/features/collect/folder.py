"""The output folder of a collection: its contents, and how a new collection replaces an old one.

::

    collecting/facts.json          adapter, models, data and settings of the collection
    collecting/texts.parquet       the texts, see fastadapt.features.collect.texts
    collecting/state.safetensors   snapshot of the statistics

A finished collection leaves a store (:mod:`fastadapt.features.store.schema`). A finished shard
keeps ``collecting`` for :func:`fastadapt.features.collect.merge`. A new collection is prepared in
``collecting.next`` and replaces the folder's contents only when its files are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from fastadapt.errors import UserError
from fastadapt.features.collect.config import CollectConfig
from fastadapt.features.store.schema import KINDS, MANIFEST, SHARED, TABLES, Kind
from fastadapt.features.store.store import LOCK, Layers, PerLayer
from fastadapt.io.atomic import (
    disk_errors,
    make_folder,
    remove,
    remove_if_empty,
    replacing,
    sync_folder,
    unstaged,
)
from fastadapt.io.documents import Count, DocumentError, Mapped, Positive, read_json
from fastadapt.io.names import has_file
from fastadapt.io.workspace import Workspace
from fastadapt.training.config import from_dict

WORK, NEXT = "collecting", "collecting.next"
FACTS, TEXTS, STATE = "facts.json", "texts.parquet", "state.safetensors"

#: Entries allowed in a folder that has no store yet; :func:`clear` leaves them.
_BESIDE = {LOCK, "sets", "calls", "site"}
#: Files that describe the collected units: in the folder, and in the folder of each kind.
_SHARED = {MANIFEST, *(f"{name}.parquet" for name in SHARED)}
_SHARED |= {"judgements.json", "judgements.md", "judgements"}
_OF_KIND = {*(f"{name}.parquet" for name in TABLES), "overlap.png"}

#: Facts that locate an input, and facts that identify an input wherever it lies.
_WHERE = {"run", "target", "base", "name", "split"}
_WHAT = {"adapter", "models", "fingerprint"}

#: Settings that collections of earlier versions do not name, as they were then.
_EARLIER: dict[str, Any] = {"scales": False}

Facts = dict[str, Any]


class _Data(TypedDict):
    name: str
    family: str | Mapped
    fingerprint: str


class _Prepared(TypedDict):
    read: Count
    too_long: Count
    texts: Count
    tokens: Count
    domains: list[str]
    bad_rows: NotRequired[Count | None]


class _Facts(TypedDict):
    run: str
    adapter: str
    models: Any
    pair: dict[str, Any]
    data: _Data
    settings: dict[str, Any]
    shard: tuple[Count, Positive]
    prepared: _Prepared
    units: dict[Kind, tuple[Layers, PerLayer]]


def check_folder(folder: Path) -> None:
    """Raise unless the folder is missing, empty, or holds a collection.

    Raises:
        UserError: the folder holds other files, or the path is not a folder.
    """
    workspace = Workspace(folder, "--output", "writing to", ())
    names = workspace.names()
    if set(names) - _BESIDE and not (WORK in names or _is_store(folder) or _is_leftover(folder)):
        raise workspace.foreign("is not empty and is not a store of features", names)


def _is_store(folder: Path) -> bool:
    try:
        manifest = read_json(folder / MANIFEST)
    except DocumentError:
        return False
    return isinstance(manifest, dict) and {"schema_version", "units"} <= manifest.keys()


def _is_leftover(folder: Path) -> bool:
    """Return whether a folder is what a killed process left: a lock, and only files of a store."""
    known = {*_BESIDE, *_SHARED, *KINDS, NEXT}
    return (folder / LOCK).is_file() and all(
        _unstaged(path) in known
        and (path.name not in KINDS or {_unstaged(p) for p in path.glob("*")} <= _OF_KIND)
        for path in folder.iterdir()
    )


def _unstaged(path: Path) -> str:
    """Return the final name of a file that may still have the name of an unfinished write."""
    return unstaged(path.name) or path.name


def read_facts(folder: Path) -> Facts | None:
    """Return adapter, models, data and settings of a folder's collection; None if there is none.

    Raises:
        UserError: the facts cannot be read.
    """
    path = folder / WORK / FACTS
    if not has_file(path):
        return None
    facts: Facts = read_json(path, _Facts)
    i, n = facts["shard"]
    if i >= n:
        raise UserError(f"{path}: shard: expected i/n with i below n, got {i}/{n}")
    config_of(folder, facts)
    return facts


def config_of(folder: Path, facts: Facts) -> CollectConfig:
    """Return the settings of the collection in a folder.

    Raises:
        UserError: a setting is missing, unknown or impossible.
    """
    try:
        settings = {**_EARLIER, **facts["settings"]}
        config: CollectConfig = from_dict(settings, CollectConfig, "settings.")
    except UserError as error:
        raise UserError(f"{folder / WORK / FACTS}: {error}") from None
    return config


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write adapter, models, data and settings of a collection into its ``collecting.next``.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(folder / NEXT / FACTS) as staged:
        staged.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def begin_anew(folder: Path) -> None:
    """Replace the folder's collection by the one prepared in ``collecting.next``.

    A kill leaves either the old collection or files that :func:`check_folder` accepts and
    :func:`clear` removes.

    Raises:
        OSError: the folder cannot be written.
        RunError: the old collection cannot be removed.
    """
    clear(folder)
    prepared = folder / NEXT
    for path in [prepared / "tokens.parquet", *prepared.glob("*/lens.parquet")]:
        target = folder / path.relative_to(prepared)
        make_folder(target.parent)
        os.replace(path, target)
        sync_folder(target.parent)
        if path.parent != prepared:
            path.parent.rmdir()
    sync_folder(prepared)
    os.replace(prepared, folder / WORK)
    sync_folder(folder)


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences of two collections' facts as text; empty if they are equal.

    Paths count only if adapter, models or texts differ.
    """
    old, new = _flat(then), _flat(json.loads(json.dumps(now)))
    changed = sorted((k for k in new if new[k] != old.get(k)), key=lambda k: k[-1] in _WHERE)
    if not any(key[-1] in _WHAT for key in changed):
        changed = [key for key in changed if key[-1] not in _WHERE]
    return "; ".join(f"{key[-1]}: {new[key]!r}, was {old.get(key)!r}" for key in changed)


def _flat(facts: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            flat |= {(key, k): v for k, v in value.items()}
        else:
            flat[key,] = value
    return flat


def clear(folder: Path) -> None:
    """Remove a folder's collection and what was derived from it.

    Saved sets of features and answers of judges stay.

    Raises:
        RunError: a file cannot be removed.
    """
    with disk_errors(folder):
        if (folder / MANIFEST).exists():
            (folder / MANIFEST).unlink()  # first: a folder without a manifest has no store
            sync_folder(folder)
        clear_work(folder)
        for path in list(_of_units(folder)):
            remove(path)
        for kind in KINDS:
            remove_if_empty(folder / kind)


def _of_units(folder: Path) -> Iterator[Path]:
    for within, names in ((folder, _SHARED), *((folder / kind, _OF_KIND) for kind in KINDS)):
        if within.is_dir():
            yield from (path for path in within.iterdir() if _unstaged(path) in names)


def sweep(folder: Path) -> None:
    """Remove an incomplete preparation that a killed process left.

    Staged files are removed by :func:`fastadapt.features.store.store.writing`.
    """
    shutil.rmtree(folder / NEXT, ignore_errors=True)
    if not (folder / WORK / FACTS).is_file():
        clear_work(folder)


def clear_work(folder: Path) -> None:
    """Remove the files of a folder that only collecting needs."""
    if (folder / WORK / FACTS).exists():
        (folder / WORK / FACTS).unlink()  # first: a folder without facts has no collection
        sync_folder(folder / WORK)
    shutil.rmtree(folder / WORK, ignore_errors=True)
