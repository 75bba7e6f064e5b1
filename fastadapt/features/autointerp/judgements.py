"""What judges said, put into the store: rows, ``judgements.json``, ``judgements.md`` and plots."""

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
    Held,
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
#: What units of a kind are called, and the colour of their line, as a kind of student.
NAMES: Mapping[str, tuple[str, str]] = {
    "adapter": ("adapter's features", "transcoder"),
    "base": ("base's neurons", "base"),
    "target": ("target's neurons", "target"),
}
_ADVICE = "remove the file, and judge again"
_NAME_BYTES = 200  # of a judge's name in the name of a file


def add_rows(
    store: Store, table: str, kind: Kind, judge: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Put a judge's rows into a table of the store; those of other judges stay.

    Raises:
        RunError: the folder cannot be written.
    """
    added = pa.Table.from_pylist(list(rows), schema=TABLES[table])
    if store.has(table, kind):
        held = store.read(table, kind)
        added = pa.concat_tables([held.filter(pc.not_equal(held["judge"], judge)), added])
    store.add(table, added, kind)


def read_judgements(store: Store) -> dict[str, Any]:
    """The contents of ``judgements.json``, of judges that spoke of these features.

    Nothing where there is none yet; what was said of features that were collected here before, of
    another adapter or other texts, is left out.

    Raises:
        UserError: it cannot be read.
    """
    path = store.folder / JSON
    if not has_file(path):
        return {"schema_version": SCHEMA_VERSION, "judges": {}}
    plain = _read(path)
    try:
        check(plain, Held, str(path))
        judges, mine = plain["judges"], _collected(store)
        kept = {}
        for judge, parts in judges.items():
            source = f"{path}: judges[{judge!r:.80}]"
            check(parts, Parts, source)
            told = {part: parts[part] for part in PARTS if part in parts}
            same = {part: one for part, one in told.items() if one.get("collected") == mine}
            check_fit(same, store, source)
            if same:
                kept[judge] = same
        held = {"schema_version": SCHEMA_VERSION, "judges": kept}
        _as_json(held, path)
    except UserError as error:
        raise UserError(f"{error}; {_ADVICE}") from None
    return held


def check_addable(store: Store, judge: str) -> None:
    """Raise ``UserError`` where nothing can be added: before calls are paid for."""
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
            f"{path}: schema_version is {version!r:.80}, this fastadapt reads {SCHEMA_VERSION}"
        )
    return plain


def _as_json(held: Mapping[str, Any], path: Path) -> bytes:
    try:
        text = json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except ValueError as error:  # half of a pair of surrogates, or a number that is infinite
        raise UserError(f"{path}: a value that cannot be written: {error}") from None


def _collected(store: Store) -> str:
    """Tells what a store was collected from: SHA-256 of its manifest."""
    return digest(store.folder / MANIFEST)[1]


def write_judgements(store: Store, judge: str, part: Part, result: Mapping[str, Any]) -> None:
    """Write what a judge said, beside what it and others said before, as JSON, tables and plots.

    Raises:
        UserError: what is there cannot be read.
        RunError: the folder cannot be written.
    """
    held = read_judgements(store)
    held["judges"].setdefault(judge, {})[part] = {"collected": _collected(store), **result}
    held["judges"] = dict(sorted(held["judges"].items()))
    # All of it is made before any of it is replaced.
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


# --- as tables ------------------------------------------------------------------------------------


def tables(held: Mapping[str, Any]) -> list[Table]:
    """Tables of everything in ``judgements.json``."""
    found = []
    for judge, parts in held["judges"].items():
        if "described" in parts:
            found += _detection(judge, parts["described"])
        if "classified" in parts:
            found += _classes(judge, parts["classified"])
    return found


def _detection(judge: str, result: Mapping[str, Any]) -> list[Table]:
    settings = result["settings"]
    note = (
        f"Told a description, which of {2 * settings['scored']} texts fire the unit? Half of them "
        "do, so 50% is what knowing nothing gives; none was shown to the describer. Units active "
        f"on at least {settings['min_density']:g} of the tokens, at most {settings['units']} of a "
        f"layer; intervals of {percent(result['level'])} over units."
    )
    found = []
    for sample in settings["samples"]:
        rows = []
        for kind, by_sample in result["detection"].items():
            told = by_sample[sample]
            for where, means in [("all", told), *enumerate(told["layers"])]:
                measures = [shown(means[m], percent) for m in ("accuracy", "precision", "recall")]
                rows.append([NAMES[kind][0], str(where), f"{means['units']:,}", *measures])
        head = ["units", "layer", "n", "accuracy", "precision", "recall"]
        found.append(Table(f"Detection by {judge}: {sample} examples", head, rows, note))
    return found


def _classes(judge: str, result: Mapping[str, Any]) -> list[Table]:
    found = []
    for kind, told in result["shares"].items():
        rows = [
            [
                str(where),
                f"{some['units']:,}",
                *(shown(some["shares"][name], percent) for name in class_names()),
            ]
            for where, some in [("all", told), *enumerate(told["layers"])]
        ]
        head = ["layer", "n", *class_names()]
        note = f"Shares of units; intervals of {percent(result['level'])} over them."
        found.append(Table(f"Classes by {judge}: {NAMES[kind][0]}", head, rows, note))
    return found


# --- as plots -------------------------------------------------------------------------------------


def figures(held: Mapping[str, Any]) -> list[Figure]:
    """Plots of everything in ``judgements.json``: by layer, adapter beside neurons.

    What has a value of no layer has no line, and a plot without lines is none.
    """
    found = [replace(one, series=[s for s in one.series if s.x]) for one in _figures(held)]
    return [figure for figure in found if figure.series]


def _figures(held: Mapping[str, Any]) -> list[Figure]:
    found = []
    names = file_names(held["judges"])
    for judge, parts in held["judges"].items():
        name = names[judge]
        for sample in parts.get("described", {}).get("settings", {}).get("samples", ()):
            told = {k: by[sample] for k, by in parts["described"]["detection"].items()}
            series = [
                _series(kind, [layer["accuracy"] for layer in means["layers"]])
                for kind, means in told.items()
            ]
            title = f"Detection by {judge:.60}, {sample} examples (0.5: chance)"
            key = f"detection-{sample}-{name}"
            found.append(Figure(key, title, "layer", "accuracy", series))
        shares = parts.get("classified", {}).get("shares", {})
        for class_ in CLASSES if shares else ():
            series = [
                _series(kind, [layer["shares"][class_] for layer in told["layers"]])
                for kind, told in shares.items()
            ]
            title = f"Classes by {judge:.60}: {class_}"
            found.append(Figure(f"class-{class_}-{name}", title, "layer", "share of units", series))
    return found


def file_names(judges: Iterable[str]) -> dict[str, str]:
    """What each judge is called in the names of files: short, plain, and no two alike.

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
    """Of the layers that have a value; an interval that is not there has no width."""
    kept = [(x, v) for x, v in enumerate(values) if v["mean"] is not None]
    ends: list[list[float]] = []
    for end in ("mean", "low", "high"):
        ends.append([float(v["mean"] if v[end] is None else v[end]) for _, v in kept])  # type: ignore[arg-type]
    return Series(*NAMES[kind], [float(x) for x, _ in kept], *ends)
