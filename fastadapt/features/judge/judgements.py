"""What judges said, put into the store: rows, ``judgements.json``, ``judgements.md`` and plots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import TypedDict

from fastadapt.errors import UserError
from fastadapt.evaluation.drawing import write_png
from fastadapt.evaluation.figures import Figure, Series
from fastadapt.evaluation.result_schema import Interval
from fastadapt.evaluation.tables import Table, as_markdown, shown
from fastadapt.features.judge.questions import CLASSES
from fastadapt.features.schema import MANIFEST, TABLES, Kind, SampleKind
from fastadapt.features.store import Store
from fastadapt.io.atomic import digest, disk_errors, replacing
from fastadapt.io.documents import Count, DocumentError, Positive, check, read_json
from fastadapt.io.names import has_file
from fastadapt.wording import percent

SCHEMA_VERSION = 1
JSON, TEXT, PLOTS = "judgements.json", "judgements.md", "judgements"
#: What units of a kind are called, and the colour of their line, as a kind of student.
NAMES: Mapping[str, tuple[str, str]] = {
    "adapter": ("adapter's features", "transcoder"),
    "base": ("base's neurons", "base"),
    "target": ("target's neurons", "target"),
}
Part = Literal["described", "classified"]


_Level = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class _Means(TypedDict):
    accuracy: Interval
    precision: Interval
    recall: Interval
    units: Count


class _Detection(_Means):
    layers: list[_Means]


class _Settings(TypedDict):
    """Settings of ``features describe`` that the tables name."""

    scored: Positive
    units: Positive
    min_density: Annotated[float, msgspec.Meta(ge=0, le=1)]
    samples: list[SampleKind]


class _Described(TypedDict):
    settings: _Settings
    level: _Level
    detection: dict[Kind, dict[SampleKind, _Detection]]


class _Shares(TypedDict):
    shares: dict[str, Interval]
    units: Count


class _LayerShares(_Shares):
    layers: list[_Shares]


class _Classified(TypedDict):
    level: _Level
    shares: dict[Kind, _LayerShares]


_PARTS: Mapping[str, Any] = {"described": _Described, "classified": _Classified}


class _Collected(TypedDict):
    collected: str


class _Held(TypedDict):
    schema_version: int
    judges: dict[str, dict[Part, _Collected]]


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
    try:
        held = read_json(path, _Held)
    except DocumentError as error:
        raise UserError(f"{error}; remove the file, and judge again") from None
    version, judges = held["schema_version"], held["judges"]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {version!r}, this fastadapt reads {SCHEMA_VERSION}"
        )
    for judge, parts in judges.items():
        for part, told in parts.items():
            _check_part(told, part, f"{path}: judges[{judge!r:.80}].{part}")
    mine = _collected(store)
    kept = {
        judge: same
        for judge, parts in judges.items()
        if (same := {part: told for part, told in parts.items() if told.get("collected") == mine})
    }
    return {"schema_version": SCHEMA_VERSION, "judges": kept}


def _check_part(told: Any, part: Part, where: str) -> None:
    """Raise where what a judge said lacks what the tables and plots show."""
    check(told, _PARTS[part], where)
    if part == "described":
        for kind, by_sample in told["detection"].items():
            if missing := set(told["settings"]["samples"]) - by_sample.keys():
                raise UserError(f"{where}.detection.{kind}: no {', '.join(sorted(missing))}")
    else:
        for kind, shares in told["shares"].items():
            for one in (shares, *shares["layers"]):
                if missing := set(CLASSES) - one["shares"].keys():
                    raise UserError(f"{where}.shares.{kind}: no {', '.join(sorted(missing))}")


def _collected(store: Store) -> str:
    """Tells what a store was collected from: SHA-256 of its manifest."""
    return digest(store.folder / MANIFEST)[1]


def write_judgements(store: Store, judge: str, part: Part, result: Mapping[str, Any]) -> None:
    """Write what a judge said, beside what it and others said before, as JSON, tables and plots.

    Raises:
        RunError: the folder cannot be written.
    """
    held = read_judgements(store)
    held["judges"].setdefault(judge, {})[part] = {"collected": _collected(store), **result}
    held["judges"] = dict(sorted(held["judges"].items()))
    with disk_errors(store.folder):
        with replacing(store.folder / JSON) as staged:
            text = json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False)
            staged.write_text(text + "\n", encoding="utf-8")
        with replacing(store.folder / TEXT) as staged:
            staged.write_text(as_markdown(tables(held)), encoding="utf-8")
        with replacing(store.folder / PLOTS) as staged:
            staged.mkdir()
            for figure in figures(held):
                write_png(figure, staged / f"{figure.key}.png")


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
                *(shown(i, percent) for i in some["shares"].values()),
            ]
            for where, some in [("all", told), *enumerate(told["layers"])]
        ]
        head = ["layer", "n", *told["shares"]]
        note = f"Shares of units; intervals of {percent(result['level'])} over them."
        found.append(Table(f"Classes by {judge}: {NAMES[kind][0]}", head, rows, note))
    return found


# --- as plots -------------------------------------------------------------------------------------


def figures(held: Mapping[str, Any]) -> list[Figure]:
    """Plots of everything in ``judgements.json``: by layer, adapter beside neurons."""
    found = []
    for judge, parts in held["judges"].items():
        name = _file_name(judge)
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


def _file_name(judge: str) -> str:
    """A judge's name as a part of the name of a file; a long one is cut, its digest added."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in judge)
    short = name.encode()[:80].decode(errors="ignore")
    digest_of = hashlib.sha256(judge.encode()).hexdigest()
    return name if name == short else f"{short}-{digest_of[:8]}"


def _series(kind: str, values: Sequence[Interval]) -> Series:
    """Of the layers that have a value; an interval that is not there has no width."""
    kept = [(x, v) for x, v in enumerate(values) if v["mean"] is not None]
    ends: list[list[float]] = []
    for end in ("mean", "low", "high"):
        ends.append([float(v["mean"] if v[end] is None else v[end]) for _, v in kept])  # type: ignore[arg-type]
    return Series(*NAMES[kind], [float(x) for x, _ in kept], *ends)
