"""Checkpoints that a kill at any moment cannot spoil.

A set is one folder ``step-00000120/`` of safetensors and JSON files and a ``manifest.json`` with
the size and SHA-256 of each. It is written as a sibling ``.tmp-step-00000120-<uuid>/``, every file
is synced, the manifest comes last, and one rename commits it: a set is whole or it is absent. Older
sets go only after the new one was read back and verified. A checksum is needed because safetensors
reads a file with a flipped bit without complaint. No file is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from typing_extensions import TypedDict

from fastadapt.distributed.ranks import ALONE, Ranks
from fastadapt.errors import RunError, UserError
from fastadapt.io.atomic import digest as file_digest
from fastadapt.io.atomic import (
    free_space,
    is_full,
    make_folder,
    save_tensors,
    staged_beside,
    sync_folder,
    sync_tree,
)
from fastadapt.io.documents import Count, DocumentError, Sha256, check, read_json
from fastadapt.io.names import inside
from fastadapt.training.checkpoint import tensor_files
from fastadapt.training.checkpoint.tensor_files import Checkpoint

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SCALARS = "state.json"
_STAGED = ".tmp-"
_SET = re.compile(r"step-(\d{8,})")


class FileEntry(TypedDict):
    """A file of a set, in its manifest."""

    bytes: Count
    sha256: Sha256


class Manifest(TypedDict):
    """``manifest.json``; ``sha256`` is of all the rest."""

    schema_version: int
    step: Count
    files: dict[str, FileEntry]
    sha256: Sha256


class CheckpointDamagedError(Exception):
    """A set does not hold what its manifest says; the message is the reason."""


@dataclass(frozen=True)
class PassedOver:
    """A set that was not used, and why."""

    path: Path
    reason: str


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: tensor_files.Groups,
    scalars: Mapping[str, Any],
    *,
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the set of ``step`` and remove all but the newest ``keep`` sets up to it.

    Args:
        folder: the run's ``checkpoints/`` folder, made if absent.
        step: optimiser steps done, >= 0.
        tensors: group -> name -> tensor (any device and dtype, no two sharing memory).
        scalars: JSON values, written to ``state.json``; no NaN or infinity.
        keep: how many sets stay, >= 1, the new one counted.
        ranks: all of them must call this. Each writes its shares of what is shared out; the rest
            is rank 0's.

    Returns:
        The folder of the committed set.

    Raises:
        RunError: the set could not be written (no space, no permission, read-only); earlier sets
            are as they were. Also where a verified set of this step is already there.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
    shared, whole = tensor_files.split(tensors)
    final = folder / f"step-{step:08d}"

    def stage() -> Path:
        staged = staged_beside(final)
        with _told(folder, step, staged):
            make_folder(folder)
            staged.mkdir()
        return staged

    def complete() -> Path:
        with _told(folder, step, staged):
            if len(list(staged.iterdir())) < files:
                raise OSError(
                    f"{files} ranks wrote their shares, and rank 0 sees fewer files: run.output "
                    "must be on a file system that all machines share"
                )
            _write_set(staged, step, whole, scalars)
            sync_tree(staged, last=MANIFEST)
            _commit(staged, final)
            sync_folder(folder)
        try:
            verify_checkpoint(final)
        except CheckpointDamagedError as error:
            raise RunError(
                f"checkpoint {final} does not read back as it was written: {error}. Older "
                "checkpoints were kept. Check the disk, then go on with --resume."
            ) from error
        _prune(folder, step, keep)
        return final

    staged, files = ranks.on_main(stage), 0
    if shared:
        with _told(folder, step, staged):
            files = tensor_files.write_shares(staged, shared, ranks)
    return ranks.on_main(complete)


@contextmanager
def _told(folder: Path, step: int, staged: Path) -> Iterator[None]:
    """Turn what goes wrong on the disk into a :class:`RunError`; nothing staged is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise RunError(_why_not_saved(folder, step, error)) from error


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read a set's manifest and check every file against it.

    Returns:
        The manifest.

    Raises:
        CheckpointDamagedError: with the reason: anything missing, or of another size, SHA-256, step
            or schema.
    """
    manifest = _read_json(path, MANIFEST)
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise CheckpointDamagedError(f"{MANIFEST} does not match its own SHA-256")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointDamagedError(
            f"{MANIFEST} has schema version {manifest.get('schema_version')!r}, "
            f"this fastadapt reads {SCHEMA_VERSION}"
        )
    try:
        check(manifest, Manifest, MANIFEST)
    except DocumentError as error:
        raise CheckpointDamagedError(str(error)) from None
    if path.name != f"step-{manifest['step']:08d}":
        raise CheckpointDamagedError(
            f"{MANIFEST} is of step {manifest['step']}, not of {path.name}"
        )
    held = {file.name for file in path.glob("*.safetensors")}
    if SCALARS not in manifest["files"] or not any(name in held for name in manifest["files"]):
        raise CheckpointDamagedError(f"{MANIFEST}: files: expected {SCALARS} and tensors")
    if more := sorted(held - manifest["files"].keys()):
        raise CheckpointDamagedError(f"{more[0]} is not one of the files in {MANIFEST}")
    for name, expected in manifest["files"].items():
        try:
            size, digest = file_digest(inside(path, name, source=MANIFEST))
        except UserError as error:
            raise CheckpointDamagedError(str(error)) from None
        except FileNotFoundError:
            raise CheckpointDamagedError(f"{name} is missing") from None
        except OSError as error:
            raise CheckpointDamagedError(f"{name} cannot be read: {error}") from error
        if size != expected["bytes"]:
            raise CheckpointDamagedError(f"{name} has {size} bytes, expected {expected['bytes']}")
        if digest != expected["sha256"]:
            raise CheckpointDamagedError(f"the SHA-256 of {name} differs from the manifest's")
    return manifest


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[PassedOver]]:
    """Find the newest set that verifies.

    Returns:
        The checkpoint (None where no set verifies) and the newer sets that were passed over.
    """
    passed: list[PassedOver] = []
    for step, path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
            scalars = _read_json(path, SCALARS)
            tensor_files.check_headers(path)
        except (CheckpointDamagedError, UserError, OSError) as error:
            passed.append(PassedOver(path, str(error)))
            continue
        return Checkpoint(step, path, scalars), passed
    return None, passed


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return ``(step, path)`` of every set in the folder, oldest first, verified or not."""
    if not folder.is_dir():
        return []
    found = ((_SET.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def sweep(folder: Path) -> list[Path]:
    """Remove what an interrupted save left behind; return what was removed."""
    if not folder.is_dir():
        return []
    stale = sorted(path for path in folder.iterdir() if path.name.startswith(_STAGED))
    for path in stale:
        _delete(path)
    return stale


def _write_set(
    staged: Path,
    step: int,
    tensors: tensor_files.Groups,
    scalars: Mapping[str, Any],
) -> None:
    for group, members in tensors.items():
        called = tensor_files.named({group: members})
        save_tensors(called, staged / f"{group}.safetensors")
    (staged / SCALARS).write_text(json.dumps(dict(scalars), allow_nan=False, sort_keys=True))
    files = {}
    for path in sorted(staged.iterdir()):
        size, digest = file_digest(path)
        files[path.name] = {"bytes": size, "sha256": digest}
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
    manifest["sha256"] = _manifest_digest(manifest)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _commit(staged: Path, final: Path) -> None:
    """Rename the staged set into place. A damaged set in its place goes first, a good one stays."""
    if final.exists():
        try:
            verify_checkpoint(final)
        except CheckpointDamagedError:
            _discard(final)
        else:
            raise FileExistsError(
                errno.EEXIST, "a verified checkpoint of this step is there", final
            )
    os.rename(staged, final)


def _prune(folder: Path, step: int, keep: int) -> None:
    older = [path for number, path in list_checkpoints(folder) if number <= step]
    try:
        for path in older[:-keep]:
            _discard(path)
    except OSError as error:
        raise RunError(
            f"checkpoint of step {step} was saved, but an older one could not be removed: {error}. "
            f"Remove it from {folder} by hand, then go on with --resume."
        ) from error


def _discard(path: Path) -> None:
    """Remove a set; the rename comes first, so that no half-removed set bears a set's name."""
    doomed = staged_beside(path)
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Remove a folder; of a link to one, which lies elsewhere by someone's choice, the link."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _why_not_saved(folder: Path, step: int, error: Exception) -> str:
    committed = list_checkpoints(folder)
    kept = f"The one of step {committed[-1][0]} is intact." if committed else "There is none yet."
    advice = "See to the folder and its disk"
    if is_full(error):
        advice = f"{free_space(folder)} are free: make room, or lower run.keep_checkpoints"
    return (
        f"checkpoint of step {step} could not be written to {folder}: {error}. {kept} {advice}, "
        "then go on with --resume."
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not (path / name).exists():
        raise CheckpointDamagedError(f"{name} is missing")
    try:
        values: dict[str, Any] = read_json(path / name, dict[str, Any])
    except DocumentError as error:
        raise CheckpointDamagedError(f"{name} cannot be read: {error}") from error
    return values


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
