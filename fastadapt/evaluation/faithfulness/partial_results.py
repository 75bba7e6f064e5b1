"""Stores measurements batch by batch, so that an interrupted evaluation can be resumed."""

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

#: Dtypes and shapes of a model's arrays, all parts joined, by name; None for any size.
Arrays = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
_RESUME_ADVICE = (
    "Finished measurements are intact. Run the same command again, without --overwrite, to resume."
)


class PartialResults:
    """Arrays of one model, in one file per batch until all batches are measured, then in one file.

    File names have the model's name and the fingerprint. A measurement of other texts, or of a
    different adapter with the same name, neither reads nor overwrites them.

    Args:
        folder: folder of the files; created with the first part.
        name: name of the model.
        fingerprint: hexadecimal digest of everything that the arrays depend on.
        n_parts: number of parts.
        arrays: expected arrays; None for any.
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
        if self.whole.is_file():  # an interrupted _join may have left its pieces
            shutil.rmtree(self._pieces, ignore_errors=True)

    def _piece(self, part: int) -> Path:
        return self._pieces / f"{part:06d}.safetensors"

    def missing(self) -> list[int]:
        """Return the indices of the parts that are not stored yet."""
        if self.whole.is_file():
            return []
        return [part for part in range(self.n_parts) if not self._piece(part).is_file()]

    def add(self, part: int, tensors: Mapping[str, Tensor]) -> None:
        """Store one part (batch) of the arrays. The last part joins all parts into one file.

        Args:
            part: index, 0 to ``n_parts - 1``.
            tensors: arrays of the part, with the same names in every part. Parts are joined along
                dimension 0.

        Raises:
            RunError: the folder cannot be written.
        """
        with disk_errors(self._pieces, _RESUME_ADVICE):
            make_folder(self._pieces)
            with replacing(self._piece(part)) as staged:
                save_tensors(tensors, staged, {"fingerprint": self._fingerprint})
        if not self.missing():
            self._join()

    def read(self) -> dict[str, Tensor]:
        """Return the arrays of all parts, joined in order.

        Raises:
            UserError: parts are missing, a file is damaged, or it has other arrays than expected.
        """
        if missing := self.missing():
            raise UserError(
                f"{self._pieces}: {len(missing)} of {self.n_parts} parts are missing; evaluate "
                "again to measure them"
            )
        if not self.whole.is_file():
            self._join()  # add() was interrupted before its own _join()
        return self._read(self.whole)

    def damaged(self, reason: str) -> UserError:
        """Return the error for inconsistent stored arrays; the caller raises it."""
        return UserError(f"{self.whole}: {reason}; remove this file and evaluate again")

    def _join(self) -> None:
        pieces = [self._read(self._piece(i), whole=False) for i in range(self.n_parts)]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        if self._arrays is not None:
            try:
                _check(joined, self._arrays, str(self._pieces), whole=True)
            except TensorError as error:
                raise UserError(f"{error}; remove this folder and evaluate again") from error
        joined_file = self._pieces / "all.safetensors"  # the next _join replaces a leftover here
        with disk_errors(self._pieces, _RESUME_ADVICE):
            with replacing(joined_file) as staged:
                save_tensors(joined, staged, {"fingerprint": self._fingerprint})
            os.replace(joined_file, self.whole)
            sync_folder(self.whole.parent)
        shutil.rmtree(self._pieces, ignore_errors=True)

    def _read(self, file: Path, *, whole: bool = True) -> dict[str, Tensor]:
        try:
            with open_tensors(file) as opened:
                got = (opened.metadata() or {}).get("fingerprint")
                if got != self._fingerprint:
                    raise TensorError(
                        f"{file}: expected the fingerprint {self._fingerprint[:16]}, got {got}"
                    )
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if self._arrays is not None:
                _check(tensors, self._arrays, str(file), whole=whole)
        except TensorError as error:
            raise UserError(f"{error}; remove this file and evaluate again") from error
        return tensors


def _check(tensors: Mapping[str, Tensor], arrays: Arrays, source: str, *, whole: bool) -> None:
    """Check names, dtypes and shapes of arrays; dimension 0 only if ``whole``, not one batch.

    Raises:
        TensorError: an array is not as expected.
    """
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


def iter_missing(
    stores: Mapping[str, PartialResults],
    at_once: int,
    progress: Callable[[int, int], None] | None,
    stop: Event | None,
) -> Iterator[tuple[int, list[str]]]:
    """Yield the index of each missing part, with the names of the models that lack it.

    The caller must add the part to the stores of these models before the next iteration.

    Args:
        stores: the stores of results, by name of the model.
        at_once: largest number of models yielded together.
        progress: called with (completed parts, total parts), summed over models.
        stop: set it to end the iteration.
    """
    names, missing = list(stores), {name: store.missing() for name, store in stores.items()}
    total = sum(store.n_parts for store in stores.values())
    left = sum(map(len, missing.values()))
    for first in range(0, len(names), at_once):
        group = names[first : first + at_once]
        for part in sorted({part for name in group for part in missing[name]}):
            if stop is not None and stop.is_set():
                return
            todo = [name for name in group if part in missing[name]]
            yield part, todo
            left -= len(todo)
            if progress is not None:
                progress(total - left, total)
