"""Results of judges in a store: table rows, ``judgements.json``, ``judgements.md`` and plots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastadapt.errors import UserError
from fastadapt.features.autointerp.judgement_schema import (
    PARTS,
    SCHEMA_VERSION,
    JudgementsFile,
    Part,
    Parts,
    check_fit,
    check_name_of,
)
from fastadapt.features.autointerp.questions import CLASSES, class_names
from fastadapt.features.store.schema import MANIFEST, TABLES, Kind
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import digest, disk_errors, replacing
from fastadapt.io.documents import DocumentError, check, read_json
from fastadapt.io.names import has_file, inside
from fastadapt.reporting.figures import Figure, Series
from fastadapt.reporting.formatting import percent
from fastadapt.reporting.rendering import write_png
from fastadapt.reporting.tables import Interval, Table, as_markdown, shown

JSON, TEXT, PLOTS = "judgements.json", "judgements.md", "judgements"
#: Label of each kind of unit, and the key of its line colour.
NAMES: Mapping[str, tuple[str, str]] = {
    "adapter": ("adapter's features", "transcoder"),
    "base": ("base's neurons", "base"),
    "target": ("target's neurons", "target"),
}
_ADVICE = "remove the file and judge again"
_NAME_BYTES = 200  # maximum length of a judge's name in a file name


def add_rows(
    store: Store, table: str, kind: Kind, judge: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Replace a judge's rows in a table of the store; rows of other judges stay.

    Raises:
        RunError: the folder cannot be written.
    """
    added = pa.Table.from_pylist(list(rows), schema=TABLES[table])
    if store.has(table, kind):
        old = store.read(table, kind)
        added = pa.concat_tables([old.filter(pc.not_equal(old["judge"], judge)), added])
    store.add(table, added, kind)


def read_judgements(store: Store) -> dict[str, Any]:
    """Read ``judgements.json``; without the file, return no judges.

    Results about an earlier collection in this folder, of another adapter or other texts, are left
    out.

    Raises:
        UserError: the file cannot be read or is invalid.
    """
    path = store.folder / JSON
    if not has_file(path):
        return {"schema_version": SCHEMA_VERSION, "judges": {}}
    plain = _read(path)
    try:
        check(plain, JudgementsFile, str(path))
        judges, collected = plain["judges"], _collected(store)
        current = {}
        for judge, parts in judges.items():
            source = f"{path}: judges[{judge!r:.80}]"
            check(parts, Parts, source)
            results = {part: parts[part] for part in PARTS if part in parts}
            same = {
                p: result for p, result in results.items() if result.get("collected") == collected
            }
            check_fit(same, store, source)
            if same:
                current[judge] = same
        held = {"schema_version": SCHEMA_VERSION, "judges": current}
        _as_json(held, path)
    except UserError as error:
        raise UserError(f"{error}; {_ADVICE}") from None
    return held


def check_addable(store: Store, judge: str) -> None:
    """Raise ``UserError`` if results of this judge could not be written."""
    check_name_of(judge)
    read_judgements(store)


def _read(path: Path) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = read_json(path, dict[str, Any])
    except DocumentError as error:
        raise UserError(f"{error}; {_ADVICE}") from None
    version = plain.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r:.80}, but this fastadapt reads version "
            f"{SCHEMA_VERSION}; {_ADVICE}"
        )
    return plain


def _as_json(held: Mapping[str, Any], path: Path) -> bytes:
    try:
        text = json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except ValueError as error:  # a lone surrogate or an infinite number
        raise UserError(f"{path}: a result cannot be written as JSON: {error}") from None


def _collected(store: Store) -> str:
    """Return the SHA-256 of the store's manifest, which identifies the collection."""
    return digest(store.folder / MANIFEST)[1]


def write_judgements(store: Store, judge: str, part: Part, result: Mapping[str, Any]) -> None:
    """Add a judge's result to ``judgements.json``, ``judgements.md`` and the plots.

    Raises:
        UserError: ``judgements.json`` cannot be read.
        RunError: the folder cannot be written.
    """
    held = read_judgements(store)
    held["judges"].setdefault(judge, {})[part] = {"collected": _collected(store), **result}
    held["judges"] = dict(sorted(held["judges"].items()))
    # All content is computed before the first file is replaced.
    content, text = _as_json(held, store.folder / JSON), as_markdown(tables(held))
    drawn = figures(held)
    with disk_errors(store.folder):
        with replacing(store.folder / JSON) as staged:
            staged.write_bytes(content)
        with replacing(store.folder / TEXT) as staged:
            staged.write_text(text, encoding="utf-8")
        with replacing(store.folder / PLOTS) as staged:
            staged.mkdir()
            for figure in drawn:
                write_png(figure, inside(staged, f"{figure.key}.png", source=JSON))


# --- tables ---------------------------------------------------------------------------------------


def tables(held: Mapping[str, Any]) -> list[Table]:
    """Return the tables that show the contents of ``judgements.json``."""
    tables_ = []
    for judge, parts in held["judges"].items():
        if "described" in parts:
            tables_ += _detection(judge, parts["described"])
        if "classified" in parts:
            tables_ += _classes(judge, parts["classified"])
    return tables_


def _detection(judge: str, result: Mapping[str, Any]) -> list[Table]:
    settings = result["settings"]
    note = (
        f"Given a description, the judge decides on which of {2 * settings['scored']} texts the "
        "unit fires. It fires on half of them, so chance is 50%; none was shown to the describer. "
        f"Units active on at least {settings['min_density']:g} of the tokens, at most "
        f"{settings['units']} of a layer; intervals of {percent(result['level'])} over units."
    )
    result_tables = []
    for sample in settings["samples"]:
        rows = []
        for kind, by_sample in result["detection"].items():
            total = by_sample[sample]
            for layer, means in [("all", total), *enumerate(total["layers"])]:
                measures = [shown(means[m], percent) for m in ("accuracy", "precision", "recall")]
                rows.append([NAMES[kind][0], str(layer), f"{means['units']:,}", *measures])
        head = ["units", "layer", "n", "accuracy", "precision", "recall"]
        result_tables.append(Table(f"Detection by {judge}: {sample} examples", head, rows, note))
    return result_tables


def _classes(judge: str, result: Mapping[str, Any]) -> list[Table]:
    result_tables = []
    for kind, total in result["shares"].items():
        rows = [
            [
                str(layer),
                f"{means['units']:,}",
                *(shown(means["shares"][name], percent) for name in class_names()),
            ]
            for layer, means in [("all", total), *enumerate(total["layers"])]
        ]
        head = ["layer", "n", *class_names()]
        note = f"Shares of units; intervals of {percent(result['level'])} over them."
        result_tables.append(Table(f"Classes by {judge}: {NAMES[kind][0]}", head, rows, note))
    return result_tables


# --- plots ----------------------------------------------------------------------------------------


def figures(held: Mapping[str, Any]) -> list[Figure]:
    """Return plots by layer of the contents of ``judgements.json``, without empty ones."""
    plots = [replace(plot, series=[s for s in plot.series if s.x]) for plot in _figures(held)]
    return [plot for plot in plots if plot.series]


def _figures(held: Mapping[str, Any]) -> list[Figure]:
    plots = []
    names = file_names(held["judges"])
    for judge, parts in held["judges"].items():
        name = names[judge]
        for sample in parts.get("described", {}).get("settings", {}).get("samples", ()):
            by_kind = {k: by[sample] for k, by in parts["described"]["detection"].items()}
            series = [
                _series(kind, [layer["accuracy"] for layer in means["layers"]])
                for kind, means in by_kind.items()
            ]
            title = f"Detection by {judge:.60}, {sample} examples (0.5: chance)"
            key = f"detection-{sample}-{name}"
            plots.append(Figure(key, title, "layer", "accuracy", series))
        shares = parts.get("classified", {}).get("shares", {})
        for class_ in CLASSES if shares else ():
            series = [
                _series(kind, [layer["shares"][class_] for layer in total["layers"]])
                for kind, total in shares.items()
            ]
            title = f"Classes by {judge:.60}: {class_}"
            plots.append(Figure(f"class-{class_}-{name}", title, "layer", "share of units", series))
    return plots


def file_names(judges: Iterable[str]) -> dict[str, str]:
    """Return, for each judge, a short and unique name to use in file names.

    Example:
        >>> file_names(["m-1", "m/1"])
        {'m-1': 'm-1', 'm/1': 'm-1-0b203ec7'}
    """
    names: dict[str, str] = {}
    for judge in judges:
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in judge)
        short = plain.encode()[:_NAME_BYTES].decode(errors="ignore")
        if short != plain or short in names.values():
            short = f"{short}-{hashlib.sha256(judge.encode()).hexdigest()[:8]}"
        names[judge] = short
    return names


def _series(kind: str, values: Sequence[Interval]) -> Series:
    """Return the line of a kind over layers with a mean; missing interval ends equal the mean."""
    points = [(x, v) for x, v in enumerate(values) if v["mean"] is not None]
    ends: list[list[float]] = []
    for end in ("mean", "low", "high"):
        ends.append([float(v["mean"] if v[end] is None else v[end]) for _, v in points])  # type: ignore[arg-type]
    return Series(*NAMES[kind], [float(x) for x, _ in points], *ends)
