"""Tensor files of a checkpoint, written by one rank or by all, and read by any number of ranks.

A tensor has the name ``group.name`` in the files. One process writes a file per group. For tensors
that are sharded over ranks, PyTorch's distributed checkpoint writes a safetensors file per rank.
The file holds the rank's shards, and its metadata their offsets in the whole tensor. PyTorch's
reader accepts both kinds of files and reads only the parts that it needs. Its default format, a
pickle, is not used.
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
    """Verified checkpoint: its step, its folder and its JSON scalars."""

    step: int
    path: Path
    scalars: dict[str, Any]

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors by group and name, unsharded, in host memory."""
        return read(self.path)

    def read(self, like: Groups) -> dict[str, dict[str, Tensor]]:
        """Return all tensors; of a tensor that is sharded in ``like``, only this rank's shard."""
        return read(self.path, like)


def named(groups: Groups) -> dict[str, Tensor]:
    """Return the tensors of ``groups`` by their names in the files, ``group.name``."""
    return {
        f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()
    }


def split(groups: Groups) -> tuple[Groups, Groups]:
    """Return the groups that hold a sharded tensor, and the groups that hold none."""
    sharded = {
        group: tensors
        for group, tensors in groups.items()
        if any(isinstance(tensor, DTensor) for tensor in tensors.values())
    }
    return sharded, {group: t for group, t in groups.items() if group not in sharded}


def write_shards(folder: Path, groups: Groups, ranks: Ranks) -> int:
    """Write this rank's shards into an existing folder; all ranks must call this function.

    Returns:
        The number of files that all ranks wrote.

    Raises:
        OSError: this or another rank could not write.
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
    shards = (t.to_local() for t in named(groups).values() if isinstance(t, DTensor))
    files = torch.tensor(int(any(shard.numel() for shard in shards)))
    ranks.all_reduce_sum(files)
    return int(files)


def read(folder: Path, like: Groups | None = None) -> dict[str, dict[str, Tensor]]:
    """Read the tensors in the files of ``folder``, by group and name.

    Args:
        folder: folder with the files of one process or of any number of ranks.
        like: tensors of this rank. For a sharded tensor of the same name, shape and dtype, the same
            shard is read to its device. All other tensors are read unsharded to host memory.

    Raises:
        TensorError, SafetensorError, OSError: a file is damaged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(folder))
    local = named(like or {})
    tensors = {}
    with _damage_explained(folder):
        metadata = reader.read_metadata().state_dict_metadata
    for key, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        shape, dtype, shard = entry.size, entry.properties.dtype, local.get(key)
        if isinstance(shard, DTensor) and (shard.shape, shard.dtype) == (shape, dtype):
            tensors[key] = torch.empty_like(shard)
        else:
            tensors[key] = torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings(), _damage_explained(folder):
        # Ranks read without communication: the files hold the offsets of all shards.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = tensor
    return groups


def check_headers(folder: Path) -> None:
    """Read the headers of the files, without their tensors.

    Raises:
        TensorError: a file is not a safetensors file, or lacks the offsets of its shards.
    """
    import torch.distributed.checkpoint as dcp

    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file):
            pass
    with _damage_explained(folder):
        dcp.HuggingFaceStorageReader(str(folder)).read_metadata()


@contextmanager
def _damage_explained(folder: Path) -> Iterator[None]:
    """Turn errors of PyTorch's reader on malformed metadata of shards into a TensorError."""
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
        raise TensorError(f"{folder}: the tensors' metadata is malformed: {reason}") from error
