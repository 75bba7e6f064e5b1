"""What was collected so far, in one file that a kill cannot spoil."""

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
    """How far the texts were read: groups, batches of the next one, and tokens of all of them."""

    group: int = 0
    batch: int = 0
    tokens: int = 0


def save(tallies: Mapping[Kind, FeatureStats], cursor: Cursor, path: Path) -> None:
    """Write all of them, in place of what was there.

    Raises:
        RunError: it cannot be written.
    """
    tensors = {
        f"{kind}.{name}": tensor.cpu()
        for kind, tally in tallies.items()
        for name, tensor in tally.tensors().items()
    }
    advice = "What was collected before is intact: run the same command again."
    with disk_errors(path, advice), replacing(path) as staged:
        save_tensors(tensors, staged, {"cursor": json.dumps(cursor)})


def load(tallies: Mapping[Kind, FeatureStats], path: Path) -> Cursor:
    """Take what was saved; nothing, where nothing was.

    Raises:
        UserError: it cannot be read, or is of other tallies.
    """
    if not has_file(path):
        return Cursor()
    with open_tensors(path) as file:
        cursor = _cursor(file, path)
        for kind, tally in tallies.items():
            require_like(file, kind, tally, path)
            tally.load(Prefixed(file, kind))
            for name in wrong_values(tally.tensors(), tally):
                raise TensorError(f"{path}: tensor {kind}.{name}: it has values that cannot be")
    return cursor


def cursor_of(path: Path) -> Cursor:
    """How far a snapshot is.

    Raises:
        UserError: it cannot be read.
    """
    with open_tensors(path) as file:
        return _cursor(file, path)


def _cursor(file: Any, path: Path) -> Cursor:
    text = (file.metadata() or {}).get("cursor")
    if text is None:
        raise TensorError(f"{path}: cursor: expected one in its metadata, got none")
    return Cursor(*parse_json(text, f"{path}: cursor", tuple[Count, Count, Count]))


def require_like(file: Any, kind: Kind, tally: FeatureStats, path: Path) -> None:
    """Raise :class:`~fastadapt.io.tensors.TensorError` where a file's tensors of a kind are not of
    the tally's names, shapes and dtypes. Only its header is read; the tally may be on ``meta``.
    """
    there = set(file.keys())
    for name, mine in tally.tensors().items():
        where = f"{path}: tensor {kind}.{name}"
        if f"{kind}.{name}" not in there:
            raise TensorError(f"{where}: expected one, got none")
        held = file.get_slice(f"{kind}.{name}")
        found, expected = tuple(held.get_shape()), tuple(mine.shape)
        if found != expected:
            raise TensorError(f"{where}: expected {expected}, got {found}")
        if held.get_dtype() != _DTYPES[mine.dtype]:
            raise TensorError(f"{where}: expected {_DTYPES[mine.dtype]}, got {held.get_dtype()}")


class Prefixed(Mapping[str, Any]):
    """The tensors of one kind, read one at a time."""

    def __init__(self, file: Any, kind: Kind) -> None:
        self._file, self._kind = file, kind

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(f"{self._kind}.{name}")

    def __iter__(self) -> Any:
        start = f"{self._kind}."
        return (n.removeprefix(start) for n in self._file.keys() if n.startswith(start))  # noqa: SIM118

    def __len__(self) -> int:
        return sum(1 for _ in self)
