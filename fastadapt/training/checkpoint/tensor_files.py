"""The tensors of a checkpoint: written by one process or by every rank, read by any number of them.

In the files a tensor is called ``group.name``. One process writes a file per group. Where tensors
are shared out over ranks, PyTorch's distributed checkpoint writes a safetensors file per rank that
holds its shares, and in the file's metadata where in the whole each belongs. Its reader takes both,
and of each file only what it needs. Its default format, which is a pickle, is not used anywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastadapt.distributed.ranks import Ranks
from fastadapt.io.tensors import TensorError, open_tensors

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified set: its JSON scalars, and where its tensors are."""

    step: int
    path: Path
    scalars: dict[str, Any]

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors by group and name, whole, in host memory."""
        return read(self.path)

    def read(self, like: Groups) -> dict[str, dict[str, Tensor]]:
        """The same, but of what is shared out over ranks in ``like`` only this rank's shares."""
        return read(self.path, like)


def named(groups: Groups) -> dict[str, Tensor]:
    """The tensors of ``groups`` as they are called in the files."""
    return {
        f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()
    }


def split(groups: Groups) -> tuple[Groups, Groups]:
    """Groups whose tensors are shared out over ranks, and groups of which every rank has all."""
    shared = {
        group: tensors
        for group, tensors in groups.items()
        if any(isinstance(tensor, DTensor) for tensor in tensors.values())
    }
    return shared, {group: t for group, t in groups.items() if group not in shared}


def write_shares(folder: Path, groups: Groups, ranks: Ranks) -> int:
    """Write this rank's shares into ``folder``, which is there; all ranks must take part.

    Returns:
        How many files the ranks wrote together.

    Raises:
        OSError: a rank, not always this one, could not write.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(named(groups), storage_writer=writer)
    except dcp.CheckpointException as failed:
        rank, (error, _) = min(failed.failures.items(), key=lambda item: item[0])
        if isinstance(error, OSError):
            raise OSError(error.errno, f"rank {rank}: {error.strerror}") from failed
        raise OSError(f"rank {rank}: {error}") from failed
    shares = (t.to_local() for t in named(groups).values() if isinstance(t, DTensor))
    files = torch.tensor(int(any(share.numel() for share in shares)))
    ranks.all_reduce_sum(files)
    return int(files)


def read(folder: Path, like: Groups | None = None) -> dict[str, dict[str, Tensor]]:
    """Every tensor in the files of ``folder``, by group and name.

    Args:
        folder: files of one process or of any number of ranks.
        like: what is shared out here over ranks: of a tensor of the same name, shape and dtype, the
            same share is read, to its device. All others are read whole, to host memory.

    Raises:
        TensorError, SafetensorError, OSError: a file is damaged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(folder))
    mine = named(like or {})
    found = {}
    with _refusing_odd_shares(folder):
        described = reader.read_metadata().state_dict_metadata
    for key, held in described.items():
        assert isinstance(held, TensorStorageMetadata)
        shape, dtype, own = held.size, held.properties.dtype, mine.get(key)
        if isinstance(own, DTensor) and (own.shape, own.dtype) == (shape, dtype):
            found[key] = torch.empty_like(own)
        else:
            found[key] = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings(), _refusing_odd_shares(folder):
        # Every rank reads for itself: where shares lie is in the files.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(found, storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = tensor
    return groups


def check_headers(folder: Path) -> None:
    """Read what the files say of their tensors.

    Raises:
        TensorError: a file is no safetensors file, or does not say where its shares belong.
    """
    import torch.distributed.checkpoint as dcp

    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file):
            pass
    with _refusing_odd_shares(folder):
        dcp.HuggingFaceStorageReader(str(folder)).read_metadata()


@contextmanager
def _refusing_odd_shares(folder: Path) -> Iterator[None]:
    """Turn what PyTorch's reader raises on misshapen metadata of shares into a TensorError."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (
        CheckpointException, ValueError, LookupError, TypeError, AttributeError, AssertionError,
        RecursionError, RuntimeError,
    ) as error:  # fmt: skip
        if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise TensorError(f"the tensors of {folder} cannot be put together: {reason}") from error
