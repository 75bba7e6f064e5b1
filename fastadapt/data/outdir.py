"""The folder that a selection is written into: who may write there, and what it says of itself.

::

    train.parquet, validation.parquet   the conversations
    manifest.json                       where they come from: written last, so it means "finished"
    .prepare/                           a reading in progress (see fastadapt.data.spool)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastadapt.data.selection import SPLITS
from fastadapt.data.spool import GO_ON, JOURNAL, ROWS
from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import (
    cannot_write,
    digest,
    disk_errors,
    locked,
    make_folder,
    replacing,
    sweep,
    unstaged,
)
from fastadapt.io.documents import DocumentError, read_json

MANIFEST = "manifest.json"
FORMAT = "fastadapt data"
SCHEMA_VERSION = 1
FILES = {split: f"{split}.parquet" for split in SPLITS}
WORK = ".prepare"
_SETTINGS, _LOCK = "settings.json", "lock"
#: What is written beside its place first; see :func:`fastadapt.io.atomic.replacing`.
_REPLACED = (*FILES.values(), MANIFEST)
#: Everything that is ever written; an overwrite removes this and nothing else.
_WRITTEN = (
    *FILES.values(),
    MANIFEST,
    f"{WORK}/{_SETTINGS}",
    f"{WORK}/{ROWS}",
    f"{WORK}/{JOURNAL}",
)

Settings = Mapping[str, Any]


@contextmanager
def open_output(output: str, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Claim the folder for this process; nothing in it is changed yet.

    Raises:
        UserError: it is no folder or cannot be made, is in use by another process, holds something
            else, holds a selection (without ``resume`` or ``overwrite``), or holds none to resume.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with a selection, --overwrite removes it: choose one")
    folder = Path(output).expanduser()
    _check(folder, resume=resume, overwrite=overwrite)
    made = not folder.exists()
    try:
        make_folder(folder / WORK)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made: {error.strerror}") from error
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / WORK / _LOCK))
        except BlockingIOError:
            raise UserError(f"--output: another process is writing to {folder}") from None
        except OSError as error:
            raise UserError(f"--output: {folder} cannot be written: {error.strerror}") from error
        try:
            _sweep(folder)
            yield folder
        finally:
            if not (folder / WORK / _SETTINGS).exists():
                shutil.rmtree(folder / WORK)
                if made and not any(folder.iterdir()):
                    folder.rmdir()


def _check(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; expected a folder or a new name")
    try:
        entries = (
            [path for path in folder.iterdir() if path.name != WORK] if folder.exists() else []
        )
        found = [path for path in entries if unstaged(path.name) not in _REPLACED]
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be read: {error.strerror}") from error
    finished = _is_ours(folder)
    begun = (folder / WORK / _SETTINGS).exists()
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
    elif found:
        names = ", ".join(sorted(path.name for path in found)[:3])
        raise UserError(
            f"--output: {folder} is not empty and holds no selection (it holds {names}); nothing "
            "in it was touched. Give a new folder."
        )


def _is_ours(folder: Path) -> bool:
    return (read_manifest(folder) or {}).get("format") == FORMAT


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished selection; None where there is none."""
    try:
        manifest = read_json(folder / MANIFEST)
    except DocumentError:
        return None
    return manifest if isinstance(manifest, dict) else None


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ``RunError`` where a file of a finished selection is not what its manifest says."""
    for name, expected in manifest["files"].items():
        try:
            found = digest(folder / name)
        except OSError as error:
            raise RunError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != (expected["bytes"], expected["sha256"]):
            raise RunError(
                f"{folder / name} is not what {MANIFEST} says; make it again with --overwrite"
            )


def begin(folder: Path, settings: Settings) -> None:
    """Remove what an earlier selection left in the folder, and note the settings of this one."""
    try:
        _remove(folder, _WRITTEN)
        with replacing(folder / WORK / _SETTINGS) as staged:
            staged.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        told = cannot_write(folder, error, "Run the same command again.")
        raise RunError(f"--output: {told}") from error


def check_same(folder: Path, settings: Settings) -> None:
    """Raise ``UserError`` naming the settings in which this command differs from what was begun."""
    manifest = read_manifest(folder)
    path = folder / WORK / _SETTINGS
    if path.exists():
        then = read_json(path, dict[str, Any])
    else:
        then = manifest["settings"] if manifest is not None else {}
    differing = [key for key in settings if settings[key] != then.get(key)]
    if differing:
        told = "; ".join(f"{key}: {settings[key]!r}, was {then.get(key)!r}" for key in differing)
        raise UserError(
            f"--resume: the selection in {folder} was begun with other settings ({told:.400}). "
            "Give the old ones, or begin again with --overwrite."
        )


def _remove(folder: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def _sweep(folder: Path) -> None:
    """Remove what kills left half-written; the caller holds the folder."""
    with disk_errors(folder):
        sweep(*(folder / name for name in _REPLACED), folder / WORK / _SETTINGS)


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
    _remove(folder, [f"{WORK}/{name}" for name in (_SETTINGS, JOURNAL, ROWS)])
