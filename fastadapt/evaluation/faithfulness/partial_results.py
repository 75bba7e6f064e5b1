"""What was measured so far, batch by batch, in files that a kill cannot spoil."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from fastadapt.errors import UserError
from fastadapt.io.atomic import disk_errors, make_folder, replacing, save_tensors, sync_folder
from fastadapt.io.tensors import TensorError, check_finite, open_tensors

#: Dtypes and shapes of the arrays of a student, all parts together, by name; None for any size.
Arrays = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
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
        arrays: that there are; None for any.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        fingerprint: str,
        n_parts: int,
        arrays: Arrays | None = None,
    ) -> None:
        self._fingerprint, self.n_parts, self._arrays = fingerprint, n_parts, arrays
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
            UserError: some are missing, or a file is damaged or holds other arrays than expected.
        """
        if missing := self.missing():
            raise UserError(f"{self._pieces}: {len(missing)} of {self.n_parts} parts are missing")
        if not self.whole.is_file():
            self._join()  # a kill came between the last part and this
        return self._read(self.whole)

    def damaged(self, reason: str) -> UserError:
        """What to raise where the values of the arrays contradict each other or their texts."""
        return UserError(f"{self.whole}: {reason}: remove it and evaluate again")

    def _join(self) -> None:
        pieces = [self._read(self._piece(i), whole=False) for i in range(self.n_parts)]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        if self._arrays is not None:
            try:
                _check(joined, self._arrays, str(self._pieces), whole=True)
            except TensorError as error:
                raise UserError(f"{error}: remove it and evaluate again") from error
        beside = self._pieces / "all.safetensors"  # where a kill leaves nothing that stays
        with disk_errors(self._pieces, _GO_ON):
            with replacing(beside) as staged:
                save_tensors(joined, staged, {"fingerprint": self._fingerprint})
            os.replace(beside, self.whole)
            sync_folder(self.whole.parent)
        shutil.rmtree(self._pieces, ignore_errors=True)

    def _read(self, file: Path, *, whole: bool = True) -> dict[str, Tensor]:
        try:
            with open_tensors(file) as opened:
                found = (opened.metadata() or {}).get("fingerprint")
                if found != self._fingerprint:
                    raise TensorError(
                        f"{file}: expected the fingerprint {self._fingerprint[:16]}, got {found}"
                    )
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if self._arrays is not None:
                _check(tensors, self._arrays, str(file), whole=whole)
        except TensorError as error:
            raise UserError(f"{error}: remove it and evaluate again") from error
        return tensors


def _check(tensors: Mapping[str, Tensor], arrays: Arrays, source: str, *, whole: bool) -> None:
    """Raise where arrays are not the expected ones; of a part, whatever its first dimension."""
    for name in sorted(tensors.keys() ^ arrays.keys()):
        got, expected = ("one", "none") if name in tensors else ("none", "one")
        raise TensorError(f"{source}: tensor {name}: expected {expected}, got {got}")
    for name, (dtype, shape) in arrays.items():
        tensor, sizes = tensors[name], shape if whole else (None, *shape[1:])
        if tensor.dtype != dtype:
            raise TensorError(f"{source}: tensor {name}: expected {dtype}, got {tensor.dtype}")
        if tensor.ndim != len(sizes) or any(
            size not in (None, n) for size, n in zip(sizes, tensor.shape, strict=True)
        ):
            shown = ", ".join("any" if size is None else str(size) for size in sizes)
            raise TensorError(
                f"{source}: tensor {name}: expected ({shown}), got {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point():
            check_finite(tensor, f"{source}: tensor {name}")


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
