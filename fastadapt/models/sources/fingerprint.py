"""Fingerprints of weights, by which a run recognises its models.

A fingerprint is a SHA-256 over each file's name, size and header, which has every tensor's name,
dtype, shape and position, and over the bytes of the tensors: all bytes of files of up to 64 MiB; in
larger files the first and the last 4 KiB of every tensor. It therefore detects other weights of the
same shapes, and any training that moved every tensor. A change inside a large file that leaves both
ends of every tensor as they were is not detected.
"""

from __future__ import annotations

import hashlib
import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadapt.errors import ModelsChangedWarning, UserError
from fastadapt.models.pretrained import tensor_files
from fastadapt.models.sources.peft_folder import CONFIG, find_peft

_WHOLE = 64 << 20  # bytes of a file that is hashed completely
_END = 4 << 10  # bytes hashed at either end of a tensor
_HEADER = 100 << 20  # bytes of a header that safetensors reads

#: Fingerprint of each model, by its role: ``target`` and ``base``.
Fingerprints = Mapping[str, str]


def fingerprint(source: str, revision: str | None) -> str:
    """Return the fingerprint of a checkpoint, or of a PEFT folder without its base, as hex digits.

    Raises:
        UserError: a file is missing or damaged.
    """
    sha256 = hashlib.sha256()
    peft = find_peft(source, revision)
    if peft is None:
        files = tensor_files(source, revision)
    else:
        files = {name: peft.weights.parent / name for name in (CONFIG, peft.weights.name)}
    for name, path in sorted(files.items()):
        sha256.update(f"{name} {path.stat().st_size}\n".encode())
        _update(sha256, path)
    return sha256.hexdigest()


def _update(sha256: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            sha256.update(file.read())
            return
        prefix = file.read(8)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER, size):
            raise UserError(f"{path}: a safetensors file is truncated or damaged")
        header = file.read(length)
        sha256.update(prefix + header)
        for name, tensor in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            for offset in (start, max(start, end - _END)):
                file.seek(8 + length + offset)
                sha256.update(file.read(min(_END, end - offset)))


def changes(recorded: Mapping[str, Any], now: Fingerprints, names: Mapping[str, str]) -> list[str]:
    """Return a clause for each model whose weights are not the recorded ones.

    Args:
        recorded: fingerprints of a run; roles without one, as in older runs, are not compared.
        now: fingerprints of the models.
        names: folder or hub id of each model by role.

    Example:
        >>> changes({"target": "ab" * 32}, {"target": "cd" * 32}, {"target": "a/b"})
        ['target a/b has weights cdcdcdcdcdcd, not abababababab']
    """
    return [
        f"{role} {names[role]} has weights {digest[:12]}, not {str(recorded[role])[:12]}"
        for role, digest in now.items()
        if recorded.get(role) not in (None, digest)
    ]


def warn_of_changes(
    run: str, recorded: Mapping[str, Any], now: Fingerprints, names: Mapping[str, str]
) -> None:
    """Warn that a run was trained with other weights than its models have now."""
    if changed := changes(recorded, now, names):
        warnings.warn(
            f"{run} was trained with other weights than its models have now: {'; '.join(changed)}. "
            "What is computed now does not describe the trained pair",
            ModelsChangedWarning,
            stacklevel=2,
        )
