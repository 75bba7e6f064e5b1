"""What was collected so far, in one file that a kill cannot spoil."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from fastadapt.features.collect.tally import Tally
from fastadapt.features.schema import Kind
from fastadapt.io.atomic import disk_errors, replacing, save_tensors
from fastadapt.pretrained import reading


class Cursor(NamedTuple):
    """How far the texts were read: groups, batches of the next one, and tokens of all of them."""

    group: int = 0
    batch: int = 0
    tokens: int = 0


def save(tallies: Mapping[Kind, Tally], cursor: Cursor, path: Path) -> None:
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


def load(tallies: Mapping[Kind, Tally], path: Path) -> Cursor:
    """Take what was saved; nothing, where nothing was.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        return Cursor()
    with reading("snapshot", str(path)), safe_open(path, framework="pt") as file:
        for kind, tally in tallies.items():
            tally.load(Prefixed(file, kind))
        return Cursor(*json.loads(file.metadata()["cursor"]))


def cursor_of(path: Path) -> Cursor:
    """How far a snapshot is.

    Raises:
        UserError: it cannot be read.
    """
    with reading("snapshot", str(path)), safe_open(path, framework="pt") as file:
        return Cursor(*json.loads(file.metadata()["cursor"]))


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
