"""What was measured so far, batch by batch, in files that a kill cannot spoil."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

import torch
from safetensors import safe_open
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.io.atomic import disk_errors, make_folder, replacing, save_tensors, sync_folder
from fastadapt.pretrained import reading

_GO_ON = "What was measured before is intact: run the same command again."


class Parts:
    """Arrays of one student in as many parts as there are batches; one file once all are there.

    Files are named by student and fingerprint, so that another measurement (other texts, another
    adapter of the same name) never finds them, nor overwrites them.

    Args:
        folder: made when the first part is added.
        name: the student's.
        fingerprint: of everything that the arrays depend on; hexadecimal.
        n_parts: how many there will be.
    """

    def __init__(self, folder: Path, name: str, fingerprint: str, n_parts: int) -> None:
        self._fingerprint, self.n_parts = fingerprint, n_parts
        stem = f"{name}-{fingerprint[:16]}"
        self.whole = folder / f"{stem}.safetensors"
        self._pieces = folder / stem
        if self.whole.is_file():  # a kill may have left them
            shutil.rmtree(self._pieces, ignore_errors=True)

    def _piece(self, part: int) -> Path:
        return self._pieces / f"{part:06d}.safetensors"

    def missing(self) -> list[int]:
        """The parts that are still to be measured."""
        if self.whole.is_file():
            return []
        return [part for part in range(self.n_parts) if not self._piece(part).is_file()]

    def add(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a part; with the last one all become one file.

        Args:
            part: 0 to ``n_parts - 1``.
            tensors: the same names in every part; their first dimension is what parts add to.

        Raises:
            RunError: the folder cannot be written.
        """
        with disk_errors(self._pieces, _GO_ON):
            make_folder(self._pieces)
            with replacing(self._piece(part)) as staged:
                save_tensors(tensors, staged, {"fingerprint": self._fingerprint})
        if not self.missing():
            self._join()

    def read(self) -> dict[str, Tensor]:
        """All parts, in order, as one.

        Raises:
            UserError: some are missing, or a file is damaged.
        """
        if missing := self.missing():
            raise UserError(f"{self._pieces}: {len(missing)} of {self.n_parts} parts are missing")
        if not self.whole.is_file():
            self._join()  # a kill came between the last part and this
        return self._read(self.whole)

    def _join(self) -> None:
        pieces = [self._read(self._piece(i)) for i in range(self.n_parts)]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        beside = self._pieces / "all.safetensors"  # where a kill leaves nothing that stays
        with disk_errors(self._pieces, _GO_ON):
            with replacing(beside) as staged:
                save_tensors(joined, staged, {"fingerprint": self._fingerprint})
            os.replace(beside, self.whole)
            sync_folder(self.whole.parent)
        shutil.rmtree(self._pieces, ignore_errors=True)

    def _read(self, file: Path) -> dict[str, Tensor]:
        with reading("measurement", str(file)), safe_open(file, framework="pt") as opened:
            found = (opened.metadata() or {}).get("fingerprint")
            if found != self._fingerprint:
                raise UserError(
                    f"{file}: expected the fingerprint {self._fingerprint[:16]}, got {found}: "
                    "remove it and evaluate again"
                )
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def unfinished(
    stores: Mapping[str, Parts],
    at_once: int,
    progress: Callable[[int, int], None] | None,
    stop: Event | None,
) -> Iterator[tuple[int, list[str]]]:
    """Yield each part that is missing and the students that lack it, at most ``at_once``.

    The caller has added the part to all of their stores when it asks for the next one.

    Args:
        stores: by student's name.
        progress: told (parts done, parts in all), summed over students.
        stop: ends the loop.
    """
    names, missing = list(stores), {name: store.missing() for name, store in stores.items()}
    total = sum(store.n_parts for store in stores.values())
    left = sum(map(len, missing.values()))
    for first in range(0, len(names), at_once):
        some = names[first : first + at_once]
        for part in sorted({part for name in some for part in missing[name]}):
            if stop is not None and stop.is_set():
                return
            todo = [name for name in some if part in missing[name]]
            yield part, todo
            left -= len(todo)
            if progress is not None:
                progress(total - left, total)
