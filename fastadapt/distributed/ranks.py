"""Ranks of a run that ``torchrun`` starts, one per GPU, and their collective operations.

A process without torchrun is rank 0 of a world of 1. Every operation is then the identity, and no
process group exists. Host values are exchanged over gloo, which does not wait for a GPU.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastadapt.errors import RunError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the collective operations of its run.

    Attributes:
        rank: number of the rank, from 0. Only rank 0 writes files and prints.
        world: number of processes.

    Example:
        >>> Ranks().on_main(lambda: "config.yaml")
        'config.yaml'
    """

    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Yield (item, counts) for this rank's share of ``items``; ``counts`` is false for padding.

        Every rank gets the same number of items, since all must take part in gathering weights. If
        the last round has too few items, a rank repeats one of them, which does not count.

        Example:
            >>> list(Ranks(rank=1, world=2).shard("abc"))
            [('b', True), ('c', False)]
        """
        group: list[T] = []
        for item in items:
            group.append(item)
            if len(group) == self.world:
                yield group[self.rank], True
                group = []
        if group:
            counts = self.rank < len(group)
            yield group[self.rank if counts else 0], counts

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on at least one rank."""
        if self.world == 1:
            return flag
        reduced = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return bool(reduced)

    def on_main(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 and return its result on all ranks.

        Raises:
            UserError, RunError: ``work`` raised it on rank 0; raised on all ranks.
        """
        if self.world == 1:
            return work()
        result: list[T | UserError | RunError | None] = [None]
        if self.is_main:
            try:
                result = [work()]
            except (UserError, RunError) as error:
                result = [error]
        dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
        if isinstance(result[0], (UserError, RunError)):
            raise result[0]
        return result[0]  # type: ignore[return-value]

    def interleave(self, rows: Tensor) -> Tensor:
        """Gather each rank's ``[n, ...]`` into ``[n * world, ...]``, in the order of :meth:`shard`.

        ``n`` is the same on all ranks; repeats that do not count come last.
        """
        if self.world == 1:
            return rows
        by_rank = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(by_rank, rows)
        return torch.stack(by_rank, dim=1).flatten(0, 1)

    def all_reduce_or(self, flags: Tensor) -> Tensor:
        """Return the elementwise *or* of a bool tensor over ranks."""
        if self.world == 1:
            return flags
        reduced = flags.to(torch.uint8)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return reduced.bool()

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's, in place."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace a tensor in place by its sum over ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)


ALONE = Ranks()
_JOINED = itertools.count()  # numbers the runs of this process


def is_main() -> bool:
    """Return whether this process prints: whether it is rank 0 or has no other ranks."""
    return int(os.environ.get("RANK", "0")) == 0


def exit_process(code: int) -> int:
    """End this process with ``code`` if it has other ranks; else return ``code``.

    ``os._exit`` skips Python's shutdown, during which threads of the process group may still free
    tensors and abort the process (seen in 2 of about 100 exits, after all work was done).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def should_report(error: UserError | RunError) -> bool:
    """Return whether this process prints the error: whether it was the first rank to raise."""
    return is_main() if error.is_reported is None else not error.is_reported


@contextmanager
def joined(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Create the process group of the ranks that ``torchrun`` started, inside the context.

    On GPUs, the current device of a rank becomes the one with its local rank as number.

    Args:
        device: device type, ``cuda`` or ``cpu``.
        timeout_s: seconds that a rank waits for another rank before the run ends.

    Raises:
        UserError: the device names one GPU by its number, or the machine has fewer GPUs than ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    _take_device(device)
    timeout = timedelta(seconds=timeout_s)
    whole_store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives the run and its restarts, so each gets keys under its own prefix.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"fastadapt/{attempt}/{next(_JOINED)}", whole_store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, world_size=world, rank=rank, store=store)
    try:
        yield Ranks(rank, world)
    except (UserError, RunError) as error:
        # An error on one rank makes the others fail: only the first to raise reports.
        try:
            error.is_reported = store.add("reported", 1) > 1
        except dist.DistError:
            error.is_reported = False  # the store's process has ended
        raise
    else:
        dist.destroy_process_group()


def _take_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if ":" in str(device):
        raise UserError(f"pair.device: {device} is one GPU, and every rank needs its own; use cuda")
    if local >= n_gpus:
        raise UserError(
            f"this machine has {n_gpus} GPUs, and torchrun started local rank {local} on it: "
            f"start at most {n_gpus} (--nproc-per-node)"
        )
    torch.cuda.set_device(local)


def is_lost(error: Exception) -> bool:
    """Return whether an error says that another rank is unreachable or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def lost_reason(error: Exception) -> str:
    """Return the first sentence of an error of :func:`is_lost`, without gloo's source line."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).strip()).split(". ")[0].splitlines()[0]
