"""Writes the pages of a store to a folder, layer by layer, and puts it in place as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.features.site.columns import (
    JUDGED,
    class_names,
    cut,
    described,
    parts,
    read_layer,
    totals,
)
from fastadapt.features.site.shards import shard
from fastadapt.features.store.schema import MANIFEST, REGIONS, Kind
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import digest_of_input, half_filled, writing_folder
from fastadapt.io.documents import DocumentError, read_json
from fastadapt.io.names import has_file, typed_path
from fastadapt.reporting.page import style_sheet

SITE = "site"
#: What the site is of, for :func:`is_current`; it also marks a folder as ours to replace.
RECORD = "site.json"
#: Shards of examples, all kinds together; with what else there is a site has fewer than 2,000
#: files up to 64 layers of three kinds.
_MOST_SHARDS = 1792
_LEAST_UNITS = 64  # per shard of examples: smaller ones would only be more files
_STATIC = ("index.html", "shards.js", "units.js", "words.js", "list.js", "charts.js")
STATIC = (*_STATIC, "feature.js", "app.js")


def export(
    store: Store,
    folder: str | os.PathLike[str] | None = None,
    *,
    kinds: Sequence[Kind] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> Path | None:
    """Write the pages of a store, in place of those that were there.

    Args:
        store: whose features are shown.
        folder: to write, by default ``site`` in the store. It must be new, empty, or a site.
        kinds: of unit, by default all that the store has.
        progress: told (layers done, layers).
        stop: set it to end after the layer at hand; what was there before stays.

    Returns:
        The folder, whose ``index.html`` opens in a browser; None if it was stopped.

    Raises:
        UserError: the folder holds something else, a kind is not in the store, or a table of it
            cannot be read.
        RunError: the folder cannot be written.
    """
    chosen = tuple(store.kinds if kinds is None else kinds)
    shapes = {kind: store.shape(kind) for kind in chosen}
    if not chosen:
        raise UserError(f"kinds: expected some of {', '.join(store.kinds)}, got none")
    chosen_folder = store.folder / SITE if folder is None else typed_path(folder, "--output")
    target = Path(os.path.realpath(chosen_folder))
    ours = half_filled(target) or has_file(target / RECORD)
    if target.is_dir() and not ours and any(target.iterdir()):
        raise UserError(f"{target} is no site of features; give a folder that is new or empty")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is no folder")
    store.check_files(chosen)
    try:
        with writing_folder(target, last=RECORD) as staged:
            if not _write(store, staged, shapes, progress, stop):
                raise _StoppedError
    except _StoppedError:
        return None
    return target


class _StoppedError(Exception):
    """Ends the export without putting anything in place."""


class _Record(TypedDict):
    stamp: str
    kinds: list[Kind]


def is_current(store: Store, folder: Path) -> bool:
    """Whether a folder has the pages of the store as it is now, made by this version."""
    try:
        record = read_json(folder / RECORD, _Record)
    except DocumentError:
        return False  # none yet, or not whole: it is made again
    return bool(record["stamp"] == stamp(store, record["kinds"]))


def stamp(store: Store, kinds: Sequence[Kind]) -> str:
    """What pages are made from, as 32 hexadecimal digits.

    That is the manifest, which has the hashes of what was collected, the tables of judges, and the
    files and the code that make the pages.
    """
    here = resources.files("fastadapt.features.site")
    sources = [here / "static" / name for name in (*STATIC, "site.css")]
    sources += [here / f"{name}.py" for name in ("columns", "pages", "shards")]
    sha256 = hashlib.sha256(style_sheet().encode())
    for source in sources:
        sha256.update(source.read_bytes())
    sha256.update((store.folder / MANIFEST).read_bytes())
    for kind in kinds:
        for table in JUDGED:
            found = digest_of_input(store.path(table, kind)) if store.has(table, kind) else None
            sha256.update(f"{kind} {table} {found}\n".encode())
    return sha256.hexdigest()[:32]


def units_per_shard(n_features: int, layers: int) -> int:
    """Units whose examples share a file.

    Args:
        n_features: units of the layer.
        layers: of all kinds together.
    """
    return max(_LEAST_UNITS, -(-n_features // max(1, _MOST_SHARDS // layers)))


def _write(
    store: Store,
    folder: Path,
    shapes: dict[Kind, tuple[int, int]],
    progress: Callable[[int, int], None] | None,
    stop: Event | None,
) -> bool:
    """Write everything; whether it came to its end."""
    data = folder / "data"
    data.mkdir()
    mark = stamp(store, list(shapes))

    def put(name: str, facts: Any, columns: dict[str, np.ndarray]) -> None:
        (data / f"{name}.js").write_bytes(shard(name, mark, facts, columns))

    manifest = store.manifest
    domains = list(manifest["domains"])
    layers = sum(n_layers for n_layers, _ in shapes.values())
    listed, done = [], 0
    for kind, (n_layers, n_features) in shapes.items():
        classes = class_names(store, kind)
        span = units_per_shard(n_features, layers)
        for layer in range(n_layers):
            if stop is not None and stop.is_set():
                return False
            units = read_layer(store, kind, layer, domains, classes)
            which, texts = described(units.notes)
            put(f"{kind}-{layer}", {"descriptions": texts}, {**units.index, "described": which})
            for part, low, high in parts(n_features, span):
                within = range(low, high)
                notes = {unit: units.notes[unit] for unit in within if unit in units.notes}
                put(f"{kind}-{layer}-{part}", {"notes": notes}, cut(units, low, high))
            done += 1
            if progress is not None:
                progress(done, layers)
        tables = [table for table in JUDGED if store.has(table, kind)]
        listed.append(
            {
                "kind": kind,
                "layers": n_layers,
                "features": n_features,
                "span": span,
                "classes": classes,
                "tables": tables,
            }
        )
    tokens = store.read("tokens")
    put("tokens", {"strings": tokens["string"].to_pylist()}, {"token": _u32(tokens["token"])})
    texts = store.read("texts", columns=["text", "id"])
    put("texts", {"ids": texts["id"].to_pylist()}, {"text": _u32(texts["text"])})
    facts = {
        "kinds": listed,
        "regions": list(REGIONS),
        "domains": domains,
        "edges": list(manifest["edges"]),
        "totals": totals(store, domains),
        **{key: manifest[key] for key in ("run", "pair", "data", "settings", "lens")},
    }
    put("site", facts, {})
    _write_static(folder)
    record = {"stamp": mark, "kinds": list(shapes)}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return True


def _write_static(folder: Path) -> None:
    here = resources.files("fastadapt.features.site") / "static"
    for name in STATIC:
        (folder / name).write_bytes((here / name).read_bytes())
    own = (here / "site.css").read_text(encoding="utf-8")
    (folder / "style.css").write_text(style_sheet() + own, encoding="utf-8")


def _u32(column: Any) -> np.ndarray:
    return column.to_numpy().astype("<u4")
