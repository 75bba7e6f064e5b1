"""Fingerprints of weights and configurations, by which a run recognises its models.

A fingerprint of weights is a SHA-256 over each file's name, size and header, which has every
tensor's name, dtype, shape and position, and over the bytes of the tensors: all bytes of files of
up to 64 MiB; in larger files the first and the last 4 KiB of every tensor. It therefore detects
other weights of the same shapes, and any training that moved every tensor. A change inside a large
file that leaves both ends of every tensor as they were is not detected. That of a configuration is
over ``config.json``, without entries such as names and versions, which change no output.
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
from fastadapt.io.documents import read_json
from fastadapt.models.pretrained import fetch, tensor_files
from fastadapt.models.sources.peft_folder import CONFIG, find_peft

_WHOLE = 64 << 20  # bytes of a file that is hashed completely
_END = 4 << 10  # bytes hashed at either end of a tensor
_HEADER = 100 << 20  # bytes of a header that safetensors reads

_NO_OUTPUT = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}

#: Nouns of the entries of a card that hold fingerprints.
ENTRIES = {"weights": "weights", "configs": "configuration"}
#: Fingerprints of each model by entry of a card, and by role: ``target`` and ``base``.
Fingerprints = Mapping[str, Mapping[str, str]]


def fingerprints(models: Mapping[str, tuple[str, str | None]]) -> dict[str, dict[str, str]]:
    """Return the fingerprints of models.

    Args:
        models: folder or hub id of each model, and its revision, by role.

    Raises:
        UserError: a file is missing or damaged.
    """
    return {
        "weights": {role: fingerprint(*model) for role, model in models.items()},
        "configs": config_fingerprints(models),
    }


def config_fingerprints(models: Mapping[str, tuple[str, str | None]]) -> dict[str, str]:
    """Return the fingerprint of each model's configuration; a PEFT folder has none of its own.

    Raises:
        UserError: a file is damaged.
    """
    digests = {}
    for role, (source, revision) in models.items():
        file = fetch(source, "config.json", revision)
        if file is not None and find_peft(source, revision) is None:
            entries = _output_entries(read_json(file, dict[str, Any], constants=True))
            text = json.dumps(entries, sort_keys=True)
            digests[role] = hashlib.sha256(text.encode()).hexdigest()
    return digests


def _output_entries(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _output_entries(v) for key, v in value.items() if key not in _NO_OUTPUT}


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
    """Return a clause for each model whose weights or configuration are not the recorded ones.

    Args:
        recorded: a card, or another document with fingerprints of a run; those that it lacks, as
            in older runs, are not compared.
        now: fingerprints of the models.
        names: folder or hub id of each model by role.

    Example:
        >>> recorded, now = ({"weights": {"target": half * 32}} for half in ("ab", "cd"))
        >>> changes(recorded, now, {"target": "a/b"})
        ['target a/b has weights cdcdcdcdcdcd, not abababababab']
    """
    clauses = []
    for entry, noun in ENTRIES.items():
        then = recorded.get(entry) or {}
        clauses += [
            f"{role} {names[role]} has {noun} {digest[:12]}, not {str(then[role])[:12]}"
            for role, digest in now.get(entry, {}).items()
            if then.get(role) not in (None, digest)
        ]
    return clauses


def warn_of_changes(
    run: str, recorded: Mapping[str, Any], now: Fingerprints, names: Mapping[str, str]
) -> None:
    """Warn that a run was trained with other weights or configurations than its models have now."""
    if changed := changes(recorded, now, names):
        warnings.warn(
            f"{run} was trained with other models than its pair has now: {'; '.join(changed)}. "
            "What is computed now does not describe the trained pair",
            ModelsChangedWarning,
            stacklevel=2,
        )
