"""The processes that train one run together: ranks, as ``torchrun`` starts them, one per GPU.

A process that was started alone is one rank of one: everything here is then the identity, and no
process group exists. Host values travel over gloo, so that telling each other something never waits
for a GPU.
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
    """This process's place among those of its run.

    Attributes:
        rank: from 0; rank 0 leads: it alone writes and prints.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Deal out ``items``, one to each rank in turn: this rank's, and whether each counts.

        Every rank gets as many, since all must take part in what gathers weights: where items run
        short in the last round, some get one of it again that does not count.
        """
        hand: list[T] = []
        for item in items:
            hand.append(item)
            if len(hand) == self.world:
                yield hand[self.rank], True
                hand = []
        if hand:
            counts = self.rank < len(hand)
            yield hand[self.rank if counts else 0], counts

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on some rank."""
        if self.world == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def lead(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on all; a user's or run's error of it is raised on all."""
        if self.world == 1:
            return work()
        told: list[T | UserError | RunError | None] = [None]
        if self.leads:
            try:
                told = [work()]
            except (UserError, RunError) as error:
                told = [error]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if isinstance(told[0], (UserError, RunError)):
            raise told[0]
        return told[0]  # type: ignore[return-value]

    def interleave(self, rows: Tensor) -> Tensor:
        """Gather ``[n, ...]`` of every rank to ``[n * world, ...]``, in the order of :meth:`share`.

        All ranks have the same ``n``; repeats that do not count come last.
        """
        if self.world == 1:
            return rows
        of_rank = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(of_rank, rows)
        return torch.stack(of_rank, dim=1).flatten(0, 1)

    def union(self, flags: Tensor) -> Tensor:
        """Elementwise: whether a bool tensor is true on some rank."""
        if self.world == 1:
            return flags
        told = flags.to(torch.uint8)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.bool()

    def send(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)


ALONE = Ranks()
_JOINED = itertools.count()  # runs of this process


def leads() -> bool:
    """Whether this process should speak: it is rank 0, or was started alone."""
    return int(os.environ.get("RANK", "0")) == 0


def leave(code: int) -> int:
    """End this process with ``code`` if it is one of several; alone, return ``code``.

    Threads of the process group may still be letting go of tensors. Where Python shuts down under
    them, the process aborts (seen in 2 of some 100 exits, after all work was done).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def tells(error: UserError | RunError) -> bool:
    """Whether this process should print an error of its run: one does, the first to meet one."""
    return leads() if error.told is None else not error.told


@contextmanager
def joined(device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started with this one, for as long as the context lasts.

    On GPUs, each rank's current device becomes the one of its number on its machine.

    Args:
        device: the kind of device that the run is on.
        timeout_s: how long a rank waits for another before the run ends.

    Raises:
        UserError: the device is one GPU by its number, or there are fewer than ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    _take_device(device)
    timeout = timedelta(seconds=timeout_s)
    whole_store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store outlives this run and this attempt at it: neither may find another's keys.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"fastadapt/{attempt}/{next(_JOINED)}", whole_store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, world_size=world, rank=rank, store=store)
    try:
        yield Ranks(rank, world)
    except (UserError, RunError) as error:
        # One mistake is told once, by whoever met it first: the others fail in its wake.
        try:
            error.told = store.add("told", 1) > 1
        except dist.DistError:
            error.told = False  # the store went with the process that held it
        raise
    else:
        dist.destroy_process_group()


def _take_device(device: torch.device) -> None:
    if device.type != "cuda":
        return
    local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if ":" in str(device):
        raise UserError(
            f"pair.device: {device} is one GPU, and every rank takes one of its own; use cuda"
        )
    if local >= here:
        raise UserError(
            f"this machine has {here} GPUs, and torchrun started a rank number {local} on it: "
            f"start at most {here} (--nproc-per-node)"
        )
    torch.cuda.set_device(local)


def is_lost(error: Exception) -> bool:
    """Whether an error says that another rank cannot be reached any more, or in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def lost_reason(error: Exception) -> str:
    """The first sentence of such an error, without the place in gloo's source."""
    return re.sub(r"^\[[^\]]*\] ", "", str(error).strip()).split(". ")[0].splitlines()[0]
