"""The folder that a selection is written into: who may write there, and what it says of itself.

::

    train.parquet, validation.parquet   the conversations
    manifest.json                       where they come from: written last, so it means "finished"
    .prepare/                           a reading in progress (see
    fastadapt.data.prepare.candidate_store)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.data.prepare.candidate_store import GO_ON, LEDGER, OLD
from fastadapt.data.prepare.selection import SPLITS
from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import digest, disk_errors, remove, replacing
from fastadapt.io.documents import Count, DocumentError, Positive, Sha256, check, read_json, same
from fastadapt.io.names import has_file, inside, typed_path
from fastadapt.io.workspace import Workspace

MANIFEST = "manifest.json"
FORMAT = "fastadapt data"
SCHEMA_VERSION = 1
FILES = {split: f"{split}.parquet" for split in SPLITS}
WORK = ".prepare"
_SETTINGS, _LOCK = "settings.json", "lock"
#: Everything that is ever written; an overwrite removes this and nothing else.
_WRITTEN = (
    MANIFEST,
    *FILES.values(),
    f"{WORK}/{_SETTINGS}",
    f"{WORK}/{LEDGER}*",
    *(f"{WORK}/{name}" for name in OLD),
)


def _workspace(folder: Path) -> Workspace:
    return Workspace(
        folder,
        "--output",
        "writing to",
        replaced=(*FILES.values(), MANIFEST, f"{WORK}/{_SETTINGS}"),
        written=_WRITTEN,
        marker=f"{WORK}/{_SETTINGS}",
        lock=f"{WORK}/{_LOCK}",
    )


Settings = Mapping[str, Any]


class WrittenFile(TypedDict):
    """A file of a selection, as its manifest has it."""

    rows: Count
    bytes: Count
    sha256: Sha256


class SplitCounts(TypedDict):
    """What a split holds; ``lengths`` is a histogram."""

    conversations: dict[str, Count]
    wanted: dict[str, Count]
    prompts: Count
    tokens: Count
    longest: Count
    with_markers: NotRequired[Count]  # absent from manifests of earlier versions
    lengths: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=1000)]


class Counts(TypedDict):
    """What was read, taken and left out."""

    rows: Count
    domains: dict[str, Count]
    left_out_of_source: dict[str, Count]
    left_out_of_drawn: dict[str, dict[str, Count]]
    train: SplitCounts
    validation: SplitCounts


class Manifest(TypedDict):
    """``manifest.json`` of a finished selection."""

    format: Literal["fastadapt data"]
    schema_version: Literal[1]
    settings: dict[str, Any]
    source: dict[str, Any]
    counts: Counts
    files: dict[str, WrittenFile]


@contextmanager
def open_output(output: str, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Claim the folder for this process; nothing in it is changed yet.

    Raises:
        UserError: it is no folder or cannot be made, is in use by another process, holds something
            else, holds a selection (without ``resume`` or ``overwrite``), or holds none to resume.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a selection, --overwrite removes it: choose one")
    folder = typed_path(output, "--output")
    workspace = _workspace(folder)
    _check(workspace, resume=resume, overwrite=overwrite)
    with workspace.claimed():
        workspace.sweep()
        yield folder


def _check(workspace: Workspace, *, resume: bool, overwrite: bool) -> None:
    folder, names = workspace.folder, workspace.names()
    begun = (folder / WORK / _SETTINGS).exists()
    # Where a selection is begun, the manifest is an older one's or the last thing still to write.
    finished = not begun and read_manifest(folder) is not None
    if resume:
        if not finished and not begun:
            raise UserError(
                f"--resume: {folder} holds no selection; leave --resume out to start one"
            )
    elif begun:
        if not overwrite:
            raise UserError(
                f"--output: {folder} holds a selection that was not finished. Go on with it "
                "(--resume), begin again (--overwrite), or give another folder."
            )
    elif finished:
        if not overwrite:
            raise UserError(
                f"--output: {folder} holds a selection already. Replace it (--overwrite), or give "
                "another folder."
            )
    elif names:
        raise workspace.foreign("is not empty and holds no selection", names)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished selection; None where there is none, or one of something else.

    Raises:
        UserError: it is damaged.
    """
    path = folder / MANIFEST
    if not has_file(path):
        return None
    try:
        manifest: Any = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            return None
        check(manifest, Manifest, str(path))
        _check_counts(manifest, str(path))
    except DocumentError as error:
        raise UserError(
            f"{error}. Nothing in the folder was touched: remove the selection in it, or give "
            "another --output."
        ) from error
    return manifest


def _check_counts(manifest: Mapping[str, Any], source: str) -> None:
    """Raise ``DocumentError`` where files, settings and counts of a manifest do not go together."""
    counts = manifest["counts"]
    for name in FILES.values():
        if name not in manifest["files"]:
            raise DocumentError(f"{source}: files: expected the key {name!r}")
    longest = {"max_tokens": manifest["settings"].get("max_tokens")}
    check(longest, dict[str, Positive], f"{source}: settings")
    if len(counts["train"]["lengths"]) != len(counts["validation"]["lengths"]):
        raise DocumentError(f"{source}: counts: expected as many 'lengths' in both splits")
    for split in SPLITS:
        for key in ("conversations", "wanted"):
            if counts[split][key].keys() != counts["domains"].keys():
                raise DocumentError(f"{source}: counts.{split}.{key}: expected the keys of domains")


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ``RunError`` where a file of a finished selection is not what its manifest says."""
    for name, expected in manifest["files"].items():
        path = inside(folder, name, source=str(folder / MANIFEST))
        try:
            found = digest(path)
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        if found != (expected["bytes"], expected["sha256"]):
            raise RunError(f"{path} is not what {MANIFEST} says; make it again with --overwrite")


def begin(folder: Path, settings: Settings) -> None:
    """Remove what an earlier selection left in the folder, and note the settings of this one."""
    text = json.dumps(settings, ensure_ascii=False)
    _workspace(folder).start(lambda staged: staged.write_text(text, encoding="utf-8"))


def check_same(folder: Path, settings: Settings) -> None:
    """Raise ``UserError`` naming the settings in which this command differs from what was begun."""
    path = folder / WORK / _SETTINGS
    if has_file(path):
        try:
            then = read_json(path, dict[str, Any])
        except DocumentError as error:
            raise UserError(f"{error}. Begin again with --overwrite.") from error
    else:
        then = (read_manifest(folder) or {"settings": {}})["settings"]
    differing = [key for key in settings if key not in then or not same(settings[key], then[key])]
    if differing:
        told = "; ".join(f"{key}: {settings[key]!r}, was {then.get(key)!r}" for key in differing)
        raise UserError(
            f"--resume: the selection in {folder} was begun with other settings ({told:.400}). "
            "Give the old ones, or begin again with --overwrite."
        )


def finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, after which nothing else is needed.

    Raises:
        RunError: it cannot be written.
    """
    with disk_errors(folder / MANIFEST, GO_ON), replacing(folder / MANIFEST) as staged:
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        staged.write_text(text, encoding="utf-8")
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what the reading of a finished selection needed, and what a kill left of it."""
    for name in (_SETTINGS, LEDGER, f"{LEDGER}-journal", *OLD):
        remove(folder / WORK / name)
