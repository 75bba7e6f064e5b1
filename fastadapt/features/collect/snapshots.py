"""Save and load the statistics of an unfinished collection, in one file replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastadapt.features.collect.feature_stats import FeatureStats, wrong_values
from fastadapt.features.store.schema import Kind
from fastadapt.io.atomic import disk_errors, replacing, save_tensors
from fastadapt.io.documents import Count, parse_json
from fastadapt.io.names import has_file
from fastadapt.io.tensors import TensorError, open_tensors

_DTYPES = {torch.int64: "I64", torch.float32: "F32"}


class Cursor(NamedTuple):
    """Position in the texts: row groups read, batches read of the next, tokens read in total."""

    group: int = 0
    batch: int = 0
    tokens: int = 0


def save(tallies: Mapping[Kind, FeatureStats], cursor: Cursor, path: Path) -> None:
    """Write the statistics of every kind, and the cursor, over the last snapshot.

    Raises:
        RunError: the file cannot be written.
    """
    tensors = {
        f"{kind}.{name}": tensor.cpu()
        for kind, tally in tallies.items()
        for name, tensor in tally.tensors().items()
    }
    advice = "The last snapshot is intact: re-run the same command without --overwrite to resume."
    with disk_errors(path, advice), replacing(path) as staged:
        save_tensors(tensors, staged, {"cursor": json.dumps(cursor)})


def load(tallies: Mapping[Kind, FeatureStats], path: Path) -> Cursor:
    """Load a snapshot into the statistics ``tallies``; return its cursor, or a cursor at the start.

    Raises:
        UserError: the file cannot be read, or its tensors do not match ``tallies``.
    """
    if not has_file(path):
        return Cursor()
    with open_tensors(path) as file:
        cursor = _cursor(file, path)
        for kind, tally in tallies.items():
            require_like(file, kind, tally, path)
            tally.load(Prefixed(file, kind))
            for name in wrong_values(tally.tensors(), tally):
                raise TensorError(f"{path}: tensor {kind}.{name} has impossible values")
    return cursor


def cursor_of(path: Path) -> Cursor:
    """Return the position in the texts at which a snapshot was saved.

    Raises:
        UserError: the file cannot be read.
    """
    with open_tensors(path) as file:
        return _cursor(file, path)


def _cursor(file: Any, path: Path) -> Cursor:
    text = (file.metadata() or {}).get("cursor")
    if text is None:
        raise TensorError(f"{path}: cursor: expected an entry of the metadata, got none")
    return Cursor(*parse_json(text, f"{path}: cursor", tuple[Count, Count, Count]))


def require_like(file: Any, kind: Kind, tally: FeatureStats, path: Path) -> None:
    """Check names, shapes and dtypes of a kind's tensors in a file against those of ``tally``.

    Only the file's header is read; ``tally`` may be on ``meta``.

    Raises:
        TensorError: a tensor is missing, or its shape or dtype differs.
    """
    names = set(file.keys())
    for name, mine in tally.tensors().items():
        where = f"{path}: tensor {kind}.{name}"
        if f"{kind}.{name}" not in names:
            raise TensorError(f"{where}: expected a tensor, got none")
        held = file.get_slice(f"{kind}.{name}")
        shape, expected = tuple(held.get_shape()), tuple(mine.shape)
        if shape != expected:
            raise TensorError(f"{where}: expected {expected}, got {shape}")
        if held.get_dtype() != _DTYPES[mine.dtype]:
            raise TensorError(f"{where}: expected {_DTYPES[mine.dtype]}, got {held.get_dtype()}")


class Prefixed(Mapping[str, Any]):
    """Map names to the tensors of one kind in an open file; each is read when it is looked up."""

    def __init__(self, file: Any, kind: Kind) -> None:
        self._file, self._kind = file, kind

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(f"{self._kind}.{name}")

    def __iter__(self) -> Any:
        start = f"{self._kind}."
        return (n.removeprefix(start) for n in self._file.keys() if n.startswith(start))  # noqa: SIM118

    def __len__(self) -> int:
        return sum(1 for _ in self)
