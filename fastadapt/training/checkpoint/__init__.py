"""Checkpoints that are written atomically and verified by checksums.

A checkpoint is a folder ``step-00000120/`` of safetensors and JSON files, with the size and SHA-256
of each in ``manifest.json``. It is first written to a sibling folder
``.tmp-step-00000120-<uuid>/``: every file is synced, the manifest last. One rename then commits it,
so a checkpoint is either complete or absent, also after a kill. Older checkpoints are removed after
the new one was read back and verified. Checksums are needed because safetensors reads a file with a
flipped bit without an error. No file is a pickle.
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
_NAME = re.compile(r"step-(\d{8,})")


class FileEntry(TypedDict):
    """Entry of one checkpoint file in ``manifest.json``."""

    bytes: Count
    sha256: Sha256


class Manifest(TypedDict):
    """Contents of ``manifest.json``; ``sha256`` is the digest of the other keys."""

    schema_version: int
    step: Count
    files: dict[str, FileEntry]
    sha256: Sha256


class CheckpointDamagedError(Exception):
    """Raised when a checkpoint differs from its manifest; the message is the reason."""


@dataclass(frozen=True)
class PassedOver:
    """Checkpoint that is not used because verification failed, and the reason."""

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
    """Write the checkpoint of ``step``, then remove all but the newest ``keep`` up to that step.

    Args:
        folder: the run's ``checkpoints/`` folder, created if absent.
        step: number of optimiser steps, >= 0.
        tensors: tensors by group and name (any device and dtype, no two sharing memory).
        scalars: JSON values without NaN or infinity, written to ``state.json``.
        keep: number of checkpoints that stay, >= 1, including the new one.
        ranks: ranks of the run, which must all call this function. Each writes its shards of
            sharded tensors; rank 0 writes everything else.

    Returns:
        The folder of the committed checkpoint.

    Raises:
        RunError: the checkpoint could not be written (no space, no permission, read-only), or a
            verified checkpoint of this step exists. Earlier checkpoints are unchanged.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
    sharded, whole = tensor_files.split(tensors)
    final = folder / f"step-{step:08d}"

    def stage() -> Path:
        staged = staged_beside(final)
        with _disk_errors(folder, step, staged):
            make_folder(folder)
            staged.mkdir()
        return staged

    def complete() -> Path:
        with _disk_errors(folder, step, staged):
            if len(list(staged.iterdir())) < files:
                raise OSError(
                    f"{files} ranks wrote their shards, and rank 0 sees fewer files: run.output "
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
                "checkpoints were kept. Check the disk, then re-run the command with --resume."
            ) from error
        _prune(folder, step, keep)
        return final

    staged, files = ranks.on_main(stage), 0
    if sharded:
        with _disk_errors(folder, step, staged):
            files = tensor_files.write_shards(staged, sharded, ranks)
    return ranks.on_main(complete)


@contextmanager
def _disk_errors(folder: Path, step: int, staged: Path) -> Iterator[None]:
    """Remove the staged folder after a disk error, and raise the error as :class:`RunError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise RunError(_why_not_saved(folder, step, error)) from error


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check every file against it.

    Returns:
        The manifest.

    Raises:
        CheckpointDamagedError: a file is missing, its size or SHA-256 is wrong, or the manifest's
            step or schema version is wrong.
    """
    manifest = _read_json(path, MANIFEST)
    if manifest.get("sha256") != manifest_digest(manifest):
        raise CheckpointDamagedError(f"{MANIFEST} was changed after the save: its SHA-256 differs")
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
            f"{MANIFEST} records step {manifest['step']}, but its folder is {path.name}"
        )
    present = {file.name for file in path.glob("*.safetensors")}
    if SCALARS not in manifest["files"] or not any(name in present for name in manifest["files"]):
        raise CheckpointDamagedError(f"{MANIFEST}: files: expected {SCALARS} and tensors")
    if extra := sorted(present - manifest["files"].keys()):
        raise CheckpointDamagedError(f"{extra[0]} is not one of the files in {MANIFEST}")
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
    """Return the newest checkpoint that verifies.

    Returns:
        The checkpoint, or None if none verifies; and the newer checkpoints that do not verify.
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
    """Return ``(step, path)`` of every checkpoint, oldest first, without verifying any."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def sweep(folder: Path) -> list[Path]:
    """Remove incomplete folders that interrupted saves left; return their paths."""
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
        save_tensors(tensor_files.named({group: members}), staged / f"{group}.safetensors")
    (staged / SCALARS).write_text(json.dumps(dict(scalars), allow_nan=False, sort_keys=True))
    files = {}
    for path in sorted(staged.iterdir()):
        size, digest = file_digest(path)
        files[path.name] = {"bytes": size, "sha256": digest}
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
    manifest["sha256"] = manifest_digest(manifest)
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _commit(staged: Path, final: Path) -> None:
    """Rename the staged checkpoint to its final name, after removing a damaged one of that name.

    Raises:
        FileExistsError: a verified checkpoint of that name exists.
    """
    if final.exists():
        try:
            verify_checkpoint(final)
        except CheckpointDamagedError:
            _discard(final)
        else:
            raise FileExistsError(errno.EEXIST, "a verified checkpoint of this step exists", final)
    os.rename(staged, final)


def _prune(folder: Path, step: int, keep: int) -> None:
    older = [path for number, path in list_checkpoints(folder) if number <= step]
    try:
        for path in older[:-keep]:
            _discard(path)
    except OSError as error:
        raise RunError(
            f"checkpoint of step {step} was saved, but an older one could not be removed: {error}. "
            f"Remove the older one from {folder}, then re-run the command with --resume."
        ) from error


def _discard(path: Path) -> None:
    """Remove a checkpoint, renamed first so that no incomplete one has a checkpoint's name."""
    doomed = staged_beside(path)
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Remove a folder, or a link to a folder without the folder itself."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _why_not_saved(folder: Path, step: int, error: Exception) -> str:
    committed = list_checkpoints(folder)
    newest = f"step {committed[-1][0]}" if committed else "none"
    advice = "Check the folder and its disk"
    if is_full(error):
        advice = f"{free_space(folder)} are free: make room, or lower run.keep_checkpoints"
    return (
        f"checkpoint of step {step} could not be written to {folder}: {error}. Newest checkpoint: "
        f"{newest}. {advice}, then re-run the command with --resume."
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not (path / name).exists():
        raise CheckpointDamagedError(f"{name} is missing")
    try:
        values: dict[str, Any] = read_json(path / name, dict[str, Any])
    except DocumentError as error:
        raise CheckpointDamagedError(f"{name} cannot be read: {error}") from error
    return values


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own ``sha256``."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
