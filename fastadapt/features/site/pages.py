"""Exports the pages of a feature store to a folder, layer by layer. The folder appears at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.features.site.columns import (
    JUDGED,
    class_names,
    cut,
    parts,
    read_layer,
    select_descriptions,
    totals,
)
from fastadapt.features.site.shards import shard
from fastadapt.features.store.scales import ORIGINS
from fastadapt.features.store.schema import MANIFEST, REGIONS, Kind
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import digest_of_input, half_filled, writing_folder
from fastadapt.io.documents import DocumentError, read_json
from fastadapt.io.names import has_file, typed_path
from fastadapt.reporting.page import style_sheet

if TYPE_CHECKING:
    from importlib.abc import Traversable

SITE = "site"
#: File with the stamp of the export, for :func:`is_current`. It marks a folder as a site.
RECORD = "site.json"
#: Largest number of shards of examples. With it, sites of up to 64 layers of three kinds have fewer
#: than 2,000 files.
_MOST_SHARDS = 1792
#: Writes a shard: name, facts, columns.
Put = Callable[[str, Any, dict[str, np.ndarray]], None]
_LEAST_UNITS = 64  # per shard of examples
_SCRIPTS = ("shards", "units", "dom", "shell", "list", "charts", "feature", "router")
STATIC = ("index.html", *(f"{name}.js" for name in _SCRIPTS))


def export(
    store: Store,
    folder: str | os.PathLike[str] | None = None,
    *,
    kinds: Sequence[Kind] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Event | None = None,
) -> Path | None:
    """Write the pages of a store. Pages of an earlier export are replaced.

    Args:
        store: the feature store.
        folder: output folder: new, empty, or a site; default: ``site`` in the store.
        kinds: kinds of units to show; default: all in the store.
        progress: called with (completed layers, total layers).
        stop: set it to stop after the current layer. An earlier export is left unchanged.

    Returns:
        The folder, whose ``index.html`` opens in a browser; None if stopped.

    Raises:
        UserError: the folder has other contents, a kind is not in the store, or a table of the
            store cannot be read.
        RunError: the folder cannot be written.
    """
    chosen = tuple(store.kinds if kinds is None else kinds)
    shapes = {kind: store.shape(kind) for kind in chosen}
    if not chosen:
        raise UserError(f"kinds: expected one or more of {', '.join(store.kinds)}, got none")
    target = site_folder(store.folder / SITE if folder is None else typed_path(folder, "--output"))
    store.check_files(chosen)
    try:
        with writing_folder(target, last=RECORD) as staged:
            if not _write(store, staged, shapes, progress, stop):
                raise _StoppedError
    except _StoppedError:
        return None
    return target


def site_folder(folder: Path) -> Path:
    """Return the real path of a folder for pages.

    Raises:
        UserError: the folder holds other files, or is a file.
    """
    target = Path(os.path.realpath(folder))
    is_site = half_filled(target) or has_file(target / RECORD)
    if target.is_dir() and not is_site and any(target.iterdir()):
        raise UserError(
            f"{target} holds files that are not exported pages; give a folder that is new or empty"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is not a folder; give a folder that is new or empty")
    return target


class _StoppedError(Exception):
    """Ends an export that was stopped, so that its unfinished folder is discarded."""


class _Record(TypedDict):
    stamp: str
    kinds: list[Kind]


def is_current(store: Store, folder: Path) -> bool:
    """Return whether a folder has the pages of the store's present contents, by this version."""
    try:
        record = read_json(folder / RECORD, _Record)
    except DocumentError:
        return False
    return bool(record["stamp"] == stamp(store, record["kinds"]))


def stamp(store: Store, kinds: Sequence[Kind]) -> str:
    """Return a digest of the inputs of the pages, 32 hexadecimal digits.

    The inputs are the store's manifest, which has the hashes of the collected tables; the tables of
    judges; and the files and the code of this package that determine the pages.
    """
    package = resources.files("fastadapt.features.site")
    sources = [package / "static" / name for name in (*STATIC, "site.css")]
    sources += [package / f"{name}.py" for name in ("columns", "pages", "shards")]
    sha256 = hashlib.sha256(style_sheet().encode())
    for source in sources:
        sha256.update(source.read_bytes())
    sha256.update((store.folder / MANIFEST).read_bytes())
    for kind in kinds:
        for table in JUDGED:
            digest = digest_of_input(store.path(table, kind)) if store.has(table, kind) else None
            sha256.update(f"{kind} {table} {digest}\n".encode())
    return sha256.hexdigest()[:32]


def units_per_shard(n_features: int, layers: int) -> int:
    """Return the number of units whose examples share a shard (data file of the pages).

    Args:
        n_features: number of units per layer.
        layers: number of layers, summed over kinds.

    Example:
        >>> units_per_shard(8192, 28)
        128
    """
    return max(_LEAST_UNITS, -(-n_features // max(1, _MOST_SHARDS // layers)))


def _write(
    store: Store,
    folder: Path,
    shapes: dict[Kind, tuple[int, int]],
    progress: Callable[[int, int], None] | None,
    stop: Event | None,
) -> bool:
    """Write all files of the site; return False if stopped."""
    data = folder / "data"
    data.mkdir()
    mark = stamp(store, list(shapes))

    def put(name: str, facts: Any, columns: dict[str, np.ndarray]) -> None:
        (data / f"{name}.js").write_bytes(shard(name, mark, facts, columns))

    domains = list(store.manifest["domains"])
    layers = sum(n_layers for n_layers, _ in shapes.values())
    listed, done = [], 0
    for kind, (n_layers, n_features) in shapes.items():
        classes = class_names(store, kind)
        span = units_per_shard(n_features, layers)
        for layer in range(n_layers):
            if stop is not None and stop.is_set():
                return False
            units = read_layer(store, kind, layer, domains, classes)
            described, texts = select_descriptions(units.notes)
            put(f"{kind}-{layer}", {"descriptions": texts}, {**units.index, "described": described})
            for part, low, high in parts(n_features, span):
                within = range(low, high)
                notes = {unit: units.notes[unit] for unit in within if unit in units.notes}
                put(f"{kind}-{layer}-{part}", {"notes": notes}, cut(units, low, high))
            done += 1
            if progress is not None:
                progress(done, layers)
        listed.append(kind_facts(store, kind, span, classes))
    put_shared(store, listed, put)
    files = resources.files("fastadapt.features.site") / "static"
    write_static(folder, [files / name for name in STATIC], [files / "site.css"])
    record = {"stamp": mark, "kinds": list(shapes)}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return True


def kind_facts(store: Store, kind: Kind, span: int, classes: Sequence[Any]) -> dict[str, Any]:
    """Return the facts of a kind of unit for its pages; ``span`` is the units per shard."""
    n_layers, n_features = store.shape(kind)
    return {
        "kind": kind,
        "layers": n_layers,
        "features": n_features,
        "span": span,
        "classes": classes,
        "tables": [table for table in (*JUDGED, "scales") if store.has(table, kind)],
    }


def put_shared(store: Store, listed: Sequence[Mapping[str, Any]], put: Put) -> None:
    """Write the shards that pages of all units share: tokens, texts, and facts of the store."""
    tokens = store.read("tokens")
    put("tokens", {"strings": tokens["string"].to_pylist()}, {"token": _u32(tokens["token"])})
    texts = store.read("texts", columns=["text", "id"])
    put("texts", {"ids": texts["id"].to_pylist()}, {"text": _u32(texts["text"])})
    manifest, domains = store.manifest, list(store.manifest["domains"])
    facts = {
        "kinds": list(listed),
        "regions": list(REGIONS),
        "origins": list(ORIGINS),
        "domains": domains,
        "edges": list(manifest["edges"]),
        "totals": totals(store, domains),
        **{key: manifest[key] for key in ("run", "pair", "data", "settings", "lens")},
    }
    put("site", facts, {})


def write_static(folder: Path, files: Sequence[Traversable], rules: Sequence[Traversable]) -> None:
    """Copy files of a site, and write its style sheet: the shared rules, then ``rules``."""
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    sheets = [style_sheet(), *(rule.read_text(encoding="utf-8") for rule in rules)]
    (folder / "style.css").write_text("".join(sheets), encoding="utf-8")


def _u32(column: Any) -> np.ndarray:
    return column.to_numpy().astype("<u4")
