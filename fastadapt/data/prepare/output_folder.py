"""Claim, check and finish the output folder of a selection of conversations.

::

    train.parquet, validation.parquet   the conversations
    manifest.json                       settings, source and counts; written last
    .prepare/                           the unfinished pass, see
                                        fastadapt.data.prepare.candidate_store
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from typing_extensions import NotRequired, TypedDict

from fastadapt.data.prepare.candidate_store import LEDGER, OLD, RESUME_ADVICE
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
#: Every file that a selection may write. An overwrite removes only these.
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
    """Entry of one Parquet file in ``manifest.json``."""

    rows: Count
    bytes: Count
    sha256: Sha256


class SplitCounts(TypedDict):
    """Counts of one split in ``manifest.json``; ``lengths`` is a histogram of lengths in tokens."""

    conversations: dict[str, Count]
    wanted: dict[str, Count]
    prompts: Count
    tokens: Count
    longest: Count
    with_markers: NotRequired[Count]  # absent from manifests of earlier versions
    lengths: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=1000)]


class Counts(TypedDict):
    """Counts of the rows read, drawn and left out, in ``manifest.json``."""

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
    """Claim the folder for this process, without changing its contents.

    Raises:
        UserError: the path is no folder, cannot be created, is in use by another process, or holds
            other files; the folder holds a selection, and neither ``resume`` nor ``overwrite`` is
            set; or it holds no selection to resume.
    """
    if resume and overwrite:
        raise UserError("--resume continues a selection, --overwrite removes it: choose one")
    folder = typed_path(output, "--output")
    workspace = _workspace(folder)
    _check(workspace, resume=resume, overwrite=overwrite)
    with workspace.claimed():
        workspace.sweep()
        yield folder


def _check(workspace: Workspace, *, resume: bool, overwrite: bool) -> None:
    folder, names = workspace.folder, workspace.names()
    begun = (folder / WORK / _SETTINGS).exists()
    # The settings are written before an older manifest is replaced and removed after the new one
    # is written: with settings in the folder, a manifest does not mean that a selection finished.
    finished = not begun and read_manifest(folder) is not None
    if resume:
        if not finished and not begun:
            raise UserError(
                f"--resume: {folder} holds no selection; leave --resume out to start one"
            )
    elif begun or finished:
        if not overwrite:
            state = "a selection already. Replace it"
            if begun:
                state = "an unfinished selection. Resume it (--resume), start again"
            raise workspace.refusal(f"holds {state} (--overwrite), or give another folder.")
    elif names:
        raise workspace.foreign("is not empty and holds no selection of conversations", names)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished selection, or None if the folder has no such manifest.

    Raises:
        UserError: the manifest is damaged.
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
    """Raise ``DocumentError`` if files, settings and counts of a manifest are inconsistent."""
    counts = manifest["counts"]
    for name in FILES.values():
        if name not in manifest["files"]:
            raise DocumentError(f"{source}: files: expected the key {name!r}")
    longest = {"max_tokens": manifest["settings"].get("max_tokens")}
    check(longest, dict[str, Positive], f"{source}: settings")
    if len(counts["train"]["lengths"]) != len(counts["validation"]["lengths"]):
        raise DocumentError(f"{source}: counts: the splits have different numbers of 'lengths'")
    for split in SPLITS:
        for key in ("conversations", "wanted"):
            if counts[split][key].keys() != counts["domains"].keys():
                raise DocumentError(
                    f"{source}: counts.{split}.{key}: expected the keys of counts.domains"
                )


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ``RunError`` if a file of a finished selection differs from its manifest."""
    for name, expected in manifest["files"].items():
        path = inside(folder, name, source=str(folder / MANIFEST))
        try:
            actual = digest(path)
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        if actual != (expected["bytes"], expected["sha256"]):
            raise RunError(
                f"{path} has another size or SHA-256 than in {MANIFEST}; replace the selection "
                "with --overwrite"
            )


def begin(folder: Path, settings: Settings) -> None:
    """Remove the files of an earlier selection, and write the settings of this one."""
    text = json.dumps(settings, ensure_ascii=False)
    _workspace(folder).start(lambda staged: staged.write_text(text, encoding="utf-8"))


def check_same(folder: Path, settings: Settings) -> None:
    """Raise ``UserError`` if the selection in the folder was started with other settings."""
    path = folder / WORK / _SETTINGS
    if has_file(path):
        try:
            old = read_json(path, dict[str, Any])
        except DocumentError as error:
            raise UserError(f"{error}. Start again with --overwrite.") from error
    else:
        old = (read_manifest(folder) or {"settings": {}})["settings"]
    differing = [key for key in settings if key not in old or not same(settings[key], old[key])]
    if differing:
        changes = "; ".join(f"{key}: {settings[key]!r}, was {old.get(key)!r}" for key in differing)
        raise UserError(
            f"--resume: the selection in {folder} was started with other settings "
            f"({changes:.400}). Give the old settings, or start again with --overwrite."
        )


def finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, which completes the selection, and remove the saved progress.

    Raises:
        RunError: the manifest cannot be written.
    """
    with disk_errors(folder / MANIFEST, RESUME_ADVICE), replacing(folder / MANIFEST) as staged:
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        staged.write_text(text, encoding="utf-8")
    clean(folder)


def clean(folder: Path) -> None:
    """Remove the saved progress of the pass over the source, which a finished selection lacks.

    The settings are removed last: while a file is left, the selection counts as unfinished, and
    ``--resume`` removes the rest.
    """
    for name in (LEDGER, f"{LEDGER}-journal", *OLD, _SETTINGS):
        remove(folder / WORK / name)
